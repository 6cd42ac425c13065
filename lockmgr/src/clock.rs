//! The clock that leases run on.
//!
//! It counts the time that the machine was suspended (B3): a lease does not outlive a suspend that it did not see.

use rustix::time::{ClockId, clock_gettime};

use crate::Millis;

/// Milliseconds since the machine was started, suspends included. The same for all processes of the machine.
#[must_use]
pub fn boottime_ms() -> Millis {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    Millis(seconds.saturating_mul(1000).saturating_add(nanos / 1_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_never_goes_back() {
        let first = boottime_ms();
        assert!(first.0 > 0 && boottime_ms() >= first);
    }
}
