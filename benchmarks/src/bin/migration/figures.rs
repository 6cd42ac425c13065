//! What moves came to, and their order statistics.

/// One move.
#[derive(Clone, Debug, Default)]
pub(crate) struct Move {
    pub(crate) blackout_ms: f64,
    pub(crate) total_ms: f64,
    pub(crate) sent_bytes: f64,
    /// Where the blackout went, where that is known: drain, memory, state, hand-off.
    pub(crate) parts_ms: Option<[f64; 4]>,
}

/// Several of them, alike.
#[derive(Clone, Debug, Default)]
pub(crate) struct Moves(pub(crate) Vec<Move>);

impl Moves {
    pub(crate) fn blackout_ms(&self, percent: usize) -> f64 {
        self.percentile(percent, |one| one.blackout_ms)
    }

    pub(crate) fn total_ms(&self, percent: usize) -> f64 {
        self.percentile(percent, |one| one.total_ms)
    }

    pub(crate) fn sent_mib(&self, percent: usize) -> f64 {
        self.percentile(percent, |one| one.sent_bytes / f64::from(1 << 20))
    }

    /// By nearest rank: of fewer than 100 values the 99th percentile is the largest.
    fn percentile(&self, percent: usize, of: impl Fn(&Move) -> f64) -> f64 {
        let mut values: Vec<f64> = self.0.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        let rank = (values.len() * percent).div_ceil(100).max(1);
        values.get(rank - 1).copied().unwrap_or(0.0)
    }

    #[expect(clippy::print_stdout, reason = "a program for people at a terminal")]
    pub(crate) fn print(&self, who: &str) {
        println!(
            "  {who:44} blackout p50 {:7.1} p99 {:7.1} ms, total p50 {:8.1} ms, {:7.1} MiB sent",
            self.blackout_ms(50),
            self.blackout_ms(99),
            self.total_ms(50),
            self.sent_mib(50),
        );
        let part = |at: usize| self.percentile(50, |one| one.parts_ms.map_or(0.0, |parts| parts[at]));
        if self.0.iter().any(|one| one.parts_ms.is_some()) {
            println!(
                "  {:44} of it p50: drain {:.1}, memory {:.1}, state {:.1}, hand-off {:.1} ms",
                "",
                part(0),
                part(1),
                part(2),
                part(3)
            );
        }
    }
}
