//! Copies of many pages between guest RAM and a buffer, for moves: the pages are in no cache, and nobody here looks at them again.
//!
//! ```text
//!   out of RAM   a line of each of eight pages in turn: the processor fetches ahead within a page only, so that eight pages
//!                keep more of the memory busy than one
//!   into RAM     past the caches: a line that is written as a whole need not be read before
//! ```
//! What each of them gives is in benchmarks/README.md.
#![expect(unsafe_code, reason = "guest RAM is reached by raw pointers only: the guest may write at any time")]

use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_storeu_si128, _mm_stream_si128};

use super::PAGE_LEN;

/// What the processor takes from memory at once.
const LINE: usize = 64;
const LANE: usize = size_of::<__m128i>();
/// Pages that are read in turn.
const TURN: usize = 8;

/// Copies bytes out of RAM.
///
/// # Safety
/// `from` points at as many bytes as `into` has, which stay mapped meanwhile. The guest may write them.
pub(super) unsafe fn read(from: *const u8, into: &mut [u8]) {
    let (turns, rest) = into.split_at_mut(into.len() / (TURN * PAGE_LEN) * (TURN * PAGE_LEN));
    for (number, turn) in turns.chunks_exact_mut(TURN * PAGE_LEN).enumerate() {
        // SAFETY: `from` reaches as far as `into`, of which this turn is a part.
        unsafe { read_turn(from.add(number * TURN * PAGE_LEN), turn) };
    }
    // SAFETY: as above; `into` is memory of this process, and RAM is not.
    unsafe { std::ptr::copy_nonoverlapping(from.add(turns.len()), rest.as_mut_ptr(), rest.len()) };
}

/// # Safety
/// As for [`read`]; `into` has the length of a turn.
unsafe fn read_turn(from: *const u8, into: &mut [u8]) {
    assert_eq!(into.len(), TURN * PAGE_LEN);
    let into = into.as_mut_ptr();
    for line in (0..PAGE_LEN).step_by(LINE) {
        for page in 0..TURN {
            for lane in (0..LINE).step_by(LANE) {
                let at = page * PAGE_LEN + line + lane;
                // SAFETY: `at` is less than the length of a turn by a lane at least, and both have that length.
                unsafe { _mm_storeu_si128(into.add(at).cast(), _mm_loadu_si128(from.add(at).cast())) };
            }
        }
    }
}

/// Copies whole pages into RAM.
///
/// # Safety
/// `to` points at as many bytes as `pages` has, which stay mapped meanwhile. The guest may use them.
pub(super) unsafe fn write(to: *mut u8, pages: &[u8]) {
    assert!(to.addr().is_multiple_of(PAGE_LEN) && pages.len().is_multiple_of(PAGE_LEN));
    let from = pages.as_ptr();
    for at in (0..pages.len()).step_by(LANE) {
        // SAFETY: a page is a whole number of lanes, so both reach a lane further than `at`; `to` is aligned for it.
        unsafe { _mm_stream_si128(to.add(at).cast(), _mm_loadu_si128(from.add(at).cast())) };
    }
    // Such stores are in no order with others: who hears that the pages are there shall find them there.
    // SAFETY: every processor of this kind has the instruction, and it touches no memory.
    unsafe { _mm_sfence() };
}
