//! The kernel's FUSE protocol: requests of `/dev/fuse` as types, and replies back.
//!
//! ```text
//!   /dev/fuse --channel--> bytes --request--> (Header, Op) --session--> Filesystem --reply--> bytes --channel--> /dev/fuse
//!   ring of a processor --ring----> memory --request--> as above, as soon as the kernel offers rings ----> memory --> ring
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
mod ring;
pub(crate) mod session;
