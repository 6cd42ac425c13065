//! Block devices: what every byte of this project is finally read from and written to.
//!
//! ```text
//!   vhdx, csvfs, hv, ...            submit(IoRequest { op, done })
//!          |                                   |
//!          v                                   v
//!   trait BlockDevice  ---  FileDevice (io_uring, O_DIRECT) | NbdDevice | MemoryDevice | FaultDevice | Recorder | GatedDevice
//! ```
//!
//! **Invariant:** a completion runs exactly once for each submitted request, and a buffer stays alive until then.

mod buffer;
mod crash;
mod cuts;
mod device;
mod fault;
mod file;
mod gate;
mod held;
mod here;
mod job;
mod memory;
mod nbd;
mod path;
mod poison;
mod pool;
mod queue;
mod record;
mod reserve;
mod uri;
mod uring;

pub use buffer::{AlignedBuf, IO_ALIGN, IoBuf, Memory};
pub use crash::{Change, Unflushed};
pub use cuts::Cuts;
pub use device::{BlockDevice, Completion, Geometry, ImageFile, IoError, IoOp, IoRequest};
pub use fault::{FaultDevice, OpKind};
pub use file::{FileDevice, OpenOptions};
pub use gate::{GatedDevice, Permission, WriteRight};
pub use here::{Here, here, here_if_alone, inside};
pub use memory::MemoryDevice;
pub use nbd::{
    Allocation, NbdAddress, NbdDevice, NbdExport, NbdExports, NbdOptions, NbdServer, NbdStream, NbdTransport,
    serve_nbd,
};
pub use path::{CutDevice, Detour, PathDevice, PathStatus, Route, Switch, Ways};
pub use record::{Record, Recorder, Timeline};
pub use reserve::{
    ConflictDevice, Keys, Nexus, ReservationType, Reservations, ReserveError, SharedLun, Tripwire,
    despite_attentions, is_conflict,
};
pub use uri::{file_of_uri, open_uri};
