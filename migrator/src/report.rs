//! What a move took.

/// What was measured while the guest stood still at the source, and before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SaveFigures {
    /// From the request to the last request in flight and the flush of the disks.
    pub drain_us: u64,
    /// Writing the RAM; in a live move: sending the rest of it and the state, until the target has taken them.
    pub memory_us: u64,
    /// Saving and writing the state of CPUs and devices.
    pub state_us: u64,
    /// Passes over the RAM while the guest ran.
    pub rounds: u32,
    /// Bytes of RAM that crossed the network.
    pub memory_bytes_sent: u64,
    /// Pages of which only the difference to what was sent before crossed it; nothing where there was none.
    pub delta_pages: u64,
    /// Bytes that these pages would have taken more if they had gone whole.
    pub delta_bytes_saved: u64,
}

impl SaveFigures {
    fn sum_us(&self) -> u64 {
        self.drain_us.saturating_add(self.memory_us).saturating_add(self.state_us)
    }
}

/// Where the guest's standstill went, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Blackout {
    /// Pause, I/O in flight, flush.
    pub drain_ms: f64,
    /// RAM.
    pub memory_ms: f64,
    /// State of CPUs and devices.
    pub state_ms: f64,
    /// The rest: the commit, activation; in a quick move also loading at the target.
    pub handoff_ms: f64,
}

impl Blackout {
    /// What was not memory, in milliseconds.
    #[must_use]
    pub fn overhead_ms(&self) -> f64 {
        self.drain_ms + self.state_ms + self.handoff_ms
    }
}

/// The report of a finished move.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Name of the VM.
    pub vm: String,
    /// Number of the source node.
    pub from: u16,
    /// Number of the target node.
    pub to: u16,
    /// How it was moved: `live` or `quick`.
    pub kind: &'static str,
    /// From the request to the guest running at the target.
    pub total_ms: f64,
    /// How long the guest stood still.
    pub blackout_ms: f64,
    /// Its parts; they add up to it.
    pub blackout: Blackout,
    /// Passes over the RAM while the guest ran; none in a quick move.
    pub rounds: u32,
    /// RAM bytes that crossed the network; none in a quick move, they go through the volume.
    pub memory_bytes_sent: u64,
    /// Pages of which only the difference to what was sent before crossed it.
    pub delta_pages: u64,
    /// Bytes that these pages would have taken more if they had gone whole.
    pub delta_bytes_saved: u64,
    /// Disk bytes copied: always 0.
    pub disk_bytes_copied: u64,
}

/// Moments of a move, in microseconds on the source's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Moments {
    pub(crate) begun: u64,
    pub(crate) halted: u64,
    pub(crate) saved: SaveFigures,
}

impl Moments {
    pub(crate) fn report(
        &self,
        vm: &str,
        kind: &'static str,
        (from, to): (u16, u16),
        running_again: u64,
    ) -> Report {
        let blackout = running_again.saturating_sub(self.halted);
        Report {
            vm: vm.to_owned(),
            from,
            to,
            kind,
            total_ms: ms(running_again.saturating_sub(self.begun)),
            blackout_ms: ms(blackout),
            blackout: Blackout {
                drain_ms: ms(self.saved.drain_us),
                memory_ms: ms(self.saved.memory_us),
                state_ms: ms(self.saved.state_us),
                handoff_ms: ms(blackout.saturating_sub(self.saved.sum_us())),
            },
            rounds: self.saved.rounds,
            memory_bytes_sent: self.saved.memory_bytes_sent,
            delta_pages: self.saved.delta_pages,
            delta_bytes_saved: self.saved.delta_bytes_saved,
            disk_bytes_copied: 0,
        }
    }
}

fn ms(us: u64) -> f64 {
    // Exact below 2^32 us, which is more than an hour; longer ones are cut there.
    f64::from(u32::try_from(us).unwrap_or(u32::MAX)) / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_the_blackout_add_up() {
        let saved = SaveFigures {
            drain_us: 2000,
            memory_us: 30_000,
            state_us: 500,
            rounds: 3,
            memory_bytes_sent: 1 << 20,
            delta_pages: 7,
            delta_bytes_saved: 1 << 14,
        };
        let report = Moments { begun: 1000, halted: 5000, saved }.report("web", "live", (1, 2), 65_000);
        let parts = report.blackout;
        let sum = parts.drain_ms + parts.memory_ms + parts.state_ms + parts.handoff_ms;
        assert!((report.blackout_ms - 60.0).abs() < 1e-9 && (sum - 60.0).abs() < 1e-9, "{report:?}");
        assert!((report.total_ms - 64.0).abs() < 1e-9);
        assert_eq!((report.rounds, report.memory_bytes_sent, report.disk_bytes_copied), (3, 1 << 20, 0));
        assert_eq!((report.delta_pages, report.delta_bytes_saved), (7, 1 << 14));
    }
}
