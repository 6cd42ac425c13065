//! The clock of a PC (MC146818): the date and time of day, read from the host.
//!
//! Only what a kernel needs at boot: time in BCD, 24 hours, a battery that is never empty. Alarms and periodic interrupts
//! are not there, and setting the time changes nothing: a guest that needs another one keeps it itself. So the only state
//! is the selected register, and the time is right at once after a VM was restored.

use std::sync::atomic::{AtomicU8, Ordering};

/// Port that selects a register; the next one reads it.
pub(crate) const RTC_PORT: u16 = 0x70;
/// Its interrupt line, which never rises.
pub(crate) const RTC_LINE: u32 = 8;

const STATUS_A: u8 = 10;
const STATUS_B: u8 = 11;
const STATUS_D: u8 = 13;
const CENTURY: u8 = 0x32;
/// 32768 Hz, the default divider; no update is ever in progress.
const DIVIDER: u8 = 0x26;
const HOURS_24: u8 = 2;
const BATTERY_GOOD: u8 = 0x80;
const SELECT_MASK: u8 = 0x7f;

/// The device.
#[derive(Debug, Default)]
pub(crate) struct Rtc {
    selected: AtomicU8,
}

impl Rtc {
    pub(crate) fn select(&self, register: u8) {
        self.selected.store(register & SELECT_MASK, Ordering::Relaxed);
    }

    pub(crate) fn selected(&self) -> u8 {
        self.selected.load(Ordering::Relaxed)
    }

    /// Reads the selected register.
    pub(crate) fn read(&self) -> u8 {
        read_register(self.selected(), seconds_now())
    }
}

#[expect(clippy::disallowed_methods, reason = "this device is a wall clock")]
fn seconds_now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// A register at a time in seconds since 1970.
fn read_register(register: u8, seconds: u64) -> u8 {
    let date = Date::of_day(seconds / 86_400);
    let value = match register {
        0 => seconds % 60,
        2 => seconds / 60 % 60,
        4 => seconds / 3600 % 24,
        6 => (seconds / 86_400 + 4) % 7 + 1, // 1970 began on a Thursday; Sunday is 1
        7 => date.day,
        8 => date.month,
        9 => date.year % 100,
        CENTURY => date.year / 100,
        STATUS_A => return DIVIDER,
        STATUS_B => return HOURS_24,
        STATUS_D => return BATTERY_GOOD,
        _ => return 0,
    };
    bcd(value)
}

fn bcd(value: u64) -> u8 {
    u8::try_from(value / 10 % 10 * 16 + value % 10).expect("two digits")
}

/// A day of the Gregorian calendar.
struct Date {
    year: u64,
    month: u64,
    day: u64,
}

impl Date {
    /// Counts in years that begin in March, so that the day which comes and goes is the last one.
    fn of_day(days_since_1970: u64) -> Self {
        let days = days_since_1970 + 719_468;
        let (era, day_of_era) = (days / 146_097, days % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        Self { year: era * 400 + year_of_era + u64::from(month <= 2), month, day }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(seconds: u64) -> String {
        let digits: Vec<_> = [CENTURY, 9, 8, 7, 4, 2, 0]
            .iter()
            .map(|r| format!("{:02x}", read_register(*r, seconds)))
            .collect();
        digits.join("")
    }

    #[test]
    fn the_clock_shows_the_date_and_time_of_day() {
        assert_eq!(shown(0), "19700101000000");
        assert_eq!(shown(951_782_399), "20000228235959");
        assert_eq!(shown(951_782_400), "20000229000000");
        assert_eq!(shown(1_709_251_199), "20240229235959");
        assert_eq!(shown(4_102_444_799), "20991231235959");
        assert_eq!(read_register(6, 1_709_164_800), 5, "29 February 2024 was a Thursday");
    }

    #[test]
    fn a_register_that_is_not_there_reads_zero() {
        let rtc = Rtc::default();
        rtc.select(0xff);
        assert_eq!((rtc.selected(), rtc.read()), (0x7f, 0));
        rtc.select(STATUS_D);
        assert_eq!(rtc.read(), BATTERY_GOOD);
    }
}
