//! The hv process as a library: what a supervisor needs to start one and to talk to it, and the process itself.
//!
//! ```text
//!   guest -> hv::Vm -> vhdx::Disk -> csvfs File -> PathDevice -> gate -> LUN   no other process in between
//!                                       \-> NodeLink -- node socket --> csvd -> coordinator     metadata only
//!   supervisor --control socket--> Runner: status, pause, resume, save, abandon, activate, console, stop, live moves, image work
//! ```

mod boot;
pub mod chain;
pub mod config;
mod control;
mod disk;
mod failure;
mod image_work;
mod images;
mod lease;
mod link;
mod live;
mod lun;
mod parents;
mod path;
mod privileges;
pub mod report;
mod runner;
mod sandbox;
mod saved;
mod tap;
mod volume;

pub use control::serve_control;
pub use failure::Failure;
pub use lun::{LunQuestion, OpenLun, answer_lun_question};
pub use path::PathOrder;
pub use runner::{Ended, Runner};
pub use sandbox::FORBIDDEN_CALL;
pub use tap::card;

/// Confines the first thread, once everything is started: it waits from then on.
///
/// # Errors
/// When the kernel refuses.
pub fn confine_main() -> Result<(), Failure> {
    sandbox::leave_to_others()
}
