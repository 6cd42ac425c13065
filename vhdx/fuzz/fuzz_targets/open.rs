//! The target `open` under libFuzzer.
#![no_main]
#![allow(dead_code, reason = "the modules are shared with the tests")]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/hostile/damage.rs"]
mod damage;
#[path = "../../tests/slow/mod.rs"]
mod slow;
#[path = "../../tests/targets/mod.rs"]
mod targets;
#[path = "../../tests/hostile/trial.rs"]
mod trial;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::open(data));
