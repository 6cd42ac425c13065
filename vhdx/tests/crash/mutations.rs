//! The suite sees: with any one step of the protocol left out, a scenario breaks a promise.

use std::sync::Arc;

use blockio::ImageFile;
use vhdx::{Builder, Mutation};

use crate::guest::{Guest, Open, small_steps};
use crate::judge::{Effort, judge};
use crate::scenarios;

/// A scenario that passes with the whole protocol fails without `step`.
fn is_seen(scenario: fn(Open) -> Guest, open: Open) -> String {
    match judge(&scenario(open), Effort::from_environment()) {
        Ok(count) => panic!("{count} images broke no promise"),
        Err(fault) => fault,
    }
}

macro_rules! seen {
    ($name:ident, $step:ident, $scenario:ident) => {
        #[test]
        fn $name() {
            fn open(file: Arc<dyn ImageFile>) -> Builder {
                small_steps(file).without(Mutation::$step)
            }
            assert_ne!(is_seen(scenarios::$scenario, open), "");
        }
    };
}

seen!(a_flush_acknowledged_early_is_seen, AcknowledgeUnflushed, three_sessions);
seen!(a_forced_write_without_its_mapping_is_seen, TrustMapping, forced_writes);
seen!(a_header_before_its_log_is_seen, HeaderBeforeLog, three_sessions);
seen!(a_generation_in_the_live_half_is_seen, SameHalf, ends_of_generations);
seen!(an_entry_lost_between_generations_is_seen, SplitFlush, a_wide_flush);
seen!(leftovers_behind_the_end_are_seen, TrustTail, leftovers_of_a_kill);
seen!(space_reused_early_is_seen, ReuseEarly, recycled_space);
seen!(leftovers_in_recycled_space_are_seen, KeepLeftovers, recycled_space);
seen!(zeros_that_are_not_durable_are_seen, UnflushedZeros, recycled_space);
seen!(a_replay_announced_early_is_seen, UnflushedReplay, three_sessions);
seen!(a_close_announced_early_is_seen, UnflushedClose, three_sessions);
