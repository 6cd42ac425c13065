//! Moving a virtual machine between nodes.
//!
//! ```text
//!   source: Migration --- actions ---> the daemon: hv, record, messages        PROTOCOL.md has the sequence and
//!              ^------------ events -------|                                   the table of failures
//!   target: Incoming  --- the same
//! ```
//! `precopy` decides how often memory is sent, `stream` carries it. Both sides are pure state machines. The one commit point is in `handoff`: a compare-and-swap of the VM's record from
//! (source, e) to (target, e + 1). Before it the source may always go on, after it never (H1); whoever is in doubt reads
//! the record and never guesses (H6).

mod change;
mod handoff;
mod phase;
mod precopy;
pub mod preflight;
pub mod protocol;
mod report;
pub mod stream;
mod target;

#[cfg(test)]
mod model;

pub use change::{CasReply, Change, RecordView};
pub use phase::{Action, Event, Failure, Kind, Migration, Plan};
pub use precopy::{OVERHEAD_US, Pass, Precopy, Verdict};
pub use report::{Blackout, Report, SaveFigures};
pub use target::{Incoming, TargetAction, TargetAnswer, TargetEvent};

/// Version of the messages and of the order of steps. Both sides of a move speak the same.
pub const PROTOCOL_VERSION: u32 = 4;
