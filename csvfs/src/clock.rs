//! The clocks of the coordinator's edge, as a trait so that tests own the time.
//!
//! **Invariant:** deadlines use the clock that counts suspend (BOOTTIME); the wall clock only dates files.

use lockmgr::Millis;
use rustix::time::{ClockId, clock_gettime};

use crate::proto::Timestamp;

/// Where a coordinator gets the time from.
pub trait Clock: Send + Sync {
    /// Now, on a clock that never goes back and counts suspend.
    fn now(&self) -> Millis;
    /// Now, for the times of files.
    fn wall(&self) -> Timestamp;
}

/// The machine's clocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Millis {
        let t = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(t.tv_sec).unwrap_or(0);
        let ms = u64::try_from(t.tv_nsec).unwrap_or(0) / 1_000_000;
        Millis(seconds.saturating_mul(1000).saturating_add(ms))
    }

    fn wall(&self) -> Timestamp {
        wall()
    }
}

/// The wall clock.
pub(crate) fn wall() -> Timestamp {
    let t = clock_gettime(ClockId::Realtime);
    Timestamp { seconds: t.tv_sec, nanos: u32::try_from(t.tv_nsec).unwrap_or(0) }
}
