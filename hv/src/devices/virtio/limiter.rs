//! How much a disk may do in a second. Pure: the time is passed in.
//!
//! ```text
//!   owed until ----|        a request moves "owed until" on by its cost; it may start while that is less than BURST ahead
//!         now ---|
//! ```
//! **Invariant:** over any span the disk does at most rate x span + one burst + one request.

use std::time::Duration;

/// What may be done at once after a pause.
const BURST: Duration = Duration::from_millis(50);
const NS_PER_S: u128 = 1_000_000_000;

/// Limits of one disk; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskLimits {
    /// Requests in a second.
    pub iops: u64,
    /// Bytes read and written in a second.
    pub bytes_per_second: u64,
}

impl DiskLimits {
    /// Whether there is any.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// The state of both limits.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    limits: DiskLimits,
    requests: Meter,
    bytes: Meter,
}

#[derive(Debug, Default)]
struct Meter {
    owed_until_ns: u128,
}

impl Limiter {
    /// Sets new limits. What is owed by the old ones is forgiven.
    pub(super) fn set(&mut self, limits: DiskLimits) {
        *self = Self { limits, ..Self::default() };
    }

    pub(super) fn limits(&self) -> DiskLimits {
        self.limits
    }

    /// How long the next request has to wait.
    pub(super) fn wait(&self, now: Duration) -> Option<Duration> {
        self.requests.wait(now).max(self.bytes.wait(now))
    }

    /// A request of so many bytes starts.
    pub(super) fn charge(&mut self, now: Duration, bytes: u64) {
        self.requests.charge(now, 1, self.limits.iops);
        self.bytes.charge(now, bytes, self.limits.bytes_per_second);
    }
}

impl Meter {
    fn wait(&self, now: Duration) -> Option<Duration> {
        let early = self.owed_until_ns.checked_sub((now + BURST).as_nanos())?;
        (early > 0).then(|| Duration::from_nanos(u64::try_from(early).unwrap_or(u64::MAX)))
    }

    fn charge(&mut self, now: Duration, units: u64, per_second: u64) {
        if per_second > 0 {
            let cost = u128::from(units) * NS_PER_S / u128::from(per_second);
            self.owed_until_ns = self.owed_until_ns.max(now.as_nanos()) + cost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests that a greedy guest gets through in `span`.
    fn done_in(span: Duration, limits: DiskLimits, bytes: u64) -> u64 {
        let mut limiter = Limiter::default();
        limiter.set(limits);
        let (mut now, mut done) = (Duration::ZERO, 0);
        while now < span {
            match limiter.wait(now) {
                Some(wait) => now += wait,
                None => {
                    limiter.charge(now, bytes);
                    done += 1;
                }
            }
        }
        done
    }

    #[test]
    fn a_greedy_guest_gets_its_rate_and_no_more() {
        let span = Duration::from_secs(10);
        let iops = DiskLimits { iops: 100, bytes_per_second: 0 };
        assert!((1000..=1007).contains(&done_in(span, iops, 4096)), "{}", done_in(span, iops, 4096));
        let bytes = DiskLimits { iops: 0, bytes_per_second: 1 << 20 };
        assert!((160..=162).contains(&done_in(span, bytes, 1 << 16)), "{}", done_in(span, bytes, 1 << 16));
        let both = DiskLimits { iops: 100, bytes_per_second: 1 << 20 };
        assert_eq!(done_in(span, both, 1 << 16), done_in(span, bytes, 1 << 16), "the tighter one counts");
    }

    #[test]
    fn a_pause_earns_one_burst_and_not_more() {
        let mut limiter = Limiter::default();
        limiter.set(DiskLimits { iops: 1000, bytes_per_second: 0 });
        let later = Duration::from_secs(3600);
        let burst = (0..)
            .take_while(|_| {
                limiter.wait(later).is_none() && {
                    limiter.charge(later, 0);
                    true
                }
            })
            .count();
        assert!(burst <= 51, "{burst}");
    }

    #[test]
    fn without_limits_nothing_waits() {
        let mut limiter = Limiter::default();
        limiter.set(DiskLimits { iops: 1, bytes_per_second: 1 });
        limiter.charge(Duration::ZERO, u64::MAX);
        assert!(limiter.wait(Duration::ZERO).is_some());
        limiter.set(DiskLimits::default());
        limiter.charge(Duration::ZERO, u64::MAX);
        assert_eq!(limiter.wait(Duration::ZERO), None);
    }
}
