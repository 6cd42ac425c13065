//! The client: an export of any NBD server as a block device.
//!
//! ```text
//!   device (the trait, keepers)  ->  plan (cut, replace)  ->  connection (send, take in)  ->  reader (bytes to outcomes)
//! ```

mod connection;
mod device;
mod handshake;
mod pending;
mod plan;
mod reader;

pub use device::{NbdDevice, NbdOptions};
