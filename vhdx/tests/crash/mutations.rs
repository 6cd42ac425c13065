//! The suite sees: with any one step of the protocol left out, a scenario breaks a promise.

use std::sync::Arc;

use blockio::ImageFile;
use vhdx::{Builder, Mutation};

use crate::guest::{Guest, Open, small_steps};
use crate::judge::{Effort, judge};
use crate::{chains, scenarios};

/// A scenario that passes with the whole protocol fails without a step.
fn is_seen(scenario: fn(Open) -> Guest, open: Open, effort: Effort) -> String {
    match judge(&scenario(open), effort) {
        Ok(count) => panic!("{count} images broke no promise"),
        Err(fault) => fault,
    }
}

macro_rules! seen {
    ($name:ident, $step:ident, $scenario:expr) => {
        seen!($name, $step, $scenario, Effort::from_environment());
    };
    ($name:ident, $step:ident, $scenario:expr, $effort:expr) => {
        #[test]
        fn $name() {
            fn open(file: Arc<dyn ImageFile>) -> Builder {
                small_steps(file).without(Mutation::$step)
            }
            assert_ne!(is_seen($scenario, open, $effort), "");
        }
    };
}

seen!(a_flush_acknowledged_early_is_seen, AcknowledgeUnflushed, scenarios::three_sessions);
seen!(a_forced_write_without_its_mapping_is_seen, TrustMapping, scenarios::forced_writes);
seen!(a_header_before_its_log_is_seen, HeaderBeforeLog, scenarios::three_sessions);
seen!(a_generation_in_the_live_half_is_seen, SameHalf, scenarios::ends_of_generations);
seen!(an_entry_lost_between_generations_is_seen, SplitFlush, scenarios::a_wide_flush);
seen!(leftovers_behind_the_end_are_seen, TrustTail, scenarios::leftovers_of_a_kill);
seen!(space_reused_early_is_seen, ReuseEarly, scenarios::recycled_space);
seen!(leftovers_in_recycled_space_are_seen, KeepLeftovers, scenarios::recycled_space);
seen!(zeros_that_are_not_durable_are_seen, UnflushedZeros, scenarios::recycled_space);
seen!(a_replay_announced_early_is_seen, UnflushedReplay, scenarios::three_sessions);
seen!(a_close_announced_early_is_seen, UnflushedClose, scenarios::three_sessions);
seen!(sectors_of_a_child_that_count_early_are_seen, SkipBarrier, chains::child_sessions);
seen!(a_name_before_its_entry_is_seen, NameBeforeEntry, scenarios::resized_disk);
seen!(a_table_named_by_one_region_table_is_seen, OneRegionTable, chains::moved_table);
seen!(a_block_that_counts_early_at_its_new_place_is_seen, UnflushedMove, scenarios::compacted_disk);
seen!(a_merge_that_the_child_does_not_know_of_is_seen, UnannouncedMerge, chains::merged_child);
seen!(headers_that_are_damaged_together_are_seen, HeadersTogether, scenarios::three_sessions);
seen!(a_change_announced_early_is_seen, UnflushedChange, a_change_behind_its_headers, Effort::times(16));

/// Three of the pages that change matter: behind each header enough mixtures are tried that one of them is a table nobody can
/// read. The other cuts show nothing of it.
fn a_change_behind_its_headers(open: Open) -> Guest {
    let mut guest = chains::moved_table(open);
    guest.judged_every = u64::MAX;
    guest
}
