//! Rounds: a fault, whom it hits, its repair, and what the oracles say afterwards.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::counter::Counter;
use super::guard::Waker;
use super::hands::Hands;
use super::load::Load;
use super::{Dice, last, until};
use crate::{Cluster, Ctl};

const NODES: usize = 3;
/// Steps that each program must get further before the load counts as going on.
const STEPS_ON: u64 = 3;

/// What happens to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Its processes are killed.
    Kill,
    /// It freezes, is fenced, and is woken afterwards: nothing of it may get through.
    Hang,
    /// It freezes for a moment and goes on: it may have been fenced or not.
    Pause,
    /// Its network is cut and mended: its heartbeats on the LUN keep it from being fenced.
    Partition,
    /// Its paths to the LUN are cut and mended.
    LunLoss,
    /// Both: it is fenced.
    Isolation,
}

impl Fault {
    const ALL: [Self; 6] =
        [Self::Kill, Self::Hang, Self::Pause, Self::Partition, Self::LunLoss, Self::Isolation];
}

/// Whom a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The volume's coordinator, while another node leads the cluster.
    Coordinator,
    /// The leader, while another node coordinates the volume.
    Leader,
    /// A node that is both.
    Both,
    /// A node that is neither.
    Bystander,
}

impl Target {
    const ALL: [Self; 4] = [Self::Coordinator, Self::Leader, Self::Both, Self::Bystander];
}

/// What a round came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Which fault.
    pub fault: Fault,
    /// Whom it hit.
    pub target: Target,
    /// Whether the node was fenced.
    pub died: bool,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = if self.died { "died and came back" } else { "lived through it" };
        write!(f, "{:?} of {:?}: {end}", self.fault, self.target)
    }
}

/// A run of rounds on one cluster.
#[derive(Debug)]
pub struct Rounds {
    cluster: Cluster,
    hands: Hands,
    loads: Vec<Load>,
    dice: Dice,
}

impl Rounds {
    /// Starts a cluster and its load. What follows depends on `seed`, and on what the machine does.
    ///
    /// # Errors
    /// What the load has met before anything was done to it.
    pub fn begin(seed: u64) -> Result<Self, String> {
        let cluster = Cluster::start("2G");
        let hands = Hands::begin()?;
        let counter: Arc<Counter> = Arc::default();
        let load = |number| Load::new(number, cluster.mount(number), Arc::clone(&counter));
        let loads = (1..=NODES).map(load).collect();
        let mut rounds = Self { cluster, hands, loads, dice: Dice::new(seed) };
        for number in 1..=NODES {
            rounds.begin_life(number);
        }
        rounds.all_go_on(&[])?;
        Ok(rounds)
    }

    /// One fault from its choice to the verdict of the oracles.
    ///
    /// # Errors
    /// What was lost, or what does not go on.
    pub fn round(&mut self) -> Result<Outcome, String> {
        let (fault, target) = (self.dice.one_of(&Fault::ALL), self.dice.one_of(&Target::ALL));
        self.hit(fault, target).map_err(|error| format!("{fault:?} of {target:?}: {error}"))
    }

    /// A certain fault.
    ///
    /// # Errors
    /// As [`Rounds::round`].
    pub fn hit(&mut self, fault: Fault, target: Target) -> Result<Outcome, String> {
        let victim = self.arrange(target)?;
        let pid_file = self.cluster.dir().join(self.cluster.name(victim)).join("csvd.pid");
        let _waker = Waker::start(&pid_file)?;
        let mut died = match fault {
            Fault::Kill | Fault::Hang | Fault::Isolation => self.end_of(victim, fault)?,
            Fault::Pause => self.pause(victim)?,
            Fault::Partition => self.weather(victim, "partition", "heal")?,
            Fault::LunLoss => self.weather(victim, "lun-fail", "lun-heal")?,
        };
        if died {
            self.bring_back(victim)?;
        }
        if let Err(error) = self.all_go_on(&[]) {
            // A pause may end in a fence a moment after the node went on.
            let fenced = fault == Fault::Pause && !died && self.is_fenced(victim);
            if !fenced {
                return Err(error);
            }
            died = true;
            self.bring_back(victim)?;
            self.all_go_on(&[])?;
        }
        self.ask_the_oracles()?;
        Ok(Outcome { fault, target, died })
    }

    /// Ends the load in order and asks the oracles for the last time.
    ///
    /// # Errors
    /// What was lost.
    pub fn finish(mut self) -> Result<[u64; 3], String> {
        for load in &mut self.loads {
            if let Some(error) = load.end() {
                return Err(error);
            }
        }
        self.ask_the_oracles()?;
        let mut sums = [0; 3];
        for steps in self.loads.iter().map(Load::steps) {
            for (sum, more) in sums.iter_mut().zip(steps) {
                *sum += more;
            }
        }
        Ok(sums)
    }

    /// Ends everything, and leaves the folder with the nodes' logs behind.
    #[must_use]
    pub fn keep(self) -> PathBuf {
        let dir = self.cluster.dir().to_str().expect("a UTF-8 path");
        drop(self.hands.run(&Ctl::local(), &["dev", "down", "--dir", dir]));
        self.cluster.keep()
    }

    /// Moves the coordinator so that there is such a node, and finds it.
    fn arrange(&mut self, target: Target) -> Result<usize, String> {
        let (leader, owner) = (self.leader()?, self.owner()?);
        let other = |not: &[usize]| (1..=NODES).find(|number| !not.contains(number)).expect("three nodes");
        match target {
            Target::Both => {
                self.move_to(owner, leader)?;
                Ok(leader)
            }
            _ if owner == leader => {
                let away = other(&[leader]);
                self.move_to(owner, away)?;
                Ok(match target {
                    Target::Coordinator => away,
                    Target::Leader | Target::Both => leader,
                    Target::Bystander => other(&[leader, away]),
                })
            }
            Target::Coordinator => Ok(owner),
            Target::Leader => Ok(leader),
            Target::Bystander => Ok(other(&[leader, owner])),
        }
    }

    fn move_to(&self, from: usize, to: usize) -> Result<(), String> {
        if from == to {
            return Ok(());
        }
        let moved = self.ask(to, &["volume", "move", "vol1", "--to", &self.cluster.name(to)]);
        moved.map(drop)
    }

    /// Asks a node.
    fn ask(&self, number: usize, arguments: &[&str]) -> Result<Value, String> {
        self.hands.run(&self.cluster.ctl(number), arguments)
    }

    fn leader(&self) -> Result<usize, String> {
        let mut leader = None;
        until("a leader", || {
            let Ok(shown) = self.ask(1, &["cluster", "show"]) else { return Ok(false) };
            leader = self.number_of(&shown["leader"]);
            Ok(leader.is_some())
        })?;
        leader.ok_or_else(|| "no leader".to_owned())
    }

    fn owner(&self) -> Result<usize, String> {
        let shown = self.ask(1, &["volume", "show", "vol1"])?;
        self.number_of(&shown["owner"]).ok_or_else(|| format!("no owner: {shown}"))
    }

    fn number_of(&self, name: &Value) -> Option<usize> {
        (1..=NODES).find(|number| *name == self.cluster.name(*number))
    }

    /// A fault that ends in a fence.
    fn end_of(&mut self, victim: usize, fault: Fault) -> Result<bool, String> {
        match fault {
            Fault::Hang => self.inject(victim, "stop")?,
            Fault::Isolation => {
                self.inject(victim, "lun-fail")?;
                self.inject(victim, "partition")?;
            }
            _ => self.inject(victim, "kill")?,
        }
        self.fenced(victim)?;
        // What is left of it, if anything, is woken. The embedded fence leaves nothing.
        let woken = self.try_inject(victim, "cont");
        if woken.is_ok() {
            return Err("the node was fenced and its daemon is there".to_owned());
        }
        self.all_go_on(&[victim])?;
        Ok(true)
    }

    /// A node that freezes for a moment. Whether it is fenced depends on the moment's length.
    fn pause(&mut self, victim: usize) -> Result<bool, String> {
        let moment = Duration::from_millis(100 + self.dice.below(900));
        self.inject(victim, "stop")?;
        last(moment);
        drop(self.try_inject(victim, "cont"));
        let before = self.loads[victim - 1].steps();
        let mut died = false;
        until("the paused node goes on or is fenced", || {
            died = self.loads[victim - 1].error().is_some() || self.is_fenced(victim);
            Ok(died || goes_on(before, self.loads[victim - 1].steps()))
        })?;
        if died {
            // An error of a program on a node that was not fenced is none that may be.
            self.fenced(victim)?;
            self.all_go_on(&[victim])?;
        }
        Ok(died)
    }

    /// A fault that everybody lives through.
    fn weather(&mut self, victim: usize, fault: &str, repair: &str) -> Result<bool, String> {
        let moment = Duration::from_millis(200 + self.dice.below(2500));
        self.inject(victim, fault)?;
        last(moment);
        self.inject(victim, repair)?;
        Ok(false)
    }

    fn inject(&self, victim: usize, what: &str) -> Result<(), String> {
        self.try_inject(victim, what).map_err(|error| format!("injecting {what}: {error}"))
    }

    fn try_inject(&self, victim: usize, what: &str) -> Result<(), String> {
        let dir = self.cluster.dir().to_str().expect("a UTF-8 path");
        let name = self.cluster.name(victim);
        self.hands.run(&Ctl::local(), &["dev", "fault", &name, what, "--dir", dir]).map(drop)
    }

    /// Waits until the records say that the node is fenced.
    fn fenced(&self, victim: usize) -> Result<(), String> {
        until("the fence", || Ok(self.is_fenced(victim)))
    }

    /// Whether another node says so. One that cannot say just now says no.
    fn is_fenced(&self, victim: usize) -> bool {
        let shown = self.ask(victim % NODES + 1, &["node", "show", &self.cluster.name(victim)]);
        shown.is_ok_and(|shown| shown["state"] == "fenced")
    }

    /// Waits until all programs have got further, but for those of the dead.
    fn all_go_on(&self, dead: &[usize]) -> Result<(), String> {
        let living = || self.loads.iter().enumerate().filter(|(index, _)| !dead.contains(&(index + 1)));
        let before: Vec<_> = living().map(|(_, load)| load.steps()).collect();
        until("the load goes on", || {
            if let Some((index, error)) = living().find_map(|(index, load)| Some((index, load.error()?))) {
                return Err(format!("a program on node {} met an error: {error}", index + 1));
            }
            Ok(living().zip(&before).all(|((_, load), before)| goes_on(*before, load.steps())))
        })
        .map_err(|error| {
            let now: Vec<_> = living().map(|(_, load)| load.steps()).collect();
            format!("{error}; steps {before:?}, now {now:?}")
        })
    }

    /// The node starts again, and so does its load.
    fn bring_back(&mut self, victim: usize) -> Result<(), String> {
        // Its programs have met an error, or meet one now that their mount is gone.
        let met = self.loads[victim - 1].end();
        if let Some(lost) = met.filter(|error| error.contains("LOST")) {
            return Err(lost);
        }
        self.loads[victim - 1].settle(&self.mount_beside(victim))?;
        let (dir, name) = (self.cluster.dir().to_str().expect("a UTF-8 path"), self.cluster.name(victim));
        self.hands.run(&Ctl::local(), &["dev", "start", &name, "--dir", dir])?;
        self.begin_life(victim);
        Ok(())
    }

    fn begin_life(&mut self, number: usize) {
        let seed = self.dice.roll();
        self.loads[number - 1].begin(seed);
    }

    fn mount_beside(&self, number: usize) -> PathBuf {
        self.cluster.mount(number % NODES + 1)
    }

    /// Everything that was acknowledged is there, on every node, and the volume is whole.
    fn ask_the_oracles(&self) -> Result<(), String> {
        for through in 1..=NODES {
            for load in &self.loads {
                load.check(&self.cluster.mount(through))
                    .map_err(|error| format!("{error}, as node {through} shows it"))?;
            }
        }
        let report = self.ask(1, &["volume", "check", "vol1"])?;
        match report["problems"].as_array() {
            Some(problems) if problems.is_empty() => Ok(()),
            _ => Err(format!("LOST: the volume has problems: {report}")),
        }
    }
}

fn goes_on(before: [u64; 3], now: [u64; 3]) -> bool {
    before.iter().zip(now).all(|(before, now)| now >= before + STEPS_ON)
}
