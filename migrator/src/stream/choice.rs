//! Whether pages are compressed before they are sent: decided by what both ways cost, as it is measured while they are sent.
//!
//! ```text
//!   plain:   wire                        for each MiB of pages
//!   packed:  packing + ratio * wire      worth it when that is a tenth less
//! ```
//! While pages go plain, one run of many is packed to see what that would cost now; a stream that cannot be packed soon goes
//! plain again, because what it costs is measured with every run.

/// One run of so many is packed to see what it costs.
const PROBE_EVERY: u32 = 32;
const MIB: u64 = 1 << 20;
/// A measurement counts for so much of the figure, in eighths.
const NEWEST_EIGHTHS: u64 = 2;

/// What one run came to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost {
    /// Bytes of pages.
    pub(super) plain_bytes: u64,
    /// What they became; nothing when they were not packed.
    pub(super) packed_bytes: Option<u64>,
    /// Time for packing.
    pub(super) packing_ns: u64,
    /// Bytes that went out.
    pub(super) sent_bytes: u64,
    /// Time until the stream had taken them.
    pub(super) sending_ns: u64,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Choice {
    packs: bool,
    runs: u32,
    /// Nanoseconds for a MiB on the wire.
    wire_ns: Option<u64>,
    /// Nanoseconds to pack a MiB.
    packing_ns: Option<u64>,
    /// What is left of a MiB, in bytes.
    packed: Option<u64>,
}

impl Choice {
    /// Whether the next run is to be packed.
    pub(super) fn pack_next(&mut self) -> bool {
        self.runs = self.runs.wrapping_add(1);
        self.packs || self.runs.is_multiple_of(PROBE_EVERY)
    }

    /// Takes what a run came to.
    pub(super) fn after(&mut self, cost: Cost) {
        learn(&mut self.wire_ns, per_mib(cost.sending_ns, cost.sent_bytes));
        if let Some(packed_bytes) = cost.packed_bytes {
            learn(&mut self.packing_ns, per_mib(cost.packing_ns, cost.plain_bytes));
            learn(&mut self.packed, per_mib(packed_bytes, cost.plain_bytes));
        }
        if let (Some(wire), Some(packing), Some(packed)) = (self.wire_ns, self.packing_ns, self.packed) {
            let with = packing.saturating_add(scaled(wire, packed, MIB));
            self.packs = with < wire / 10 * 9;
        }
    }
}

fn learn(figure: &mut Option<u64>, measured: Option<u64>) {
    let Some(measured) = measured else { return };
    let known = figure.unwrap_or(measured);
    *figure = Some(scaled(known, 8 - NEWEST_EIGHTHS, 8).saturating_add(scaled(measured, NEWEST_EIGHTHS, 8)));
}

fn per_mib(amount: u64, bytes: u64) -> Option<u64> {
    (bytes > 0).then(|| scaled(amount, MIB, bytes))
}

fn scaled(amount: u64, by: u64, of: u64) -> u64 {
    u64::try_from(u128::from(amount) * u128::from(by) / u128::from(of)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs of 256 KiB over a wire, packed at a speed to a share; gives how many of the last 100 were packed.
    fn packed_of_100(wire_mib_s: u64, packing_mib_s: u64, percent_left: u64) -> usize {
        const RUN: u64 = 256 << 10;
        let mut choice = Choice::default();
        let second = 1_000_000_000;
        let mut packed = Vec::new();
        for _ in 0..400 {
            let pack = choice.pack_next();
            let left = RUN * percent_left / 100;
            let sent_bytes = if pack { left } else { RUN };
            choice.after(Cost {
                plain_bytes: RUN,
                packed_bytes: pack.then_some(left),
                packing_ns: if pack { RUN * second / (packing_mib_s * MIB) } else { 0 },
                sent_bytes,
                sending_ns: sent_bytes * second / (wire_mib_s * MIB),
            });
            packed.push(pack);
        }
        packed[300..].iter().filter(|packed| **packed).count()
    }

    #[test]
    fn a_slow_link_gets_packed_pages_and_a_fast_one_plain_ones() {
        assert_eq!(packed_of_100(100, 500, 30), 100);
        assert!(packed_of_100(2000, 500, 30) <= 4);
        assert!(packed_of_100(100, 500, 100) <= 4, "noise gets no smaller");
    }
}
