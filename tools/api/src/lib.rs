//! Requests and replies of the admin socket.
//!
//! ```text
//!   csvctl --- gRPC (admin.proto) over csvd.sock ---> csvd
//!                <--- reply, or Error { kind, message, hint } in the details of the status
//! ```
//!
//! [`config`] is the other thing that both sides share: the file that tells a daemon who it is.
//!
//! **Invariant:** the fields of a message are what `--json` prints; a name once given stays.

pub mod config;
mod connect;
mod error;

/// The generated messages, client and server.
pub mod pb {
    #![allow(
        missing_docs,
        unreachable_pub,
        missing_debug_implementations,
        unused_qualifications,
        clippy::all,
        clippy::pedantic,
        clippy::allow_attributes,
        clippy::allow_attributes_without_reason,
        reason = "generated from admin.proto, where the fields are described"
    )]
    tonic::include_proto!("csvd.admin");
}

pub use connect::{Client, connect, connect_over};
pub use error::{Error, Kind};
/// What comes from the daemon piece by piece.
pub use tonic::Streaming;
