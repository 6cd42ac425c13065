//! A power cut at any moment loses nothing that a flush acknowledged, shows nobody foreign bytes, and leaves a sound image.
//!
//! ```text
//! scenario -> guest (requests, promises) -> recorder (all that reaches the file) -> judge (every cut, many images each)
//! ```
//! Everything that reaches the file is recorded. For each prefix of the record images are built with none, all, some or
//! torn parts of what was not flushed, and each is opened, replayed and compared with what the guest was promised, by this
//! crate, by the second reader, and now and then by qemu. `VHDX_CRASH_EFFORT=20 cargo test -p vhdx --test crash` tries more.
//!
//! With the feature `mutations` the suite also proves that it sees: each step of the protocol that is left out must make a
//! scenario fail.

mod chains;
#[path = "../common/mod.rs"]
mod common;
mod foreign;
mod guest;
mod judge;
#[cfg(feature = "mutations")]
mod mutations;
mod scenarios;
#[path = "../slow/mod.rs"]
mod slow;
mod stage;

use guest::{Guest, Open, small_steps};
use judge::{Effort, judge};

/// Plays a scenario and judges at least `images` images.
fn survives(scenario: fn(Open) -> Guest, images: usize) {
    match judge(&scenario(small_steps), Effort::from_environment()) {
        Ok(count) => assert!(count >= images, "only {count} images were judged"),
        Err(fault) => panic!("{fault}"),
    }
}

// Invariants C2, C5, D1, D2, D3: mapping after data, acknowledged after both, idempotent replay.
#[test]
fn no_power_cut_loses_what_was_flushed() {
    survives(scenarios::three_sessions, 500);
}

#[test]
fn no_power_cut_at_the_end_of_a_log_generation_loses_anything() {
    survives(scenarios::ends_of_generations, 500);
}

#[test]
fn unflushed_payload_of_a_killed_session_is_never_shown_in_another_block() {
    survives(scenarios::leftovers_of_a_kill, 100);
}

// Invariant C7: freed space is not reused before what freed it is durable.
#[test]
fn space_of_a_discarded_block_goes_to_nobody_before_the_discard_is_durable() {
    survives(scenarios::recycled_space, 200);
}

#[test]
fn a_forced_write_is_durable_when_it_is_acknowledged() {
    survives(scenarios::forced_writes, 200);
}

#[test]
fn a_flush_of_more_pages_than_the_ring_holds_is_durable_when_it_is_acknowledged() {
    survives(scenarios::a_wide_flush, 200);
}

#[test]
fn a_resize_is_done_or_not_begun_wherever_it_is_cut() {
    survives(scenarios::resized_disk, 200);
}

#[test]
fn blocks_that_move_are_in_one_place_or_the_other() {
    survives(scenarios::compacted_disk, 200);
}

// Invariants C2, C3, C5: bits and states only after the bytes that they uncover, acknowledged after both.
#[test]
fn no_power_cut_shows_a_child_other_bytes_than_its_guests_or_its_parents() {
    survives(chains::child_sessions, 500);
}

#[test]
fn a_child_that_shrank_and_grew_never_shows_what_it_lost_nor_its_parent() {
    survives(chains::resized_child, 200);
}

#[test]
fn blocks_of_a_child_that_move_are_in_one_place_or_the_other() {
    survives(chains::compacted_child, 200);
}

#[test]
fn a_snapshot_is_made_or_not_begun_wherever_it_is_cut() {
    survives(chains::snapshots, 500);
}

#[test]
fn a_merge_into_a_shorter_parent_loses_nothing_wherever_it_is_cut() {
    survives(chains::merged_child, 200);
}

#[test]
fn a_merge_below_a_guest_loses_nothing_wherever_it_is_cut() {
    survives(chains::merged_in_use, 200);
}

// Invariant G1: the table moves with one log entry, or not at all.
#[test]
fn a_table_that_moves_is_in_one_place_or_the_other() {
    survives(chains::moved_table, 50);
}
