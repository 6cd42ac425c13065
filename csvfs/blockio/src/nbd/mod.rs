//! Network block devices: exports of other servers as devices, and devices as exports.
//!
//! ```text
//!   BlockDevice requests -> client -> requests  ---- Unix socket, TCP, or a transport --->  server -> BlockDevice
//!                                  <- replies, chunks of data, holes and errors ---------
//!
//!   format, options  bytes <-> types, nothing else       inbox, outbox   bytes on their way, without copies
//! ```
//! Both sides speak fixed newstyle with `GO`, and as far as the other side does: structured replies, FUA, flush, trim, write
//! zeroes, several connections, block size limits. Both sides take the other for hostile.

mod address;
mod client;
mod format;
mod inbox;
mod options;
mod outbox;
mod server;
mod socket;
mod transport;

pub use address::NbdAddress;
pub use client::{NbdDevice, NbdOptions};
pub use server::{Allocation, NbdExport, NbdExports, NbdServer, serve as serve_nbd};
pub use transport::{NbdStream, NbdTransport};
