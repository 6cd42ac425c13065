//! The kernel's FUSE protocol: requests of `/dev/fuse` as types, and replies back.
//!
//! ```text
//!   /dev/fuse --channel--> bytes --request--> (Header, Op) --session--> Filesystem --reply--> bytes --channel--> /dev/fuse
//! ```
//! A layer of our own, because the libraries at hand drop what this filesystem needs: interrupts and the kind of a lock
//! (without them locks across nodes could neither be given up nor be told from `flock`), extended flags of ACLs,
//! `O_TMPFILE`, and birth times.

pub(crate) mod abi;
pub(crate) mod channel;
pub(crate) mod listing;
pub(crate) mod notify;
pub(crate) mod reply;
pub(crate) mod request;
pub(crate) mod session;
