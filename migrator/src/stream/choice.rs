//! Whether pages are compressed, and whether they go as differences: decided by what the ways cost, as it is measured while
//! pages are sent.
//!
//! ```text
//!   plain:       wire                                    for each MiB of pages
//!   packed:      packing + ratio * wire                  worth it when that is a tenth less
//!   difference:  comparing, remembering + ratio * (plain or packed, whichever is in use)      worth it when a tenth less
//! ```
//! While pages go plain, one run of many is packed to see what that would cost now; a stream that cannot be packed soon goes
//! plain again, because what it costs is measured with every run. While differences are not worth it, one page of many is
//! remembered and compared all the same. Before anything was compared pages are remembered where that takes less than a quarter
//! of what sending them takes: on a link that is slow enough, the first pass already. The first MiB say nothing of a link, because
//! the buffers of a connection take them at the speed of memory: they are remembered in any case.

/// One run of so many is packed to see what it costs.
const PROBE_EVERY: u32 = 32;
/// Of so many pages one is always remembered and compared.
const SAMPLED_EVERY: u64 = 64;
const MIB: u64 = 1 << 20;
/// What the buffers of a connection may take at once.
const BUFFERS_BYTES: u64 = 16 * MIB;
/// A measurement counts for so much of the figure, in parts of `PARTS`.
const NEWEST: u64 = 8;
/// The same where a few runs in a row say little: connections take a MiB or two at once, and then nothing for a while.
const NEWEST_OF_BURSTS: u64 = 1;
const PARTS: u64 = 32;

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
        learn(&mut self.wire_ns, per_mib(cost.sending_ns, cost.sent_bytes), NEWEST);
        if let Some(packed_bytes) = cost.packed_bytes {
            learn(&mut self.packing_ns, per_mib(cost.packing_ns, cost.plain_bytes), NEWEST);
            learn(&mut self.packed, per_mib(packed_bytes, cost.plain_bytes), NEWEST);
        }
        if let (Some(wire), Some(packing), Some(packed)) = (self.wire_ns, self.packing_ns, self.packed) {
            let with = packing.saturating_add(scaled(wire, packed, MIB));
            self.packs = with < wire / 10 * 9;
        }
    }

    /// Nanoseconds for a MiB of pages in the way they go now.
    pub(super) fn whole_ns(&self) -> Option<u64> {
        let wire = self.wire_ns?;
        match (self.packs, self.packing_ns, self.packed) {
            (true, Some(packing), Some(packed)) => Some(packing.saturating_add(scaled(wire, packed, MIB))),
            _ => Some(wire),
        }
    }
}

/// What comparing and remembering came to in one run.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Compared {
    /// Bytes of pages that were compared or remembered.
    pub(super) handled_bytes: u64,
    /// Time for it.
    pub(super) handling_ns: u64,
    /// Bytes of pages of which an older state was known.
    pub(super) compared_bytes: u64,
    /// What of them is left to send.
    pub(super) left_bytes: u64,
}

/// Whether pages go as differences. See the module.
#[derive(Clone, Debug)]
pub(super) struct Differing {
    all: bool,
    /// Bytes of pages that were compared or remembered.
    handled_bytes: u64,
    /// Nanoseconds to compare or remember a MiB.
    handling_ns: Option<u64>,
    /// What is left of a MiB, in bytes.
    left: Option<u64>,
    /// Nanoseconds for a MiB of pages that go whole.
    whole_ns: Option<u64>,
}

impl Default for Differing {
    fn default() -> Self {
        Self { all: true, handled_bytes: 0, handling_ns: None, left: None, whole_ns: None }
    }
}

impl Differing {
    /// Whether this page is to be compared and remembered.
    pub(super) fn takes(&self, page: u64) -> bool {
        self.all || page.is_multiple_of(SAMPLED_EVERY)
    }

    /// Takes what a run came to, whose pages cost so much for each MiB when they go whole.
    pub(super) fn after(&mut self, run: Compared, whole_ns: Option<u64>) {
        self.handled_bytes += run.handled_bytes;
        learn(&mut self.handling_ns, per_mib(run.handling_ns, run.handled_bytes), NEWEST);
        learn(&mut self.left, per_mib(run.left_bytes, run.compared_bytes), NEWEST);
        learn(&mut self.whole_ns, whole_ns, NEWEST_OF_BURSTS);
        let (Some(handling), Some(whole)) = (self.handling_ns, self.whole_ns) else { return };
        self.all = match self.left {
            Some(left) => handling.saturating_add(scaled(whole, left, MIB)) < whole / 10 * 9,
            None => self.handled_bytes < BUFFERS_BYTES || handling < whole / 4,
        };
    }
}

fn learn(figure: &mut Option<u64>, measured: Option<u64>, newest: u64) {
    let Some(measured) = measured else { return };
    let known = figure.unwrap_or(measured);
    *figure = Some(scaled(known, PARTS - newest, PARTS).saturating_add(scaled(measured, newest, PARTS)));
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

    const SECOND: u64 = 1_000_000_000;

    /// Runs of 256 KiB over a wire, compared or remembered at a speed; with `percent_left` of each page that is compared.
    fn taken_of_640(
        differing: &mut Differing,
        wire_mib_s: u64,
        handling_mib_s: u64,
        left: Option<u64>,
    ) -> usize {
        for _ in 0..100 {
            let handled = (0..64).filter(|page| differing.takes(*page)).count() as u64 * 4096;
            let compared = if left.is_some() { handled } else { 0 };
            let run = Compared {
                handled_bytes: handled,
                handling_ns: handled * SECOND / (handling_mib_s * MIB),
                compared_bytes: compared,
                left_bytes: compared * left.unwrap_or(0) / 100,
            };
            differing.after(run, Some(SECOND / wire_mib_s));
        }
        (0..640).filter(|page| differing.takes(*page)).count()
    }

    #[test]
    fn pages_are_remembered_from_the_first_on_where_the_link_is_slow_and_compared_where_they_change_little() {
        let taken = |wire, handling, left| taken_of_640(&mut Differing::default(), wire, handling, left);
        assert!(Differing::default().takes(1), "nothing is known yet");
        assert_eq!((taken(100, 4000, None), taken(1800, 4000, None)), (640, 10));
        assert_eq!((taken(100, 4000, Some(1)), taken(1800, 4000, Some(1))), (640, 640));
        assert_eq!((taken(100, 4000, Some(98)), taken(1800, 1900, Some(1))), (10, 10));
        let mut changing = Differing::default();
        let steps = [(Some(1), 640), (Some(100), 10), (Some(1), 640)];
        for (left, taken) in steps {
            assert_eq!(
                taken_of_640(&mut changing, 100, 4000, left),
                taken,
                "{left:?} is seen by the samples"
            );
        }
    }

    #[test]
    fn a_connection_that_takes_much_at_once_and_then_nothing_for_a_while_is_as_fast_as_on_average() {
        let (mut choice, mut differing) = (Choice::default(), Differing::default());
        let mut taken = 0;
        for run in 0_u64..400 {
            let handled_bytes = if differing.takes(1) { 64 * 4096 } else { 4096 };
            let handling_ns = handled_bytes * SECOND / (1500 * MIB);
            differing
                .after(Compared { handled_bytes, handling_ns, ..Compared::default() }, choice.whole_ns());
            // Eight runs of 256 KiB at memory's speed, then a wait: 60 MiB/s.
            let sending_ns = if run % 9 == 8 { SECOND / 4 * 9 / 60 } else { SECOND / 8000 };
            choice.after(Cost { plain_bytes: MIB / 4, sent_bytes: MIB / 4, sending_ns, ..Cost::default() });
            taken += u64::from(run >= 50 && differing.takes(1));
        }
        assert_eq!(taken, 350, "{choice:?} {differing:?}");
    }

    #[test]
    fn what_the_buffers_of_a_connection_take_at_once_is_remembered_too() {
        let mut differing = Differing::default();
        let run = Compared { handled_bytes: MIB, handling_ns: SECOND / 1500, ..Compared::default() };
        let taken = |differing: &mut Differing, runs, wire_mib_s| {
            let takes = |_: &i32| {
                let takes = differing.takes(1);
                differing.after(run, Some(SECOND / wire_mib_s));
                takes
            };
            (0..runs).filter(takes).count()
        };
        assert_eq!(taken(&mut differing, 16, 8000), 16);
        assert_eq!(taken(&mut differing, 16, 8000), 0, "it goes on like that: the link is fast");
        assert!(taken(&mut differing, 32, 100) >= 20, "it was the buffers: {differing:?}");
    }

    #[test]
    fn a_page_that_packs_well_costs_less_whole() {
        let mut choice = Choice::default();
        let cost = Cost {
            plain_bytes: MIB,
            packed_bytes: Some(MIB / 100),
            packing_ns: SECOND / 500,
            sent_bytes: MIB / 100,
            sending_ns: SECOND / 10_000,
        };
        choice.after(cost);
        // Two milliseconds for packing, a hundredth of the ten that the wire would take.
        assert!(choice.whole_ns().is_some_and(|ns| (2_090_000..2_110_000).contains(&ns)), "{choice:?}");
    }
}
