//! How much to allocate at once, and what to give back.
//!
//! A file that grows gets room ahead, twice as much each time, so that a long copy costs few round trips. What was
//! allocated ahead and not needed is given back when the file is closed or the grant goes.

use super::map::block_ceil;

const GROW_BYTES_MIN: u64 = 1 << 20;
const GROW_BYTES_MAX: u64 = 64 << 20;
/// Writes into holes at random places also get more than they need, but only once there were several of them.
const SCATTER_BYTES_MIN: u64 = 4096;
const SCATTER_BYTES_MAX: u64 = 1 << 20;

/// What allocations of one file there were under this grant.
#[derive(Clone, Copy, Debug)]
pub(super) struct Growth {
    /// End of the newest allocation.
    last_end: u64,
    grow_bytes: u64,
    scatter_bytes: u64,
    ahead: bool,
    /// Space below this was asked for and stays, also beyond the end of the file.
    keep_below: u64,
}

impl Default for Growth {
    fn default() -> Self {
        Self {
            last_end: 0,
            grow_bytes: GROW_BYTES_MIN,
            scatter_bytes: SCATTER_BYTES_MIN,
            ahead: false,
            keep_below: 0,
        }
    }
}

impl Growth {
    /// How many bytes to ask for where `need` are needed at `offset`. `beyond_end`: the file grows there; `map_end` is
    /// where its last extent ends.
    pub(super) fn want(&mut self, offset: u64, need: u64, beyond_end: bool, map_end: u64) -> u64 {
        let sequential = offset == self.last_end && offset > 0;
        let want = if beyond_end {
            if !self.ahead {
                self.keep_below = self.keep_below.max(map_end);
                self.ahead = true;
            }
            self.next_grow(sequential)
        } else if sequential {
            self.next_grow(true)
        } else {
            self.next_scatter()
        };
        want.max(need)
    }

    /// How far to reach beyond `need` bytes at `offset` with blocks of the pool. They cost no message, so only what grows in
    /// order gets room ahead: there it keeps the file in one piece.
    pub(super) fn reach(&mut self, offset: u64, need: u64, beyond_end: bool) -> u64 {
        let sequential = offset == self.last_end && offset > 0;
        let want = if beyond_end || sequential { self.next_grow(sequential) } else { need };
        want.max(need)
    }

    fn next_grow(&mut self, sequential: bool) -> u64 {
        if !sequential {
            self.grow_bytes = GROW_BYTES_MIN;
        }
        let want = self.grow_bytes;
        self.grow_bytes = (want * 2).min(GROW_BYTES_MAX);
        want
    }

    fn next_scatter(&mut self) -> u64 {
        let want = self.scatter_bytes;
        self.scatter_bytes = (want * 2).min(SCATTER_BYTES_MAX);
        want
    }

    pub(super) fn allocated_to(&mut self, end: u64) {
        self.last_end = end;
    }

    /// Space up to `end` was asked for by the user.
    pub(super) fn keep(&mut self, end: u64) {
        self.keep_below = self.keep_below.max(end);
    }

    /// From where on to give back, in a file of `size` bytes whose last extent ends at `map_end`.
    pub(super) fn trim_from(&self, size: u64, map_end: u64) -> Option<u64> {
        let from = block_ceil(size).max(self.keep_below);
        (self.ahead && from < map_end).then_some(from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequential_growth_doubles_up_to_the_limit() {
        let mut growth = Growth::default();
        let mut at = 0;
        let mut asked = Vec::new();
        for _ in 0..9 {
            let want = growth.want(at, 4096, true, at);
            asked.push(want >> 20);
            at += want;
            growth.allocated_to(at);
        }
        assert_eq!(asked, [1, 2, 4, 8, 16, 32, 64, 64, 64]);
    }

    #[test]
    fn scattered_writes_stay_small_at_first() {
        let mut growth = Growth::default();
        assert_eq!(growth.want(10 << 20, 4096, false, 0), 4096);
        assert_eq!(growth.want(30 << 20, 4096, false, 0), 8192);
    }

    #[test]
    fn only_what_was_allocated_ahead_is_given_back() {
        let mut growth = Growth::default();
        assert_eq!(growth.trim_from(100, 1 << 20), None);
        growth.want(0, 4096, true, 0);
        assert_eq!(growth.trim_from(100, 1 << 20), Some(4096));
        growth.keep(8192);
        assert_eq!(growth.trim_from(100, 1 << 20), Some(8192));
        assert_eq!(growth.trim_from(1 << 20, 1 << 20), None);
    }
}
