//! What is fuzzed: functions that take bytes and panic when a promise is broken.
//!
//! | target | bytes are | promise |
//! |---|---|---|
//! | [`open`] | damages of a good image | nothing panics or grows, reading never writes, what is accepted is sound |
//! | [`replay`] | the ring of a log | the same; both readers replay alike |
//! | [`locator`] | a parent locator | no file outside of the allowed folder is asked for; no loop, no long work |
//! | [`chain`] | damages of three images that refer to each other | the same |
//! | [`sequence`] | requests to a disk | it behaves as a byte array, through snapshots, merges, resizes and reopens |
//!
//! The same functions are called with seeds by the tests and, under a fuzzer, by the crate in `fuzz/`.

mod feed;
mod images;
mod lineage;
mod sequence;

pub(crate) use images::{open, replay};
pub(crate) use lineage::{chain, locator};
pub(crate) use sequence::sequence;
