//! Who is alive: pure, heartbeats in, suspicion and death out.
//!
//! ```text
//!            network silent for suspect_after_ms          network AND LUN silent for dead_after_ms
//!   Alive -----------------------------------> Suspect ------------------------------------------> Dead (for this epoch)
//!      ^------------- network beat ---------------|
//! ```
//! - Dead only when both are silent: a node that still beats on the LUN is cut off, not gone.
//! - The LUN's silence counts only up to the last time that this node could read the LUN. A storage outage that hits this
//!   node too proves nothing about others, so nobody is declared dead by it.
//! - A detector that was itself stopped (SIGSTOP, suspend, a swap storm) gives everybody the time back that it missed.
//! - Silence is measured on this node's clock, from when it *saw* the last change (B1).
//!
//! **Invariants:** an epoch that was declared dead stays dead, whatever arrives later; a beat of an older epoch is no sign
//! of life.

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
    /// Heard again after suspicion, or back with a new epoch.
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
}

impl Watched {
    fn new(epoch: Epoch, now: Millis) -> Self {
        Self { epoch, health: Health::Alive, network_seen: now, lun_seen: now, lun_counter: None }
    }
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
        if gap < self.timing.suspect_after_ms {
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
        if epoch < seen.epoch || (seen.health == Health::Dead && !newer) {
            return;
        }
        let was = seen.health;
        if newer {
            *seen = Watched::new(epoch, now);
        }
        seen.network_seen = now;
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
        seen.lun_counter = Some(counter);
        seen.lun_seen = now;
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
            let lun_silent = last_scan.is_none_or(|scan| scan.since(seen.lun_seen) >= timing.dead_after_ms);
            if seen.health == Health::Suspect && network_silent_ms >= timing.dead_after_ms && lun_silent {
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
        assert_eq!(silent, [(400, suspect), (3000, dead)]);
        let without_volume = pass(&mut detector(), 0, 20_000, |_| vec![]);
        assert_eq!(without_volume, [(400, suspect), (3000, dead)]);
    }

    #[test]
    fn a_node_that_still_beats_on_the_lun_is_not_dead() {
        let seen = pass(&mut detector(), 0, 30_000, |now| vec![lun_beat(now / 500), Event::LunScanned]);
        assert_eq!(seen, [(400, Action::Suspect { node: N, epoch: E })]);
    }

    #[test]
    fn a_counter_that_stands_still_is_no_sign_of_life() {
        let seen = pass(&mut detector(), 0, 10_000, |_| vec![lun_beat(7), Event::LunScanned]);
        assert_eq!(seen.last(), Some(&(3100, Action::Dead { node: N, epoch: E })));
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
    fn a_suspected_node_recovers_and_a_dead_epoch_does_not() {
        let mut detector = detector();
        pass(&mut detector, 0, 1000, |_| vec![]);
        assert_eq!(detector.step(Millis(1000), BEAT), [Action::Recovered { node: N, epoch: E }]);
        let seen = pass(&mut detector, 1000, 9000, |_| vec![]);
        assert_eq!(seen.last(), Some(&(4000, Action::Dead { node: N, epoch: E })));
        assert!(detector.step(Millis(9001), BEAT).is_empty(), "this epoch is over");
        let next = Event::NetworkBeat { node: N, epoch: Epoch(5) };
        assert_eq!(detector.step(Millis(9002), next), [Action::Recovered { node: N, epoch: Epoch(5) }]);
        assert_eq!(detector.living().collect::<Vec<_>>(), [(N, Epoch(5))]);
    }

    // Invariant A5
    #[test]
    fn a_beat_of_an_older_epoch_is_no_sign_of_life() {
        let mut detector = detector();
        let old = Event::NetworkBeat { node: N, epoch: Epoch(3) };
        let seen = pass(&mut detector, 0, 4000, |_| vec![old]);
        assert_eq!(seen.last(), Some(&(3000, Action::Dead { node: N, epoch: E })));
    }

    #[test]
    fn nodes_that_are_not_expected_are_not_judged() {
        let mut detector = detector();
        detector.step(Millis(0), Event::Forget { node: N });
        assert!(pass(&mut detector, 0, 10_000, |_| vec![BEAT]).is_empty());
        assert_eq!(detector.silence(Millis(10_000), N), None);
    }

    proptest! {
        // Whatever arrives, a death needs both silences, and each epoch dies at most once.
        #[test]
        fn death_needs_silence_on_the_network_and_on_the_lun(
            steps in prop::collection::vec((1..300_u64, 0..4_u8), 1..300)
        ) {
            let mut detector = detector();
            let (mut now, mut network, mut lun, mut counter, mut deaths) = (0, 0, 0, 0, 0);
            for (ms, kind) in steps {
                now += ms;
                let event = match kind {
                    0 => { network = now; BEAT }
                    1 => { lun = now; counter += 1; lun_beat(counter) }
                    2 => Event::LunScanned,
                    _ => Event::Tick,
                };
                for action in detector.step(Millis(now), event) {
                    if action == (Action::Dead { node: N, epoch: E }) {
                        deaths += 1;
                        prop_assert!(now - network >= Timing::DEFAULT.dead_after_ms);
                        prop_assert!(now - lun >= Timing::DEFAULT.dead_after_ms || detector.last_scan.is_none());
                    }
                }
            }
            prop_assert!(deaths <= 1);
        }
    }
}
