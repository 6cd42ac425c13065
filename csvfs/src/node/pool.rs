//! Free blocks of this client: what it places in its files by itself.
//!
//! ```text
//!   coordinator --TakePool--> | runs | --take--> holes of files      refilled ahead: below `low` more is asked for
//! ```
//! How much is kept ready follows the rate of growth: four times what was taken while the last refill was on its way.
//! Pure: no message, no clock. **Invariant:** a block is in the pool or in one file, never in both.

use std::collections::BTreeMap;

use super::map::BLOCK_BYTES;

/// Least that is kept ready, in bytes.
const LOW_BYTES_MIN: u64 = 8 << 20;
/// Most that is kept ready.
const LOW_BYTES_MAX: u64 = 1 << 30;
/// How many times the need of a refill's time is kept ready.
const SAFETY: u64 = 4;
/// Runs that are looked at for one that is large enough.
const TRIES_MAX: usize = 32;

/// A run of the LUN: offset and length in bytes.
pub(super) type LunRun = (u64, u64);

/// See the module.
#[derive(Debug)]
pub(super) struct Pool {
    runs: BTreeMap<u64, u64>,
    bytes: u64,
    low: u64,
    /// Taken since the refill that is under way was asked for.
    taken: u64,
    asking: bool,
    /// The last refill ahead of need was refused: nothing is asked for ahead until something came.
    poor: bool,
}

impl Default for Pool {
    fn default() -> Self {
        Self { runs: BTreeMap::new(), bytes: 0, low: LOW_BYTES_MIN, taken: 0, asking: false, poor: false }
    }
}

impl Pool {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes `need` bytes, and up to `want` when there is plenty; near `goal` if that is free. `None`: too little is there.
    pub(super) fn take(&mut self, goal: Option<u64>, need: u64, want: u64) -> Option<Vec<LunRun>> {
        if need > self.bytes {
            return None;
        }
        let plenty = self.bytes / SAFETY / BLOCK_BYTES * BLOCK_BYTES;
        let (mut left, mut goal) = (want.min(plenty).max(need), goal);
        self.taken += left;
        let mut taken = Vec::with_capacity(1);
        while left > 0 {
            let (at, len) = self.cut(goal, left)?;
            left -= len;
            goal = Some(at + len);
            taken.push((at, len));
        }
        Some(taken)
    }

    /// Cuts up to `len` bytes out of one run.
    fn cut(&mut self, goal: Option<u64>, len: u64) -> Option<LunRun> {
        let at = goal.filter(|goal| self.run_around(*goal).is_some()).or_else(|| self.pick(len))?;
        let (start, run) = self.run_around(at)?;
        let end = start + run;
        let cut = len.min(end - at);
        self.runs.remove(&start);
        for (start, len) in [(start, at - start), (at + cut, end - at - cut)] {
            if len > 0 {
                self.runs.insert(start, len);
            }
        }
        self.bytes -= cut;
        Some((at, cut))
    }

    fn run_around(&self, at: u64) -> Option<LunRun> {
        let (start, len) = self.runs.range(..=at).next_back()?;
        (start + len > at).then_some((*start, *len))
    }

    /// The first run that is large enough, else the first.
    fn pick(&self, len: u64) -> Option<u64> {
        let fit = self.runs.iter().take(TRIES_MAX).find(|(_, run)| **run >= len);
        fit.or_else(|| self.runs.first_key_value()).map(|(start, _)| *start)
    }

    /// Puts runs in: given by the coordinator, or taken and not used.
    pub(super) fn put(&mut self, runs: impl IntoIterator<Item = LunRun>) {
        for (start, len) in runs {
            self.bytes += len;
            self.put_one(start, len);
        }
    }

    fn put_one(&mut self, start: u64, len: u64) {
        let (mut start, mut len) = (start, len);
        if let Some((before, run)) = self.runs.range(..start).next_back().map(|(s, l)| (*s, *l))
            && before + run == start
        {
            (start, len) = (before, run + len);
        }
        if let Some(after) = self.runs.remove(&(start + len)) {
            len += after;
        }
        self.runs.insert(start, len);
    }

    /// Whether more should be asked for ahead of need.
    pub(super) fn is_low(&self) -> bool {
        self.bytes < self.low && !self.asking && !self.poor
    }

    /// Begins a refill for somebody who needs `need` bytes (0: nobody does yet): gives what to ask for, as need and want.
    pub(super) fn ask(&mut self, need: u64) -> Option<(u64, u64)> {
        if self.asking {
            return None;
        }
        self.asking = true;
        self.taken = 0;
        let need = need.saturating_sub(self.bytes).max(BLOCK_BYTES);
        Some((need, (2 * self.low).saturating_sub(self.bytes).max(need)))
    }

    /// A refill has come.
    pub(super) fn came(&mut self, runs: impl IntoIterator<Item = LunRun>) {
        self.asking = false;
        self.poor = false;
        self.low = (SAFETY * self.taken).clamp(LOW_BYTES_MIN, LOW_BYTES_MAX);
        self.put(runs);
    }

    /// A refill was refused.
    pub(super) fn refused(&mut self) {
        self.asking = false;
        self.poor = true;
    }

    /// Takes everything out, for somebody who needs it more: nothing is asked for ahead for now.
    pub(super) fn empty(&mut self) -> Vec<LunRun> {
        self.poor = true;
        self.bytes = 0;
        std::mem::take(&mut self.runs).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const B: u64 = BLOCK_BYTES;

    #[test]
    fn growth_continues_where_the_file_ends() {
        let mut pool = Pool::default();
        pool.came([(100 * B, 1000 * B), (5000 * B, 10 * B)]);
        assert_eq!(pool.take(Some(500 * B), B, B), Some(vec![(500 * B, B)]));
        assert_eq!(pool.take(Some(501 * B), B, B), Some(vec![(501 * B, B)]));
        assert_eq!(pool.take(None, B, B), Some(vec![(100 * B, B)]));
    }

    #[test]
    fn what_is_kept_ready_follows_the_rate_of_growth() {
        let mut pool = Pool::default();
        assert_eq!(pool.ask(B), Some((B, 2 * LOW_BYTES_MIN)));
        assert_eq!(pool.ask(B), None, "one refill at a time");
        pool.came([(0, 256 << 20)]);
        assert!(!pool.is_low());
        pool.ask(0).expect("nothing is under way");
        pool.take(None, 100 << 20, 0).expect("it is there");
        pool.came([]);
        assert!(pool.is_low(), "100 MiB went in one refill: four times as much is to be ready");
    }

    #[test]
    fn after_a_refusal_only_need_asks_again() {
        let mut pool = Pool::default();
        pool.ask(0).expect("nothing is under way");
        pool.refused();
        assert!(!pool.is_low());
        assert_eq!(pool.take(None, B, B), None);
        assert!(pool.ask(B).is_some());
    }

    proptest! {
        #[test]
        fn no_block_is_given_out_twice_or_lost(steps in prop::collection::vec((0..3u8, 0..300u64, 1..40u64), 1..60)) {
            let mut pool = Pool::default();
            pool.came([(B, 200 * B), (300 * B, 100 * B)]);
            let mut out: Vec<LunRun> = Vec::new();
            for (kind, goal, len) in steps {
                if kind == 0 && !out.is_empty() {
                    let at = usize::try_from(goal).expect("small") % out.len();
                    pool.put([out.swap_remove(at)]);
                } else if let Some(runs) = pool.take(Some(goal * B), len * B, 2 * len * B) {
                    out.extend(runs);
                }
                let mut all: Vec<LunRun> = out.clone();
                all.extend(pool.runs.iter().map(|(s, l)| (*s, *l)));
                all.sort_unstable();
                prop_assert!(all.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
                prop_assert_eq!(all.iter().map(|run| run.1).sum::<u64>(), 300 * B);
            }
        }
    }
}
