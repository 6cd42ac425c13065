//! Images that somebody shaped to do harm: nothing panics, nothing grows beyond what the file's size justifies, reading
//! never writes, and whatever is accepted is sound and read by the second reader alike.
//!
//! ```text
//! seed -> a good image -> a few damages, checksums made right again -> open for reading, check, open for writing, use
//! ```
//! Runs of fixed seeds and one fresh seed, which a failure names. `VHDX_HOSTILE_CASES` multiplies the number of cases,
//! `VHDX_HOSTILE_SEED` repeats one seed alone. Everything runs in a process of its own whose address space is bounded, so
//! that memory taken on the word of a header ends the test.
//!
//! The fuzz targets run here too, on what is in `fuzz/corpus/` and on inputs made from the same seeds; see `fuzz/README.md`.

#[path = "../common/mod.rs"]
mod common;
mod damage;
mod drive;
#[path = "../slow/mod.rs"]
mod slow;
#[path = "../targets/mod.rs"]
mod targets;
mod trial;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::process::Command;

use damage::{Base, Kind};

/// Set in the bounded process.
const CHILD: &str = "VHDX_HOSTILE_CHILD";
/// KiB of address space: threads, the test program, and no more than a few images.
const ADDRESS_SPACE_KIB: u64 = 1 << 20;
const CASES: u64 = 1500;
/// Inputs of each fuzz target, those that play requests excepted.
const INPUTS: u64 = 400;
/// Inputs of those that open chains.
const FAMILIES: u64 = 120;
/// Inputs of the target that plays requests.
const SEQUENCES: u64 = 60;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Runs the calling test again in a process with bounded memory, or `cases` if this is that process.
fn bounded(test: &str, cases: impl FnOnce()) {
    if std::env::var_os(CHILD).is_some() {
        return cases();
    }
    let program = std::env::current_exe().expect("the test program has a path");
    let limited = format!("ulimit -v {ADDRESS_SPACE_KIB} && exec \"$0\" --exact {test} --nocapture");
    let output = Command::new("sh")
        .args(["-c", &limited])
        .arg(program)
        .env(CHILD, "1")
        .env("MALLOC_ARENA_MAX", "2")
        .output();
    let output = output.expect("sh starts");
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// A fixed seed and a fresh one, or the one that is to be repeated.
fn seeds() -> Vec<u64> {
    let fresh = RandomState::new().build_hasher().finish();
    variable("VHDX_HOSTILE_SEED").map_or_else(|| vec![1, fresh], |seed| vec![seed])
}

fn run_cases(kind: Kind) {
    let bases = Base::all();
    let cases = CASES * variable("VHDX_HOSTILE_CASES").unwrap_or(1);
    let mut accepted = 0;
    for seed in seeds() {
        for case in 0..cases {
            let why = format!("{kind:?}, VHDX_HOSTILE_SEED={seed}, case {case}");
            let damaged = damage::damaged(&bases, kind, seed, case);
            accepted += u64::from(trial::try_image(&damaged, &why));
        }
    }
    assert!(accepted > 0, "some damage is harmless; were these images good before?");
}

#[test]
fn damaged_headers_do_no_harm() {
    bounded("damaged_headers_do_no_harm", || run_cases(Kind::Headers));
}

#[test]
fn damaged_region_tables_do_no_harm() {
    bounded("damaged_region_tables_do_no_harm", || run_cases(Kind::Regions));
}

#[test]
fn damaged_metadata_does_no_harm() {
    bounded("damaged_metadata_does_no_harm", || run_cases(Kind::Metadata));
}

#[test]
fn damaged_block_tables_do_no_harm() {
    bounded("damaged_block_tables_do_no_harm", || run_cases(Kind::Bat));
}

#[test]
fn damaged_logs_do_no_harm() {
    bounded("damaged_logs_do_no_harm", || run_cases(Kind::Log));
}

#[test]
fn damage_anywhere_does_no_harm() {
    bounded("damage_anywhere_does_no_harm", || run_cases(Kind::Anything));
}

#[test]
fn no_input_of_the_target_open_does_harm() {
    bounded("no_input_of_the_target_open_does_harm", || drive::drive("open", targets::open, INPUTS, 120));
}

#[test]
fn no_input_of_the_target_replay_does_harm() {
    bounded("no_input_of_the_target_replay_does_harm", || {
        drive::drive("replay", targets::replay, INPUTS, 120);
    });
}

#[test]
fn no_input_of_the_target_locator_does_harm() {
    bounded("no_input_of_the_target_locator_does_harm", || {
        drive::drive("locator", targets::locator, FAMILIES, 80);
    });
}

#[test]
fn no_input_of_the_target_chain_does_harm() {
    bounded("no_input_of_the_target_chain_does_harm", || drive::drive("chain", targets::chain, FAMILIES, 24));
}

// Invariant: a chain of images behaves as a byte array, whatever is asked of it and in whatever order.
#[test]
fn no_sequence_of_requests_makes_a_disk_differ_from_a_byte_array() {
    bounded("no_sequence_of_requests_makes_a_disk_differ_from_a_byte_array", || {
        drive::drive("sequence", targets::sequence, SEQUENCES, 260);
    });
}
