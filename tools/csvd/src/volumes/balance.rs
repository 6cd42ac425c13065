//! Which coordinator should move to another node, so that no node has much to do while another has little. Pure: what was
//! counted in, at most one move out.
//!
//! A node's load is the rate of requests that its coordinators carry out. A move is proposed only when
//!
//! | rule | why |
//! |---|---|
//! | the busiest node would have at least a quarter less to do, and the other no more than that | a gain that is worth a pause |
//! | that was so in several looks in a row | a burst is over before a move is |
//! | the volume has not moved for minutes, and none has for a while | what was decided shows its effect first |
//! | the load is more than a few requests | an idle cluster stays as it is |
//!
//! **Invariant:** loads that stay as they are lead to a state in which nothing moves: each move lowers the highest load of
//! the two nodes, and no volume moves twice within [`REST_MS`].

use std::collections::BTreeMap;

use lockmgr::NodeId;
use lockmgr::cluster::{ClusterState, Member, VolumeRecord, VolumeState};

use crate::view;

/// Time between two looks.
pub(crate) const LOOK_MS: u64 = 5_000;
/// Looks in a row that must find the same.
const LOOKS_MIN: u32 = 3;
/// A volume that has moved, by whoever's wish, rests.
const REST_MS: u64 = 300_000;
/// So do all others, for a shorter time.
const REST_OF_ALL_MS: u64 = 30_000;
/// Requests per second of a node below which nothing is done.
const BUSY_MIN: u64 = 50;
/// Of the load of the busiest node, what may be left on either of the two: 3 / 4.
const LEFT_MAX: (u64, u64) = (3, 4);

/// What a coordinator has carried out since it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Counted {
    pub(crate) volume: String,
    pub(crate) term: u64,
    pub(crate) requests: u64,
}

/// A coordinator that should move, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Proposal {
    pub(crate) volume: String,
    pub(crate) to: String,
    pub(crate) reason: String,
}

/// What was seen so far.
#[derive(Debug, Default)]
pub(crate) struct Balance {
    /// By volume: term, requests counted, requests per second since the look before.
    seen: BTreeMap<String, (u64, u64, Option<u64>)>,
    /// By volume: since when it is where it is.
    since: BTreeMap<String, (NodeId, u64)>,
    last_move_ms: Option<u64>,
    wanted: Option<(String, NodeId)>,
    looks: u32,
    last_look_ms: Option<u64>,
}

impl Balance {
    /// Takes what was counted at `now_ms`; gives a move that should be made now.
    pub(crate) fn look(
        &mut self,
        now_ms: u64,
        state: &ClusterState,
        counted: &[Counted],
    ) -> Option<Proposal> {
        self.measure(now_ms, counted);
        self.note_owners(now_ms, state);
        let wanted = self.wish(now_ms, state);
        let same = wanted.as_ref().map(|(volume, to, _)| (volume.clone(), to.id));
        self.looks = if same.is_some() && same == self.wanted { self.looks + 1 } else { 1 };
        self.wanted = same;
        let (volume, to, reason) = wanted.filter(|_| self.looks >= LOOKS_MIN)?;
        self.looks = 0;
        self.last_move_ms = Some(now_ms);
        Some(Proposal { volume, to: to.name.clone(), reason })
    }

    fn measure(&mut self, now_ms: u64, counted: &[Counted]) {
        let elapsed_ms = self.last_look_ms.map(|last| now_ms.saturating_sub(last)).filter(|ms| *ms > 0);
        self.last_look_ms = Some(now_ms);
        let before = std::mem::take(&mut self.seen);
        for now in counted {
            let rate = before.get(&now.volume).zip(elapsed_ms).and_then(|((term, requests, _), ms)| {
                // Another term counts from its own beginning.
                (*term == now.term).then(|| now.requests.saturating_sub(*requests).saturating_mul(1000) / ms)
            });
            self.seen.insert(now.volume.clone(), (now.term, now.requests, rate));
        }
    }

    fn note_owners(&mut self, now_ms: u64, state: &ClusterState) {
        self.since.retain(|name, _| state.volumes.contains_key(name));
        for volume in state.volumes.values() {
            let known = self.since.get(&volume.name);
            match known {
                Some((owner, _)) if *owner == volume.owner => {}
                // Where it was found first it may have been for long.
                None => drop(self.since.insert(volume.name.clone(), (volume.owner, 0))),
                Some(_) => {
                    self.since.insert(volume.name.clone(), (volume.owner, now_ms));
                    self.last_move_ms = Some(now_ms);
                }
            }
        }
    }

    /// The best move that the rules allow now, but for how long it was so.
    fn wish<'a>(&self, now_ms: u64, state: &'a ClusterState) -> Option<(String, &'a Member, String)> {
        let rested = |since: u64, rest: u64| since == 0 || now_ms.saturating_sub(since) >= rest;
        if self.last_move_ms.is_some_and(|last| !rested(last.max(1), REST_OF_ALL_MS)) {
            return None;
        }
        let load = |node: NodeId| -> u64 {
            state.volumes.values().filter(|volume| volume.owner == node).map(|volume| self.rate(volume)).sum()
        };
        let (busy, most) = state.open_members().map(|it| (it, load(it.id))).max_by_key(|(_, load)| *load)?;
        let (idle, least) = state.open_members().map(|it| (it, load(it.id))).min_by_key(|(_, load)| *load)?;
        if most < BUSY_MIN || busy.id == idle.id {
            return None;
        }
        let after = |volume: &VolumeRecord| {
            let rate = self.rate(volume);
            (most - rate).max(least.saturating_add(rate))
        };
        let may_move = |volume: &&VolumeRecord| {
            volume.owner == busy.id
                && volume.state == VolumeState::Online
                && self.since.get(&volume.name).is_some_and(|(_, since)| rested(*since, REST_MS))
        };
        let best = state
            .volumes
            .values()
            .filter(may_move)
            .min_by_key(|volume| (after(volume), self.rate(volume)))?;
        let (part, whole) = LEFT_MAX;
        if after(best).saturating_mul(whole) > most.saturating_mul(part) {
            return None;
        }
        let reason = format!(
            "to balance the load: the coordinators of {} carry out {most} requests/s, {} of them for this volume, those of {} {least}",
            view::node_name(state, busy.id),
            self.rate(best),
            view::node_name(state, idle.id),
        );
        Some((best.name.clone(), idle, reason))
    }

    fn rate(&self, volume: &VolumeRecord) -> u64 {
        match self.seen.get(&volume.name) {
            Some((term, _, Some(rate))) if *term == volume.term.0 => *rate,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use lockmgr::cluster::{FenceKind, MemberState};
    use lockmgr::{Epoch, Term, VolumeId};
    use uuid::Uuid;

    use super::*;

    /// A cluster whose volumes have constant or changing loads, and that follows the proposals.
    struct World {
        state: ClusterState,
        balance: Balance,
        now_ms: u64,
        requests: BTreeMap<String, u64>,
        moves: Vec<(u64, String)>,
    }

    impl World {
        fn new(nodes: u16, volumes: &[(&str, u16)]) -> Self {
            let mut state = ClusterState::default();
            for id in 1..=nodes {
                let member = Member {
                    id: NodeId(id),
                    name: format!("n{id}"),
                    address: String::new(),
                    epoch: Epoch(1),
                    state: MemberState::Up,
                    joined_ms: 0,
                };
                state.members.insert(NodeId(id), member);
            }
            for (name, owner) in volumes {
                let volume = VolumeRecord {
                    name: (*name).into(),
                    id: VolumeId(Uuid::nil()),
                    lun_uri: String::new(),
                    owner: NodeId(*owner),
                    owner_epoch: Epoch(1),
                    term: Term(1),
                    fence_kind: FenceKind::Agent,
                    state: VolumeState::Online,
                    reason: String::new(),
                };
                state.volumes.insert((*name).into(), volume);
            }
            Self {
                state,
                balance: Balance::default(),
                now_ms: 0,
                requests: BTreeMap::new(),
                moves: Vec::new(),
            }
        }

        /// One look, with these requests per second.
        fn look(&mut self, rates: &BTreeMap<String, u64>) -> Option<Proposal> {
            self.now_ms += LOOK_MS;
            for (name, rate) in rates {
                *self.requests.entry(name.clone()).or_default() += rate * LOOK_MS / 1000;
            }
            let counted: Vec<_> = self
                .state
                .volumes
                .values()
                .map(|volume| Counted {
                    volume: volume.name.clone(),
                    term: volume.term.0,
                    requests: self.requests.get(&volume.name).copied().unwrap_or_default(),
                })
                .collect();
            let proposal = self.balance.look(self.now_ms, &self.state, &counted)?;
            let to =
                self.state.members.values().find(|member| member.name == proposal.to).expect("a member").id;
            let volume = self.state.volumes.get_mut(&proposal.volume).expect("a volume");
            assert_ne!(volume.owner, to);
            (volume.owner, volume.term) = (to, Term(volume.term.0 + 1));
            self.requests.insert(proposal.volume.clone(), 0);
            self.moves.push((self.now_ms, proposal.volume.clone()));
            Some(proposal)
        }

        fn looks(&mut self, count: usize, rates: &BTreeMap<String, u64>) -> usize {
            (0..count).filter(|_| self.look(rates).is_some()).count()
        }
    }

    fn rates(of: &[(&str, u64)]) -> BTreeMap<String, u64> {
        of.iter().map(|(name, rate)| ((*name).into(), *rate)).collect()
    }

    #[test]
    fn of_two_busy_volumes_on_one_node_one_moves_with_a_reason_and_only_after_several_looks() {
        let mut world = World::new(3, &[("a", 1), ("b", 1)]);
        let busy = rates(&[("a", 400), ("b", 300)]);
        assert_eq!(world.looks(3, &busy), 0, "a burst is not enough");
        let moved = world.look(&busy).expect("one moves");
        assert_eq!((moved.volume.as_str(), moved.to.as_str()), ("b", "n2"));
        assert!(moved.reason.contains("700 requests/s") && moved.reason.contains("n1"), "{}", moved.reason);
        assert_eq!(world.looks(500, &busy), 0, "and stays");
    }

    #[test]
    fn one_busy_volume_moves_nowhere_and_an_idle_cluster_stays_as_it_is() {
        assert_eq!(World::new(3, &[("a", 1)]).looks(200, &rates(&[("a", 9000)])), 0);
        assert_eq!(World::new(3, &[("a", 1), ("b", 1)]).looks(200, &rates(&[("a", 20), ("b", 20)])), 0);
    }

    #[test]
    fn nothing_moves_to_a_node_that_is_drained() {
        use lockmgr::cluster::{Drain, DrainPhase};
        let mut world = World::new(2, &[("a", 1), ("b", 1)]);
        let drain = Drain {
            step: 1,
            phase: DrainPhase::Drained,
            for_good: false,
            volumes: Default::default(),
            vms: Default::default(),
            stuck: BTreeMap::new(),
        };
        world.state.drains.insert(NodeId(2), drain);
        assert_eq!(world.looks(100, &rates(&[("a", 400), ("b", 300)])), 0);
    }

    /// A small generator: the same numbers for the same seed.
    fn random(seed: &mut u64) -> u64 {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        *seed
    }

    #[test]
    fn whatever_the_loads_do_no_volume_is_thrown_to_and_fro() {
        let names = ["a", "b", "c", "d", "e", "f"];
        for seed in 1..60 {
            let mut seed = seed * 0x9e37_79b9;
            let placed: Vec<_> =
                names.map(|name| (name, u16::try_from(random(&mut seed) % 3 + 1).expect("small"))).into();
            let mut world = World::new(3, &placed);
            for _ in 0..400 {
                let now: Vec<_> = names.map(|name| (name, random(&mut seed) % 2000)).into();
                world.look(&rates(&now));
            }
            for (at, (when, volume)) in world.moves.iter().enumerate() {
                let again = world.moves[at + 1..].iter().find(|(_, other)| other == volume);
                assert!(
                    again.is_none_or(|(then, _)| then - when >= REST_MS),
                    "{volume} moved again too soon"
                );
            }
            // Loads that stay lead to a state that stays.
            let still: Vec<_> = names.map(|name| (name, random(&mut seed) % 2000)).into();
            world.looks(2000, &rates(&still));
            assert_eq!(world.looks(500, &rates(&still)), 0, "it comes to rest");
        }
    }
}
