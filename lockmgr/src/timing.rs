//! All times of the cluster, derived from one base value.
//!
//! ```text
//!  beat sent                                   (the holder counts from here, B1)
//!  |---------- lease_ms ----------|
//!  |--- holder_stop_ms ---|margin |            it submits nothing after holder_stop_ms
//!     beat seen                                (the others count from here)
//!     |-- dead_after_ms -->| a silent node counts as dead: its fence starts; up to dead_after_ms_max where beats are late
//!     |------------------ taker_start_ms ------------>| fence kind `lease`: reuse may start only now (B2)
//! ```
//! Death comes before the end of the lease: it takes nothing from anybody, it only starts a fence, and reuse waits for the
//! fence's confirmation (A1). Beats are allowed to be late on a loaded machine: the detector measures how late they come
//! and waits longer, and a pause of I/O while the lease is out is undone by the next renewal.
//!
//! **Invariant:** `holder_stop_ms + max_io_ms < taker_start_ms`, for every value that [`Timing::check`] accepts: where time
//! alone is the fence, the holder has stopped before anybody may take over.

use std::fmt;

/// Base of the default times: the interval of the network heartbeat.
pub const BASE_MS: u64 = 100;

/// How far two clocks may drift apart, in thousandths, rounded up (B2).
pub const DRIFT_PER_MILLE: u64 = 1;

/// The times of one cluster. All nodes use the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Interval of the heartbeat over the network.
    pub beat_ms: u64,
    /// Interval of the heartbeat on the LUN.
    pub lun_beat_ms: u64,
    /// Network silence after which a node is suspected.
    pub suspect_after_ms: u64,
    /// Silence on the network and on the LUN after which a node counts as dead, while beats come in time.
    pub dead_after_ms: u64,
    /// The longest that this grows to where beats come late.
    pub dead_after_ms_max: u64,
    /// Length of a node's lease, advertised in its heartbeat.
    pub lease_ms: u64,
    /// Safety distance to the end of a lease.
    pub margin_ms: u64,
    /// Longest time that a submitted I/O request can take to land.
    pub max_io_ms: u64,
    /// Time that a client has to answer a recall.
    pub recall_ms: u64,
    /// Time that a grant lasts before it is recalled for somebody else.
    pub hold_min_ms: u64,
    /// Time that a new coordinator waits for the clients of the old one to attach again.
    pub grace_ms: u64,
    /// Time that a fencing agent has.
    pub fence_limit_ms: u64,
}

impl Timing {
    /// The default of a cluster; tolerates a loaded machine with two cores.
    pub const DEFAULT: Self = Self::from_base(BASE_MS);

    /// Times in the default proportions to a heartbeat every `base_ms`.
    ///
    /// # Panics
    /// When `base_ms` is not from 10 to 10 000.
    #[must_use]
    pub const fn from_base(base_ms: u64) -> Self {
        assert!(base_ms >= 10 && base_ms <= 10_000, "the base of all times is from 10 ms to 10 s");
        Self {
            beat_ms: base_ms,
            lun_beat_ms: 2 * base_ms,
            suspect_after_ms: 4 * base_ms,
            dead_after_ms: 6 * base_ms,
            dead_after_ms_max: 30 * base_ms,
            lease_ms: 20 * base_ms,
            margin_ms: 2 * base_ms,
            max_io_ms: 80 * base_ms,
            recall_ms: 150 * base_ms,
            hold_min_ms: base_ms / 20,
            grace_ms: 150 * base_ms,
            fence_limit_ms: 600 * base_ms,
        }
    }

    /// How long after it sent the last renewal a holder still submits I/O: `L * (1 - rho) - margin` (B2).
    #[must_use]
    pub const fn holder_stop_ms(&self) -> u64 {
        (self.lease_ms - drift(self.lease_ms)).saturating_sub(self.margin_ms)
    }

    /// How long after it sent the last renewal a holder tells from memory what it holds. Whoever saw that renewal suspects it
    /// `suspect_after_ms` later, and may then have it fenced, long before its lease is over; the rest is for an answer that a program
    /// takes up late.
    #[must_use]
    pub const fn unsuspected_ms(&self) -> u64 {
        self.suspect_after_ms - self.suspect_after_ms / 8
    }

    /// How long after they saw the last renewal the others wait when nothing but time can fence:
    /// `L * (1 + rho) + max_io + margin` (B2). `advertised_lease_ms` is the *owner's* lease, from its heartbeat.
    #[must_use]
    pub const fn taker_start_ms(&self, advertised_lease_ms: u64) -> u64 {
        advertised_lease_ms
            .saturating_add(drift(advertised_lease_ms))
            .saturating_add(self.max_io_ms)
            .saturating_add(self.margin_ms)
    }

    /// Whether these times keep the promises above.
    ///
    /// # Errors
    /// The first inequality that does not hold.
    pub const fn check(&self) -> Result<(), TimingError> {
        if self.beat_ms == 0 || self.lun_beat_ms == 0 {
            return Err(TimingError("beat_ms and lun_beat_ms must be above 0"));
        }
        if self.beat_ms > HOUR_MS
            || self.lun_beat_ms > HOUR_MS
            || self.lease_ms > HOUR_MS
            || self.max_io_ms > HOUR_MS
        {
            return Err(TimingError("no interval may be longer than an hour"));
        }
        if self.suspect_after_ms < 3 * self.beat_ms {
            return Err(TimingError("suspect_after_ms must be at least 3 beat_ms: single beats get lost"));
        }
        if self.dead_after_ms <= self.suspect_after_ms {
            return Err(TimingError("dead_after_ms must be above suspect_after_ms"));
        }
        if self.dead_after_ms < 3 * self.lun_beat_ms {
            return Err(TimingError("dead_after_ms must be at least 3 lun_beat_ms"));
        }
        if self.holder_stop_ms() < 5 * self.beat_ms {
            return Err(TimingError("lease_ms less drift and margin_ms must last at least 5 beat_ms"));
        }
        if self.dead_after_ms_max < self.dead_after_ms {
            return Err(TimingError("dead_after_ms_max must not be below dead_after_ms"));
        }
        if self.holder_stop_ms() + self.max_io_ms >= self.taker_start_ms(self.lease_ms) {
            return Err(TimingError("margin_ms must be above 0: the holder stops before others take"));
        }
        if self.recall_ms <= self.dead_after_ms_max || self.grace_ms <= self.dead_after_ms_max {
            return Err(TimingError(
                "recall_ms and grace_ms must be above dead_after_ms_max: a dead client is found first",
            ));
        }
        if self.hold_min_ms >= self.recall_ms || self.fence_limit_ms == 0 {
            return Err(TimingError("hold_min_ms must be below recall_ms, fence_limit_ms above 0"));
        }
        Ok(())
    }
}

const HOUR_MS: u64 = 3_600_000;

/// The drift over `ms`, rounded up.
const fn drift(ms: u64) -> u64 {
    ms.saturating_mul(DRIFT_PER_MILLE).div_ceil(1000)
}

const DEFAULT: Timing = Timing::DEFAULT;
const _: () = assert!(DEFAULT.check().is_ok());
const _: () =
    assert!(DEFAULT.holder_stop_ms() + DEFAULT.max_io_ms < DEFAULT.taker_start_ms(DEFAULT.lease_ms));
const _: () = assert!(
    DEFAULT.suspect_after_ms < DEFAULT.dead_after_ms && DEFAULT.dead_after_ms_max < DEFAULT.recall_ms
);
const _: () = assert!(DRIFT_PER_MILLE >= 1);

impl Default for Timing {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Times that do not fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimingError(&'static str);

impl fmt::Display for TimingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the cluster's times do not fit together: {}", self.0)
    }
}

impl std::error::Error for TimingError {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    // Invariant B2
    #[test]
    fn a_base_of_any_size_keeps_the_holder_ahead_of_the_taker() {
        for base in (10..=10_000).step_by(7) {
            let timing = Timing::from_base(base);
            assert_eq!(timing.check(), Ok(()), "base {base}");
        }
    }

    proptest! {
        // Invariants B1, B2: whatever passes the check, the last I/O of a holder has landed before a taker starts, with
        // clocks that run up to a thousandth too fast or too slow.
        #[test]
        fn times_that_pass_the_check_are_safe(
            beat in 1..1000_u64, lease in 1..100_000_u64, margin in 0..5000_u64, max_io in 0..60_000_u64, dead in 1..200_000_u64,
        ) {
            let timing = Timing {
                beat_ms: beat, lun_beat_ms: beat, suspect_after_ms: 3 * beat, dead_after_ms: dead, dead_after_ms_max: dead,
                lease_ms: lease, margin_ms: margin, max_io_ms: max_io, recall_ms: dead + 1000, grace_ms: dead + 1000,
                ..Timing::DEFAULT
            };
            prop_assume!(timing.check().is_ok());
            // In micro-time: the holder's clock is slow (its second lasts longer), the taker's is fast.
            let stopped = timing.holder_stop_ms() * 1001;
            let landed = stopped + timing.max_io_ms * 1000;
            let taken = timing.taker_start_ms(timing.lease_ms) * 1000 - timing.taker_start_ms(timing.lease_ms);
            prop_assert!(landed <= taken + timing.max_io_ms, "{timing:?}: {landed} {taken}");
        }
    }

    #[test]
    fn times_that_contradict_each_other_are_refused_with_the_reason() {
        let error =
            Timing { dead_after_ms_max: 500, ..Timing::DEFAULT }.check().expect_err("below dead_after_ms");
        assert!(error.to_string().contains("must not be below dead_after_ms"));
        assert!(Timing { suspect_after_ms: 200, ..Timing::DEFAULT }.check().is_err());
        assert!(Timing { margin_ms: 0, max_io_ms: 0, lease_ms: 999, ..Timing::DEFAULT }.check().is_ok());
    }
}
