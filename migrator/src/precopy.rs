//! How often memory is sent again while the guest runs, and when it is halted for the rest.
//!
//! ```text
//!   after each pass:   what is left / measured pace + what the rest of the hand-over takes  =  blackout if halted now
//!   little is left                                     -> halt
//!   the passes still shrink                            -> another pass
//!   they do not, and the blackout is within the budget -> halt      the budget grows with each pass without gain
//!   they do not, and it is not                         -> slow the guest's writers down, step by step
//!   the writers are as slow as they may be             -> give up, and say which blackout would be possible
//! ```
//! The pace is bytes of pages, in whichever way they go: packed or as differences they take less than their size of the link. It is
//! that of the slower of the last two passes, so that one pass whose pages had changed little promises nothing.
//!
//! **Invariant:** the guest is halted only when the estimate is within the largest blackout that the user allows.

/// What of the blackout is not memory (drain, state, commit, activation), before anything was measured.
pub const OVERHEAD_US: u64 = 20_000;
/// Most that is taken from earlier moves: half of what is allowed unless the user says otherwise.
const OVERHEAD_US_MAX: u64 = 150_000;
/// The budget before the passes have stopped to shrink.
const BUDGET_FIRST_US: u64 = 50_000;
/// So little that another pass gains nothing.
const RUMP_BYTES: u64 = 256 << 10;
/// A pass that leaves more than this share of what the best one left gains nothing.
const GAIN_PERCENT: u64 = 90;
/// Passes without gain before the guest is slowed down.
const STALLS_MAX: u32 = 3;
/// Passes before it ends one way or the other.
const PASSES_MAX: u32 = 100;
const THROTTLE_FIRST: u8 = 20;
const THROTTLE_STEP: u8 = 20;
const THROTTLE_MAX: u8 = 99;

/// What one pass came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Bytes that went over the network.
    pub sent_bytes: u64,
    /// Bytes of the pages whose content was sent, whole or as a difference.
    pub page_bytes: u64,
    /// How long it took.
    pub took_us: u64,
    /// What was written meanwhile, and is to be sent again.
    pub left_bytes: u64,
}

/// What follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Another pass, with the guest's processors held back for this share of the time.
    Again {
        /// In percent.
        throttle: u8,
    },
    /// Halt the guest and send the rest.
    Halt,
    /// It does not come to an end.
    GiveUp(String),
}

/// Decides after each pass. See the module.
#[derive(Clone, Debug)]
pub struct Precopy {
    blackout_us_max: u64,
    overhead_us: u64,
    passes: u32,
    sent_bytes: u64,
    best_left: u64,
    stalls: u32,
    throttle: u8,
    /// Bytes per second over the network, of the last pass that was long enough to tell.
    rate: u64,
    /// Bytes of pages per second in the last two such passes, newest first.
    paces: [u64; 2],
}

impl Precopy {
    /// For a guest that may stand still for so long. `overhead_us` is what earlier moves took besides memory; it is bounded,
    /// so that slow moves in the past do not forbid all that follow.
    #[must_use]
    pub fn new(blackout_us_max: u64, overhead_us: u64) -> Self {
        Self {
            blackout_us_max,
            overhead_us: overhead_us.min(OVERHEAD_US_MAX),
            passes: 0,
            sent_bytes: 0,
            best_left: u64::MAX,
            stalls: 0,
            throttle: 0,
            rate: 0,
            paces: [0; 2],
        }
    }

    /// Passes so far.
    #[must_use]
    pub fn passes(&self) -> u32 {
        self.passes
    }

    /// Bytes of all passes.
    #[must_use]
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Bytes per second over the network.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// How long the guest would stand still if it were halted with so much left.
    #[must_use]
    pub fn estimate_us(&self, left_bytes: u64) -> u64 {
        self.overhead_us.saturating_add(time_us(left_bytes, self.pace()))
    }

    fn pace(&self) -> u64 {
        self.paces[0].min(self.paces[1])
    }

    /// Why there is no use in beginning.
    #[must_use]
    pub fn hopeless(&self) -> Option<String> {
        (self.overhead_us > self.blackout_us_max).then(|| {
            format!(
                "it would stand still for {} ms even if no memory were left to send, and {} ms are allowed",
                self.overhead_us.div_ceil(1000),
                self.blackout_us_max / 1000
            )
        })
    }

    /// Takes what a pass came to.
    pub fn after(&mut self, pass: Pass) -> Verdict {
        self.passes += 1;
        self.sent_bytes += pass.sent_bytes;
        self.measure(pass);
        let estimate = self.estimate_us(pass.left_bytes);
        if pass.left_bytes <= RUMP_BYTES && estimate <= self.blackout_us_max {
            return Verdict::Halt;
        }
        if pass.left_bytes <= self.best_left / 100 * GAIN_PERCENT {
            self.best_left = pass.left_bytes;
            self.stalls = 0;
        } else {
            self.stalls += 1;
        }
        let at_an_end = self.passes >= PASSES_MAX;
        if (self.stalls > 0 || at_an_end) && estimate <= self.budget_us(at_an_end) {
            return Verdict::Halt;
        }
        if self.stalls < STALLS_MAX && !at_an_end {
            return Verdict::Again { throttle: self.throttle };
        }
        if self.throttle >= THROTTLE_MAX || at_an_end {
            return Verdict::GiveUp(self.refusal(pass, estimate));
        }
        self.slow_down();
        Verdict::Again { throttle: self.throttle }
    }

    /// Grows with each pass without gain: a smaller blackout is not to be had.
    fn budget_us(&self, at_an_end: bool) -> u64 {
        let steps = if at_an_end { STALLS_MAX } else { self.stalls.min(STALLS_MAX) };
        let first = BUDGET_FIRST_US.min(self.blackout_us_max);
        first + (self.blackout_us_max - first) / u64::from(STALLS_MAX) * u64::from(steps)
    }

    fn slow_down(&mut self) {
        self.throttle = match self.throttle {
            0 => THROTTLE_FIRST,
            now => (now + THROTTLE_STEP).min(THROTTLE_MAX),
        };
        // What the passes left before says nothing about those that follow.
        self.stalls = 0;
        self.best_left = u64::MAX;
    }

    /// A pass of a few pages says more about the clock than about the link.
    fn measure(&mut self, pass: Pass) {
        if (pass.sent_bytes > RUMP_BYTES || self.rate == 0) && pass.took_us > 0 {
            self.rate = per_second(pass.sent_bytes, pass.took_us);
        }
        if (pass.page_bytes > RUMP_BYTES || self.paces == [0; 2]) && pass.took_us > 0 {
            let pace = per_second(pass.page_bytes, pass.took_us);
            let before = if self.paces == [0; 2] { pace } else { self.paces[0] };
            self.paces = [pace, before];
        }
    }

    fn refusal(&self, pass: Pass, estimate_us: u64) -> String {
        const MIB: u64 = 1 << 20;
        format!(
            "the guest writes {} MiB/s of pages, also when it is held back, and {} MiB/s of them arrive: it would stand still for {} ms, and {} ms are allowed",
            per_second(pass.left_bytes, pass.took_us) / MIB,
            self.pace() / MIB,
            estimate_us.div_ceil(1000),
            self.blackout_us_max / 1000,
        )
    }
}

fn time_us(bytes: u64, per_second: u64) -> u64 {
    let us = u128::from(bytes) * 1_000_000 / u128::from(per_second.max(1));
    u64::try_from(us).unwrap_or(u64::MAX)
}

fn per_second(bytes: u64, took_us: u64) -> u64 {
    u64::try_from(u128::from(bytes) * 1_000_000 / u128::from(took_us.max(1))).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const SECOND: u64 = 1_000_000;

    /// Passes of a guest that writes `writes` MiB/s, slowed down as told, into at most `set` MiB over a link of `link` MiB/s.
    fn run(ram: u64, writes: u64, set: u64, link: u64, budget_ms: u64) -> (Precopy, Verdict) {
        run_with_differences(ram, writes, set, (link, 1), budget_ms)
    }

    /// The same, where a page that is sent again takes one `part` of its size.
    fn run_with_differences(
        ram: u64,
        writes: u64,
        set: u64,
        (link, part): (u64, u64),
        budget_ms: u64,
    ) -> (Precopy, Verdict) {
        let mut precopy = Precopy::new(budget_ms * 1000, OVERHEAD_US);
        let (mut to_send, mut throttle) = (ram * MIB, 0u64);
        loop {
            let sent_bytes = if precopy.passes() == 0 { to_send } else { to_send / part };
            let took_us = (sent_bytes * SECOND / (link * MIB)).max(1);
            let rate = writes * MIB * (100 - throttle) / 100;
            let left_bytes = (u128::from(rate) * u128::from(took_us) / u128::from(SECOND))
                .min(u128::from(set * MIB))
                .try_into()
                .expect("less than the set");
            match precopy.after(Pass { sent_bytes, page_bytes: to_send, took_us, left_bytes }) {
                Verdict::Again { throttle: slower } => throttle = u64::from(slower),
                end => {
                    let within = precopy.estimate_us(left_bytes) <= budget_ms * 1000;
                    assert!(within || end != Verdict::Halt, "{precopy:?}");
                    return (precopy, end);
                }
            }
            to_send = left_bytes;
        }
    }

    #[test]
    fn an_idle_guest_is_halted_after_one_pass() {
        let (precopy, end) = run(1024, 0, 1024, 1000, 300);
        assert_eq!((precopy.passes(), end), (1, Verdict::Halt));
    }

    #[test]
    fn a_guest_that_writes_half_of_the_link_is_followed_until_little_is_left() {
        let (precopy, end) = run(1024, 500, 1024, 1000, 300);
        assert_eq!(end, Verdict::Halt);
        assert!((10..=16).contains(&precopy.passes()) && precopy.throttle == 0, "{precopy:?}");
    }

    #[test]
    fn a_small_working_set_is_sent_in_the_blackout_when_following_gains_nothing() {
        let (precopy, end) = run(1024, 5000, 16, 1000, 300);
        assert_eq!(end, Verdict::Halt);
        assert!(precopy.passes() <= 4 && precopy.throttle == 0, "{precopy:?}");
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_link_is_slowed_down_and_arrives() {
        let (precopy, end) = run(1024, 2000, 1024, 1000, 300);
        assert_eq!(end, Verdict::Halt);
        assert!(precopy.throttle >= 60, "{precopy:?}");
    }

    #[test]
    fn a_guest_that_changes_little_of_many_pages_is_followed_and_not_slowed_down() {
        let (precopy, end) = run_with_differences(1024, 2000, 512, (1000, 20), 300);
        assert_eq!(end, Verdict::Halt);
        assert!(precopy.passes() <= 6 && precopy.throttle == 0, "{precopy:?}");
    }

    #[test]
    fn one_pass_of_pages_that_had_changed_little_promises_nothing() {
        let mut precopy = Precopy::new(300_000, OVERHEAD_US);
        let pass =
            |page_bytes, sent_bytes| Pass { sent_bytes, page_bytes, took_us: SECOND, left_bytes: 100 * MIB };
        precopy.after(pass(100 * MIB, 100 * MIB));
        precopy.after(pass(1000 * MIB, 10 * MIB));
        assert_eq!(precopy.estimate_us(100 * MIB), OVERHEAD_US + SECOND);
        precopy.after(pass(1000 * MIB, 10 * MIB));
        assert_eq!(precopy.estimate_us(100 * MIB), OVERHEAD_US + SECOND / 10);
        precopy.after(pass(50 * MIB, 50 * MIB));
        assert_eq!(precopy.estimate_us(100 * MIB), OVERHEAD_US + 2 * SECOND);
    }

    #[test]
    fn what_cannot_be_done_within_the_budget_is_refused_with_the_blackout_that_it_would_take() {
        let (precopy, end) = run(1024, 500_000, 1024, 100, 300);
        let Verdict::GiveUp(why) = end else { panic!("{end:?}") };
        assert!(why.contains("300 ms are allowed") && why.contains("10260 ms"), "{why}");
        assert!(precopy.passes() < PASSES_MAX);
    }

    #[test]
    fn whatever_the_guest_writes_it_is_halted_only_within_the_budget() {
        for writes in [0, 10, 100, 900, 1500, 20_000] {
            for set in [1, 8, 64, 300, 1024] {
                for budget in [30, 100, 300, 2000] {
                    let (precopy, _) = run(1024, writes, set, 1000, budget);
                    assert!(precopy.passes() <= PASSES_MAX);
                }
            }
        }
    }
}
