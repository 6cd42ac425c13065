//! Records and Raft messages from anywhere.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lockmgr::cluster::fuzz::feed(bytes));
