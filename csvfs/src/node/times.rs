//! Times that this node gives to files that it changes.
//!
//! A change is as late as the last tick of the kernel's clock, as on Linux's own filesystems: of changes that nobody looks at in
//! between all but the first leave the time as it is, and an `fsync` after them has nothing to record but the data. What was told to
//! somebody is never told again of a later change: that one gets the time to the nanosecond.
//!
//! **Invariant:** what this node changes after it told or was told a time, of whatever file, is not older than that, unless its
//! clock was set back or another node's is ahead.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::time::{ClockId, clock_gettime};

use super::Attr;
use crate::proto::Timestamp;

const SECOND: u64 = 1_000_000_000;
/// Longest tick of a kernel's clock (`CONFIG_HZ=100`), twice: a time that is further ahead of it is of a clock that was set back.
const AHEAD_MAX: u64 = 20_000_000;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Times {
    /// Nanoseconds since the epoch: the last time that somebody was told.
    told: AtomicU64,
}

impl Times {
    /// The time to the nanosecond.
    pub(super) fn now(&self) -> Timestamp {
        let now = nanos_of(ClockId::Realtime);
        self.told.fetch_max(now, Ordering::Relaxed);
        stamp(now)
    }

    /// The time as of the last tick, or when somebody was told a time since.
    pub(super) fn tick(&self) -> Timestamp {
        let tick = nanos_of(ClockId::RealtimeCoarse);
        let told = self.told.load(Ordering::Relaxed);
        stamp(if told > tick && told - tick < AHEAD_MAX { told } else { tick })
    }

    /// Somebody else has given this time to a file.
    pub(super) fn heard_of(&self, time: Timestamp) {
        let Ok(seconds) = u64::try_from(time.seconds) else { return };
        let nanos = seconds.saturating_mul(SECOND).saturating_add(time.nanos.into());
        if nanos > self.told.load(Ordering::Relaxed) && nanos <= nanos_of(ClockId::Realtime) {
            self.told.fetch_max(nanos, Ordering::Relaxed);
        }
    }

    /// The time of a change of what has these attributes; none when it stays: `untold` is the time of the last change, and nobody
    /// was told of that.
    pub(super) fn of_change(&self, attr: &Attr, untold: Option<Timestamp>) -> Option<Timestamp> {
        next(attr, untold, self.tick(), || self.now())
    }
}

fn next(
    attr: &Attr,
    untold: Option<Timestamp>,
    tick: Timestamp,
    now: impl FnOnce() -> Timestamp,
) -> Option<Timestamp> {
    if tick.order() > attr.mtime.later(attr.ctime).order() {
        return Some(tick);
    }
    // Set by hand, or by another change, they are somebody's.
    let stays = untold.is_some_and(|untold| untold == attr.mtime && untold == attr.ctime);
    (!stays).then(now)
}

fn nanos_of(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(SECOND).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

fn stamp(nanos: u64) -> Timestamp {
    Timestamp {
        seconds: i64::try_from(nanos / SECOND).unwrap_or(i64::MAX),
        nanos: u32::try_from(nanos % SECOND).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto as pb;

    const TICK: Timestamp = Timestamp { seconds: 10, nanos: 4_000_000 };
    const NOW: Timestamp = Timestamp { seconds: 10, nanos: 7_654_321 };
    const BEFORE: Timestamp = Timestamp { seconds: 10, nanos: 3_999_999 };
    const LATER: Timestamp = Timestamp { seconds: 99, nanos: 0 };

    fn at(mtime: Timestamp, ctime: Timestamp) -> Attr {
        let kind = pb::FileKind::Regular.into();
        let wire = pb::Attr { ino: 1, kind, mtime: Some(mtime), ctime: Some(ctime), ..pb::Attr::default() };
        Attr::checked(&wire).expect("a file")
    }

    #[test]
    fn a_change_keeps_the_time_of_one_that_nobody_was_told_of_until_the_next_tick() {
        let next = |attr, untold| next(&attr, untold, TICK, || NOW);
        assert_eq!(next(at(BEFORE, BEFORE), None), Some(TICK));
        assert_eq!(next(at(BEFORE, BEFORE), Some(BEFORE)), Some(TICK));
        assert_eq!(next(at(TICK, TICK), Some(TICK)), None);
        assert_eq!(next(at(TICK, TICK), None), Some(NOW), "somebody was told");
        assert_eq!(next(at(TICK, NOW), Some(TICK)), Some(NOW), "another attribute was changed since");
        assert_eq!(next(at(LATER, TICK), Some(TICK)), Some(NOW), "somebody has set it, to the future");
        assert_eq!(next(at(LATER, LATER), None), Some(NOW));
    }

    #[test]
    fn no_tick_is_older_than_what_somebody_was_told() {
        let times = Times::default();
        for _ in 0..10_000 {
            let told = times.now();
            let tick = times.tick();
            assert!(tick.order() >= told.order(), "{tick:?} after {told:?}");
        }
        let elsewhere = stamp(nanos_of(ClockId::Realtime));
        times.heard_of(elsewhere);
        assert!(times.tick().order() >= elsewhere.order());
    }

    #[test]
    fn a_time_of_the_future_and_one_before_a_clock_was_set_back_do_not_count() {
        let times = Times::default();
        let hour = 3_600 * SECOND;
        times.heard_of(stamp(nanos_of(ClockId::Realtime) + hour));
        times.heard_of(Timestamp { seconds: -5, nanos: 0 });
        let tick = times.tick();
        assert!(tick.order() <= times.now().order(), "{tick:?} is to come");
        times.told.store(nanos_of(ClockId::Realtime) + hour, Ordering::Relaxed);
        let tick = times.tick();
        assert!(tick.order() <= times.now().order(), "{tick:?} is to come");
    }
}
