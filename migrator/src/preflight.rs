//! What must be right before a VM may move: what it needs, compared with what the target is and has.
//!
//! Nothing is changed by it; `vm check-migrate` shows the same list that a move would be refused with.

use std::collections::BTreeMap;
use std::fmt;

use hv::{Cpu, CpuProblem};
use lockmgr::NodeId;

use crate::PROTOCOL_VERSION;

/// What a VM needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Where it runs.
    pub from: NodeId,
    /// Where it is to go.
    pub to: NodeId,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// Its disks and its saved state: (volume, path).
    pub paths: Vec<(String, String)>,
    /// Version of the devices that its drivers found when it booted.
    pub devices: u32,
    /// The processor that it was given when it booted.
    pub cpu: Cpu,
}

/// What a node is and has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Why `/dev/kvm` cannot be used, if so.
    pub kvm_problem: Option<String>,
    /// RAM that a new VM can have, in bytes.
    pub memory_available_bytes: u64,
    /// CPUs of the machine.
    pub cpus: u32,
    /// Mounted volumes.
    pub volumes: Vec<String>,
    /// For each path that was asked for, why it cannot be opened, if so.
    pub paths: BTreeMap<(String, String), Option<String>>,
    /// Oldest protocol version it speaks.
    pub version_min: u32,
    /// Newest protocol version it speaks.
    pub version_max: u32,
    /// What it can give to a guest as a processor.
    pub cpu: Cpu,
    /// Whether its memory streams take pages as differences. Releases before do not say so, and do not.
    pub takes_deltas: bool,
    /// Newest version of a VM's devices. Releases before do not say so, and have the first one.
    pub devices: u32,
}

/// Something that stands against a move.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Problem {
    /// Source and target are the same.
    SameNode(NodeId),
    /// The target does not answer or is not an `up` member.
    NodeDown {
        /// The target.
        node: NodeId,
        /// What is known.
        reason: String,
    },
    /// No KVM there.
    Kvm(String),
    /// Too little memory there.
    Memory {
        /// What the VM has.
        needed_bytes: u64,
        /// What the target can give.
        available_bytes: u64,
    },
    /// More virtual CPUs than the machine has.
    Cpus {
        /// What the VM has.
        needed: u32,
        /// What the target has.
        available: u32,
    },
    /// A volume is not mounted there.
    Volume(String),
    /// A disk cannot be opened there.
    Path {
        /// Its volume.
        volume: String,
        /// Its path.
        path: String,
        /// Why not.
        reason: String,
    },
    /// The nodes speak different versions.
    Protocol {
        /// Of this node.
        own: u32,
        /// Oldest of the target.
        min: u32,
        /// Newest of the target.
        max: u32,
    },
    /// Its drivers use what the devices there do not have.
    Devices {
        /// Version that they found.
        needed: u32,
        /// Newest one there.
        available: u32,
    },
    /// The CPU there cannot go on with what the guest was given here.
    Cpu(CpuProblem),
}

impl Problem {
    /// Which kind of problem, for programs: these words do not change.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::SameNode(_) => "same_node",
            Self::NodeDown { .. } => "node_down",
            Self::Kvm(_) => "kvm",
            Self::Memory { .. } => "memory",
            Self::Cpus { .. } => "cpus",
            Self::Volume(_) => "volume",
            Self::Path { .. } => "disk",
            Self::Protocol { .. } => "version",
            Self::Devices { .. } => "devices",
            Self::Cpu(problem) => problem.kind(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: u64 = 1 << 20;
        match self {
            Self::SameNode(node) => write!(f, "it is on node {node} already"),
            Self::NodeDown { node, reason } => write!(f, "node {node} cannot take it: {reason}"),
            Self::Kvm(reason) => write!(f, "KVM cannot be used there: {reason}"),
            Self::Memory { needed_bytes, available_bytes } => {
                let (needed, available) = (needed_bytes / MIB, available_bytes / MIB);
                write!(f, "it needs {needed} MiB of memory, {available} MiB are free there")
            }
            Self::Cpus { needed, available } => {
                write!(f, "it has {needed} CPUs, the machine there has {available}")
            }
            Self::Volume(name) => write!(f, "volume {name} is not mounted there"),
            Self::Path { volume, path, reason } => {
                write!(f, "{path} on volume {volume} cannot be opened there: {reason}")
            }
            Self::Protocol { own, min, max } => {
                write!(
                    f,
                    "this node speaks migration version {own}, the other {min} to {max}; upgrade the older one"
                )
            }
            Self::Devices { needed, available } => write!(
                f,
                "its drivers use virtual devices of version {needed}, the node has them up to {available}; upgrade that node, or start the VM anew"
            ),
            Self::Cpu(problem) => problem.fmt(f),
        }
    }
}

/// Everything that stands against the move; empty when it may begin.
#[must_use]
pub fn check(needs: &Needs, target: &Facts) -> Vec<Problem> {
    let mut problems = Vec::new();
    if needs.from == needs.to {
        problems.push(Problem::SameNode(needs.to));
    }
    if !(target.version_min..=target.version_max).contains(&PROTOCOL_VERSION) {
        let (min, max) = (target.version_min, target.version_max);
        problems.push(Problem::Protocol { own: PROTOCOL_VERSION, min, max });
    }
    problems.extend(target.kvm_problem.clone().map(Problem::Kvm));
    if needs.memory_bytes > target.memory_available_bytes {
        let (needed_bytes, available_bytes) = (needs.memory_bytes, target.memory_available_bytes);
        problems.push(Problem::Memory { needed_bytes, available_bytes });
    }
    if needs.cpus > target.cpus {
        problems.push(Problem::Cpus { needed: needs.cpus, available: target.cpus });
    }
    problems.extend(path_problems(needs, target));
    problems.extend(given_problems(needs.devices, Some(&needs.cpu), target));
    problems
}

/// What stands against going on with a guest that was given these devices and this processor, if that is known.
#[must_use]
pub fn check_guest(devices: u32, cpu: Option<&Cpu>, node: &Facts) -> Vec<Problem> {
    match &node.kvm_problem {
        // What it would give otherwise is not known either.
        Some(problem) => vec![Problem::Kvm(problem.clone())],
        None => given_problems(devices, cpu, node),
    }
}

fn given_problems(devices: u32, cpu: Option<&Cpu>, node: &Facts) -> Vec<Problem> {
    let newer =
        (devices > node.devices).then_some(Problem::Devices { needed: devices, available: node.devices });
    let lacking = cpu.map(|cpu| cpu.problems_on(&node.cpu)).unwrap_or_default();
    newer.into_iter().chain(lacking.into_iter().map(Problem::Cpu)).collect()
}

fn path_problems(needs: &Needs, target: &Facts) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (volume, path) in &needs.paths {
        if !target.volumes.contains(volume) {
            let missing = Problem::Volume(volume.clone());
            if !problems.contains(&missing) {
                problems.push(missing);
            }
            continue;
        }
        let reason = match target.paths.get(&(volume.clone(), path.clone())) {
            Some(None) => continue,
            Some(Some(reason)) => reason.clone(),
            None => "the node did not say whether it is there".to_owned(),
        };
        problems.push(Problem::Path { volume: volume.clone(), path: path.clone(), reason });
    }
    problems
}

#[cfg(test)]
mod tests {
    use hv::cpu::{Register, Registers};

    use super::*;

    fn disk() -> (String, String) {
        ("vol".to_owned(), "vm/disk.vhdx".to_owned())
    }

    fn cpu() -> Cpu {
        let vendor = Registers { eax: 0x20, ebx: 0x756e_6547, edx: 0x4965_6e69, ecx: 0x6c65_746e };
        Cpu::from_leaves([((0, 0), vendor), ((1, 0), Registers { eax: 7, ebx: 9, ecx: 0xff, edx: 0xff })])
    }

    fn needs() -> Needs {
        Needs {
            from: NodeId(1),
            to: NodeId(2),
            memory_bytes: 64 << 20,
            cpus: 1,
            paths: vec![disk()],
            devices: 1,
            cpu: cpu(),
        }
    }

    fn facts() -> Facts {
        Facts {
            kvm_problem: None,
            memory_available_bytes: 1 << 30,
            cpus: 2,
            volumes: vec!["vol".to_owned()],
            paths: BTreeMap::from([(disk(), None)]),
            version_min: PROTOCOL_VERSION,
            version_max: PROTOCOL_VERSION,
            cpu: cpu(),
            takes_deltas: true,
            devices: 1,
        }
    }

    #[test]
    fn a_target_that_has_everything_is_accepted() {
        assert_eq!(check(&needs(), &facts()), []);
    }

    #[test]
    fn each_thing_that_is_missing_is_named() {
        let lacking = Facts {
            kvm_problem: Some("no such device".to_owned()),
            memory_available_bytes: 1,
            cpus: 0,
            paths: BTreeMap::from([(disk(), Some("no such file".to_owned()))]),
            version_min: PROTOCOL_VERSION + 1,
            version_max: PROTOCOL_VERSION + 2,
            ..facts()
        };
        let problems: Vec<String> = check(&needs(), &lacking).iter().map(ToString::to_string).collect();
        for part in ["version 4", "no such device", "64 MiB", "1 CPUs", "no such file"] {
            assert!(problems.iter().any(|problem| problem.contains(part)), "{part}: {problems:?}");
        }
        assert_eq!(problems.len(), 5);
        let unmounted = Facts { volumes: vec![], ..facts() };
        assert_eq!(check(&needs(), &unmounted), [Problem::Volume("vol".to_owned())]);
        let silent = Facts { paths: BTreeMap::new(), ..facts() };
        assert!(matches!(check(&needs(), &silent)[..], [Problem::Path { .. }]));
        assert_eq!(check(&Needs { to: NodeId(1), ..needs() }, &facts()), [Problem::SameNode(NodeId(1))]);
    }

    // Invariant G4
    #[test]
    fn a_guest_that_has_found_newer_devices_does_not_go_to_an_older_release() {
        let older = Facts { devices: 0, ..facts() };
        let found = check(&needs(), &older);
        assert_eq!(found, [Problem::Devices { needed: 1, available: 0 }]);
        assert_eq!(found[0].kind(), "devices");
        assert_eq!(check(&Needs { devices: 0, ..needs() }, &older), [], "one that has not goes");
    }

    #[test]
    fn a_saved_guest_goes_on_only_where_there_is_what_it_was_given() {
        let lacking = Facts { devices: 0, cpu: cpu().without((1, 0), Register::Ecx, 0x80), ..facts() };
        let kinds = |problems: Vec<Problem>| problems.iter().map(Problem::kind).collect::<Vec<_>>();
        assert_eq!(kinds(check_guest(1, Some(&cpu()), &facts())), [""; 0]);
        assert_eq!(kinds(check_guest(1, Some(&cpu()), &lacking)), ["devices", "cpu_features"]);
        assert_eq!(kinds(check_guest(0, None, &lacking)), [""; 0], "loading tells what is not known");
        let without_kvm = Facts { kvm_problem: Some("no such device".to_owned()), ..lacking };
        assert_eq!(kinds(check_guest(1, Some(&cpu()), &without_kvm)), ["kvm"]);
    }

    #[test]
    fn a_cpu_with_less_is_refused_and_one_with_more_is_not() {
        let less = Facts { cpu: cpu().without((1, 0), Register::Ecx, 0x80), ..facts() };
        let found = check(&needs(), &less);
        assert!(
            matches!(found[..], [Problem::Cpu(CpuProblem::Features { leaf: 1, missing: 0x80, .. })]),
            "{found:?}"
        );
        assert_eq!(found[0].kind(), "cpu_features");
        let modest = Needs { cpu: cpu().without((1, 0), Register::Ecx, 0x80), ..needs() };
        assert_eq!(check(&modest, &facts()), []);
    }
}
