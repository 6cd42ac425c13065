//! The memory stream of a live move: RAM and the last state, over as many connections as both sides have cores.
//!
//! ```text
//!   source                                        target
//!   opening  -----------------------------------> which move, which of how many streams      record::Opening
//!   pages, plain or packed, zeros, pages ... ---> into RAM, in the order of this stream
//!   mark     -----------------------------------> after each pass
//!            <----------------------------------- answer: it has arrived
//!   state (stream 0 only), end -----------------> the number of pages must agree
//!            <----------------------------------- answer: ready, or why not
//! ```
//! A chunk of RAM always travels on the same stream, so a page that is sent again arrives after its older content and no
//! pass has to wait for the slowest stream. **Invariant:** every length and address is checked before it is used (H7); what
//! is written lies in RAM, and memory that is taken is bounded by a constant.

mod choice;
mod receive;
mod record;
mod send;

pub use receive::{Received, answer, receive};
pub use record::{Opening, StreamError};
pub use send::{Pages, Sender, await_answer};

/// Pages of a chunk: 2 MiB, so that a small working set is spread over all streams.
pub const CHUNK_PAGES: u64 = 512;
/// Most streams of one move.
pub const STREAMS_MAX: u32 = 16;

/// Which stream carries a page.
#[must_use]
pub fn stream_of(page: u64, streams: u32) -> u32 {
    u32::try_from(page / CHUNK_PAGES % u64::from(streams)).expect("less than the number of streams")
}
