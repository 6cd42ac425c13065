//! The memory stream of a live move: RAM and the last state, over as many connections as both sides have cores.
//!
//! ```text
//!   source                                        target
//!   opening  -----------------------------------> which move, which of how many streams      record::Opening
//!   pages, plain or packed, zeros, deltas ... --> into RAM, in the order of this stream
//!   mark     -----------------------------------> after each pass
//!            <----------------------------------- answer: it has arrived
//!   state (stream 0 only), end -----------------> the number of pages must agree
//!            <----------------------------------- answer: ready, or why not
//! ```
//! A chunk of RAM always travels on the same stream, so a page that is sent again arrives after its older content and no
//! pass has to wait for the slowest stream, and what this stream has sent of a page is what the target has: the page can go as the
//! difference to that. **Invariant:** every length and address is checked before it is used (H7); what
//! is written lies in RAM, and memory that is taken is bounded by a constant.

mod choice;
mod delta;
mod differences;
mod receive;
mod record;
mod remembered;
mod send;

pub use receive::{Received, answer, receive};
pub use record::{Opening, StreamError};
pub use send::{Pages, Sender, Sent};

/// Pages of a chunk: 2 MiB, so that a small working set is spread over all streams.
pub const CHUNK_PAGES: u64 = 512;
/// Most streams of one move.
pub const STREAMS_MAX: u32 = 16;
/// What the source of one move remembers at most of the pages that it has sent, in bytes. Pages that are not remembered go whole.
pub const REMEMBERED_BYTES_MAX: u64 = 256 << 20;

/// Which stream carries a page.
#[must_use]
pub fn stream_of(page: u64, streams: u32) -> u32 {
    u32::try_from(page / CHUNK_PAGES % u64::from(streams)).expect("less than the number of streams")
}
