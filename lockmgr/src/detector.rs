//! Who is alive: pure, heartbeats in, suspicion and death out.
//!
//! ```text
//!            network silent for suspect_after_ms          network AND LUN silent for as long as patience lasts
//!   Alive -----------------------------------> Suspect ------------------------------------------> Dead (for this epoch)
//!      ^------------- network beat ---------------|
//! ```
//! - Dead only when both are silent: a node that still beats on the LUN is cut off, not gone.
//! - **Patience** is `dead_after_ms` while beats come in time. How late they came lately, from this very node, makes it
//!   longer, up to `dead_after_ms_max`: on a loaded machine a silence says less.
//! - A node at whose address nobody listens has no daemon, and needs `suspect_after_ms` and two LUN heartbeats of silence only.
//! - The LUN's silence counts only up to the last time that this node could read the LUN. A storage outage that hits this
//!   node too proves nothing about others, so nobody is declared dead by it.
//! - A detector that was itself late or stopped (load, SIGSTOP, suspend, a swap storm) gives everybody the time back that it
//!   missed.
//! - Silence is measured on this node's clock, from when it *saw* the last change (B1).
//!
//! A verdict is this node's opinion: a beat takes it back, until the quorum has decided to fence and the incarnation is not
//! watched any more. What makes a death final is the record, not the detector.
//!
//! **Invariants:** a death needs both silences; a beat of an older epoch is no sign of life.

use std::collections::BTreeMap;

use crate::timing::Timing;
use crate::{Epoch, Millis, NodeId};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The cluster counts on this node from now on, in this epoch.
    Expect {
        /// Who.
        node: NodeId,
        /// Which incarnation.
        epoch: Epoch,
    },
    /// The cluster no longer counts on this node.
    Forget {
        /// Who.
        node: NodeId,
    },
    /// A heartbeat came over the network.
    NetworkBeat {
        /// Who.
        node: NodeId,
        /// Which incarnation.
        epoch: Epoch,
    },
    /// A heartbeat was read from a LUN. A counter that was seen before is no sign of life.
    LunBeat {
        /// Who.
        node: NodeId,
        /// Which incarnation.
        epoch: Epoch,
        /// Its counter.
        counter: u64,
    },
    /// Nobody listens where this node should: the operating system there answers, its daemon does not exist. To be repeated
    /// with each `Tick` for as long as it is so, and seen after the node was heard last.
    Refused {
        /// Who.
        node: NodeId,
    },
    /// All slots of a LUN were read successfully; a `LunBeat` for each that had one came before this.
    LunScanned,
    /// There is no volume whose heartbeats are to be watched.
    LunUnwatched,
    /// Time has passed. To be sent at least every `beat_ms`.
    Tick,
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// No longer heard on the network.
    Suspect {
        /// Who.
        node: NodeId,
        /// Which incarnation.
        epoch: Epoch,
    },
    /// This incarnation is to be fenced: silent on the network and on the LUN.
    Dead {
        /// Who.
        node: NodeId,
        /// Which incarnation.
        epoch: Epoch,
    },
    /// Heard again after suspicion or death, or back with a new epoch.
    Recovered {
        /// Who.
        node: NodeId,
        /// Which incarnation.
        epoch: Epoch,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Alive,
    Suspect,
    Dead,
}

/// What is known of one node.
#[derive(Clone, Copy, Debug)]
struct Watched {
    epoch: Epoch,
    health: Health,
    network_seen: Millis,
    lun_seen: Millis,
    /// Counter of the last LUN heartbeat of this epoch.
    lun_counter: Option<u64>,
    /// How far apart beats came at worst lately.
    network_gap_ms: u64,
    lun_gap_ms: u64,
    /// When its address refused a connection last, since it was heard.
    refused: Option<Millis>,
}

/// By what part the memory of a late beat fades with each beat that comes: half of it is gone after some 45.
const FADE_PART: u64 = 64;
/// Patience in gaps between beats of the network, as large as the largest lately.
const GAPS_OF_PATIENCE: u64 = 4;

impl Watched {
    fn new(epoch: Epoch, now: Millis) -> Self {
        Self {
            epoch,
            health: Health::Alive,
            network_seen: now,
            lun_seen: now,
            lun_counter: None,
            network_gap_ms: 0,
            lun_gap_ms: 0,
            refused: None,
        }
    }

    /// For how long it must be silent, on the network and on the LUN, to be dead.
    fn patience_ms(&self, now: Millis, timing: &Timing) -> (u64, u64) {
        if self.refused.is_some_and(|refused| now.since(refused) < 2 * timing.beat_ms) {
            return (timing.suspect_after_ms, timing.suspect_after_ms.max(2 * timing.lun_beat_ms));
        }
        let network = GAPS_OF_PATIENCE.saturating_mul(self.network_gap_ms);
        // A gap on the LUN holds up to two intervals of writing and reading when all is well.
        let lun = self.lun_gap_ms.saturating_add(timing.lun_beat_ms);
        let patience = network.max(lun).clamp(timing.dead_after_ms, timing.dead_after_ms_max);
        (patience, patience)
    }
}

/// The largest gap lately, after one of `gap_ms` more.
fn faded(largest_ms: u64, gap_ms: u64) -> u64 {
    gap_ms.max(largest_ms - largest_ms / FADE_PART)
}

/// The failure detector of one node. See the module.
#[derive(Debug)]
pub struct Detector {
    timing: Timing,
    nodes: BTreeMap<NodeId, Watched>,
    last_step: Option<Millis>,
    /// When all slots were last read, while a LUN is watched.
    last_scan: Option<Millis>,
}

impl Detector {
    /// Watches nobody yet. This node itself is never watched.
    #[must_use]
    pub fn new(timing: Timing) -> Self {
        Self { timing, nodes: BTreeMap::new(), last_step: None, last_scan: None }
    }

    /// Takes one event and says what follows from it, and from the time that has passed.
    pub fn step(&mut self, now: Millis, event: Event) -> Vec<Action> {
        let now = now.max(self.last_step.unwrap_or(now));
        self.give_back_missed_time(now);
        let mut out = Vec::new();
        match event {
            Event::Expect { node, epoch } => self.expect(now, node, epoch),
            Event::Forget { node } => drop(self.nodes.remove(&node)),
            Event::NetworkBeat { node, epoch } => self.network_beat(now, node, epoch, &mut out),
            Event::LunBeat { node, epoch, counter } => self.lun_beat(now, node, epoch, counter),
            Event::Refused { node } => self.refused(now, node),
            Event::LunScanned => self.last_scan = Some(now),
            Event::LunUnwatched => self.last_scan = None,
            Event::Tick => {}
        }
        self.judge(now, &mut out);
        out
    }

    /// The nodes that are watched and count as alive or suspected, with their epochs.
    pub fn living(&self) -> impl Iterator<Item = (NodeId, Epoch)> {
        self.nodes
            .iter()
            .filter(|(_, seen)| seen.health != Health::Dead)
            .map(|(node, seen)| (*node, seen.epoch))
    }

    /// For how long `node` has been silent, on the network and on the LUN, in milliseconds.
    #[must_use]
    pub fn silence(&self, now: Millis, node: NodeId) -> Option<(u64, u64)> {
        let seen = self.nodes.get(&node)?;
        Some((now.since(seen.network_seen), now.since(seen.lun_seen)))
    }

    /// A gap between two steps is time in which this detector could not have heard anybody.
    fn give_back_missed_time(&mut self, now: Millis) {
        let last = self.last_step.replace(now).unwrap_or(now);
        let gap = now.since(last);
        if gap < 2 * self.timing.beat_ms {
            return;
        }
        for seen in self.nodes.values_mut() {
            seen.network_seen = seen.network_seen.plus(gap).min(now);
            seen.lun_seen = seen.lun_seen.plus(gap).min(now);
        }
    }

    fn expect(&mut self, now: Millis, node: NodeId, epoch: Epoch) {
        let newer = self.nodes.get(&node).is_none_or(|seen| epoch > seen.epoch);
        if newer {
            self.nodes.insert(node, Watched::new(epoch, now));
        }
    }

    fn network_beat(&mut self, now: Millis, node: NodeId, epoch: Epoch, out: &mut Vec<Action>) {
        let Some(seen) = self.nodes.get_mut(&node) else { return };
        let newer = epoch > seen.epoch;
        if epoch < seen.epoch {
            return;
        }
        let was = seen.health;
        if newer {
            *seen = Watched::new(epoch, now);
        }
        let gap_ms = now.since(seen.network_seen).min(self.timing.dead_after_ms_max);
        seen.network_gap_ms = faded(seen.network_gap_ms, gap_ms);
        seen.network_seen = now;
        seen.refused = None;
        seen.health = Health::Alive;
        if was != Health::Alive {
            out.push(Action::Recovered { node, epoch });
        }
    }

    fn lun_beat(&mut self, now: Millis, node: NodeId, epoch: Epoch, counter: u64) {
        let Some(seen) = self.nodes.get_mut(&node) else { return };
        if epoch != seen.epoch || seen.lun_counter == Some(counter) {
            return;
        }
        // The first one comes after however long it took to open the LUN.
        if seen.lun_counter.replace(counter).is_some() {
            let gap_ms = now.since(seen.lun_seen).min(self.timing.dead_after_ms_max);
            seen.lun_gap_ms = faded(seen.lun_gap_ms, gap_ms);
        }
        seen.lun_seen = now;
    }

    fn refused(&mut self, now: Millis, node: NodeId) {
        if let Some(seen) = self.nodes.get_mut(&node) {
            seen.refused = Some(now);
        }
    }

    fn judge(&mut self, now: Millis, out: &mut Vec<Action>) {
        let (timing, last_scan) = (self.timing, self.last_scan);
        for (&node, seen) in &mut self.nodes {
            let epoch = seen.epoch;
            let network_silent_ms = now.since(seen.network_seen);
            if seen.health == Health::Alive && network_silent_ms >= timing.suspect_after_ms {
                seen.health = Health::Suspect;
                out.push(Action::Suspect { node, epoch });
            }
            let (network_patience_ms, lun_patience_ms) = seen.patience_ms(now, &timing);
            let lun_silent = last_scan.is_none_or(|scan| scan.since(seen.lun_seen) >= lun_patience_ms);
            if seen.health == Health::Suspect && network_silent_ms >= network_patience_ms && lun_silent {
                seen.health = Health::Dead;
                out.push(Action::Dead { node, epoch });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const N: NodeId = NodeId(2);
    const E: Epoch = Epoch(4);
    const BEAT: Event = Event::NetworkBeat { node: N, epoch: E };

    fn detector() -> Detector {
        let mut detector = Detector::new(Timing::DEFAULT);
        assert!(detector.step(Millis(0), Event::Expect { node: N, epoch: E }).is_empty());
        detector
    }

    /// Ticks every 100 ms after `from` up to `to`, with `also` before each, and collects what followed and when.
    fn pass(
        detector: &mut Detector,
        from: u64,
        to: u64,
        also: impl Fn(u64) -> Vec<Event>,
    ) -> Vec<(u64, Action)> {
        let mut seen = Vec::new();
        for now in (from + 100..=to).step_by(100) {
            for event in also(now).into_iter().chain([Event::Tick]) {
                seen.extend(detector.step(Millis(now), event).into_iter().map(|action| (now, action)));
            }
        }
        seen
    }

    fn lun_beat(counter: u64) -> Event {
        Event::LunBeat { node: N, epoch: E, counter }
    }

    #[test]
    fn a_node_that_beats_is_never_suspected() {
        assert!(pass(&mut detector(), 0, 60_000, |_| vec![BEAT]).is_empty());
    }

    #[test]
    fn silence_on_both_is_suspicion_first_and_death_later() {
        let (suspect, dead) = (Action::Suspect { node: N, epoch: E }, Action::Dead { node: N, epoch: E });
        let silent = pass(&mut detector(), 0, 20_000, |_| vec![Event::LunScanned]);
        assert_eq!(silent, [(400, suspect), (600, dead)]);
        let without_volume = pass(&mut detector(), 0, 20_000, |_| vec![]);
        assert_eq!(without_volume, [(400, suspect), (600, dead)]);
    }

    #[test]
    fn a_node_that_still_beats_on_the_lun_is_not_dead() {
        let seen = pass(&mut detector(), 0, 30_000, |now| vec![lun_beat(now / 500), Event::LunScanned]);
        assert_eq!(seen, [(400, Action::Suspect { node: N, epoch: E })]);
    }

    #[test]
    fn a_counter_that_stands_still_is_no_sign_of_life() {
        let seen = pass(&mut detector(), 0, 10_000, |_| vec![lun_beat(7), Event::LunScanned]);
        assert_eq!(seen.last(), Some(&(700, Action::Dead { node: N, epoch: E })));
    }

    #[test]
    fn a_storage_outage_here_declares_nobody_dead() {
        let mut detector = detector();
        pass(&mut detector, 0, 1000, |now| vec![BEAT, lun_beat(now), Event::LunScanned]);
        let seen = pass(&mut detector, 1000, 60_000, |_| vec![]);
        assert_eq!(seen, [(1400, Action::Suspect { node: N, epoch: E })]);
        let seen = pass(&mut detector, 60_000, 61_000, |_| vec![Event::LunScanned]);
        assert_eq!(seen, [(60_100, Action::Dead { node: N, epoch: E })], "the LUN is back and shows no beat");
    }

    // Invariant B3
    #[test]
    fn a_detector_that_was_stopped_blames_nobody() {
        let mut detector = detector();
        pass(&mut detector, 0, 1000, |now| vec![BEAT, lun_beat(now), Event::LunScanned]);
        assert!(detector.step(Millis(500_000), Event::Tick).is_empty());
        assert!(detector.step(Millis(500_010), Event::LunScanned).is_empty());
        let seen = pass(&mut detector, 500_000, 520_000, |_| vec![BEAT, Event::LunScanned]);
        assert!(seen.is_empty());
    }

    #[test]
    fn a_node_that_is_heard_again_recovers_until_it_is_not_counted_on_any_more() {
        let mut detector = detector();
        pass(&mut detector, 0, 500, |_| vec![]);
        assert_eq!(detector.step(Millis(500), BEAT), [Action::Recovered { node: N, epoch: E }]);
        let seen = pass(&mut detector, 500, 9000, |_| vec![]);
        assert_eq!(seen.last(), Some(&(2500, Action::Dead { node: N, epoch: E })));
        assert_eq!(detector.step(Millis(9001), BEAT), [Action::Recovered { node: N, epoch: E }]);
        detector.step(Millis(9001), Event::Forget { node: N });
        assert!(detector.step(Millis(9001), BEAT).is_empty(), "this epoch is over");
        detector.step(Millis(9001), Event::Expect { node: N, epoch: E });
        let next = Event::NetworkBeat { node: N, epoch: Epoch(5) };
        detector.step(Millis(9002), next);
        assert_eq!(detector.living().collect::<Vec<_>>(), [(N, Epoch(5))]);
    }

    // Invariant A5
    #[test]
    fn a_beat_of_an_older_epoch_is_no_sign_of_life() {
        let mut detector = detector();
        let old = Event::NetworkBeat { node: N, epoch: Epoch(3) };
        let seen = pass(&mut detector, 0, 4000, |_| vec![old]);
        assert_eq!(seen.last(), Some(&(600, Action::Dead { node: N, epoch: E })));
    }

    #[test]
    fn a_node_without_a_daemon_is_dead_sooner_and_not_before_both_are_silent() {
        let refused = Event::Refused { node: N };
        let seen = pass(&mut detector(), 0, 5000, |_| vec![refused, Event::LunScanned]);
        assert_eq!(seen.last(), Some(&(400, Action::Dead { node: N, epoch: E })));
        let beats = |now| vec![refused, lun_beat(now / 200), Event::LunScanned];
        let seen = pass(&mut detector(), 0, 5000, beats);
        assert_eq!(seen, [(400, Action::Suspect { node: N, epoch: E })], "something beats on the LUN for it");
        let seen = pass(&mut detector(), 0, 5000, |_| vec![refused, BEAT, Event::LunScanned]);
        assert!(seen.is_empty(), "it is heard");
    }

    // A busy machine is not a dead one: who was late is waited for longer, and no longer than the limit.
    #[test]
    fn beats_that_came_late_make_the_detector_patient() {
        let dead_at = |every_ms: u64| {
            let mut detector = detector();
            let late = |now: u64| if now.is_multiple_of(every_ms) { vec![BEAT] } else { vec![] };
            pass(&mut detector, 0, 6000, late);
            pass(&mut detector, 6000, 20_000, |_| vec![]).last().map(|(at, _)| at - 6000)
        };
        assert_eq!([100, 200, 300, 500].map(dead_at), [600, 800, 1200, 2000].map(Some));
    }

    #[test]
    fn patience_returns_to_the_usual_when_beats_come_in_time_again() {
        let mut detector = detector();
        pass(&mut detector, 0, 500, |_| vec![]);
        pass(&mut detector, 500, 20_000, |_| vec![BEAT]);
        let seen = pass(&mut detector, 20_000, 30_000, |_| vec![]);
        assert_eq!(seen.last(), Some(&(20_600, Action::Dead { node: N, epoch: E })));
    }

    #[test]
    fn nodes_that_are_not_expected_are_not_judged() {
        let mut detector = detector();
        detector.step(Millis(0), Event::Forget { node: N });
        assert!(pass(&mut detector, 0, 10_000, |_| vec![BEAT]).is_empty());
        assert_eq!(detector.silence(Millis(10_000), N), None);
    }

    proptest! {
        // Whatever arrives, a death needs both silences.
        #[test]
        fn death_needs_silence_on_the_network_and_on_the_lun(
            steps in prop::collection::vec((1..300_u64, 0..5_u8), 1..300)
        ) {
            let mut detector = detector();
            let (mut now, mut network, mut lun, mut counter) = (0, 0, 0, 0);
            for (ms, kind) in steps {
                now += ms;
                let event = match kind {
                    0 => { network = now; BEAT }
                    1 => { lun = now; counter += 1; lun_beat(counter) }
                    2 => Event::LunScanned,
                    3 => Event::Refused { node: N },
                    _ => Event::Tick,
                };
                for action in detector.step(Millis(now), event) {
                    if action == (Action::Dead { node: N, epoch: E }) {
                        let timing = Timing::DEFAULT;
                        prop_assert!(now - network >= timing.suspect_after_ms);
                        prop_assert!(now - lun >= 2 * timing.lun_beat_ms || detector.last_scan.is_none());
                    }
                }
            }
        }
    }
}
