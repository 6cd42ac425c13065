//! A node's lease: how long it may go on writing without hearing from the others.
//!
//! ```text
//!   heartbeats out, answers in --> QuorumLease (deadline = sent + holder_stop, once a majority has answered, B1)
//!                                       |
//!                                  LeasePage.renew            one memory page in a file, written by the node daemon
//!                                       |
//!              every process of the node: LeaseReader.check right before each submit (B3)
//! ```
//! A lease that has run out makes I/O wait: the next renewal lets it go on. A gate holds such requests until somebody
//! calls its `reconsider`; the process that owns the gate has a thread for that, which sleeps in
//! [`LeaseReader::wait_change`]. A lease that was revoked, or that belongs to
//! another epoch, ends the right for good.

mod page;
mod quorum;

pub use page::{LeaseError, LeasePage, LeaseReader, LeaseRight, LeaseView, PAGE_BYTES};
pub use quorum::QuorumLease;
