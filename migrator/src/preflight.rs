//! What must be right before a VM may move: what it needs, compared with what the target is and has.
//!
//! Nothing is changed by it; `vm check-migrate` shows the same list that a move would be refused with.

use std::collections::BTreeMap;
use std::fmt;

use lockmgr::NodeId;

use crate::PROTOCOL_VERSION;

/// Registers of one CPUID leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Registers {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// A node's CPU as a guest would see it: CPUID leaves by (leaf, subleaf).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Cpu {
    leaves: BTreeMap<(u32, u32), Registers>,
}

/// Most leaves of one CPU that are taken from a message.
pub(crate) const CPU_LEAVES_MAX: usize = 64;

const VENDOR: (u32, u32) = (0, 0);
const XSAVE: (u32, u32) = (0xd, 0);
const ADDRESS_BITS: (u32, u32) = (0x8000_0008, 0);

/// Leaves whose bits are features, with the registers that hold them: a guest that saw a bit needs it at the target.
const FEATURES: [((u32, u32), &[Register]); 7] = [
    ((1, 0), &[Register::Ecx, Register::Edx]),
    ((7, 0), &[Register::Ebx, Register::Ecx, Register::Edx]),
    ((7, 1), &[Register::Eax, Register::Ecx, Register::Edx]),
    ((7, 2), &[Register::Edx]),
    ((0xd, 1), &[Register::Eax]),
    ((0x8000_0001, 0), &[Register::Ecx, Register::Edx]),
    ((0x8000_0007, 0), &[Register::Edx]),
];

/// Bits that tell of the moment or of the operating system, not of the CPU: OSXSAVE in leaf 1 and OSPKE in leaf 7.
const NOT_FEATURES: [((u32, u32), Register, u32); 2] =
    [((1, 0), Register::Ecx, 1 << 27), ((7, 0), Register::Ecx, 1 << 4)];

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Register {
    fn of(self, registers: Registers) -> u32 {
        match self {
            Self::Eax => registers.eax,
            Self::Ebx => registers.ebx,
            Self::Ecx => registers.ecx,
            Self::Edx => registers.edx,
        }
    }
}

impl Cpu {
    /// From leaves, such as KVM's list of what it supports. Leaves that are not compared are left out.
    pub fn from_leaves(leaves: impl IntoIterator<Item = ((u32, u32), Registers)>) -> Self {
        let compared = |at: &(u32, u32)| {
            [VENDOR, XSAVE, ADDRESS_BITS].contains(at) || FEATURES.iter().any(|(leaf, _)| leaf == at)
        };
        Self { leaves: leaves.into_iter().filter(|(at, _)| compared(at)).collect() }
    }

    /// The CPU of this machine, as it tells of itself.
    #[cfg(target_arch = "x86_64")]
    #[must_use]
    pub fn of_this_machine() -> Self {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        let (basic, extended) = (__cpuid(0).eax, __cpuid(0x8000_0000).eax);
        let wanted = FEATURES.iter().map(|(at, _)| *at).chain([VENDOR, XSAVE, ADDRESS_BITS]);
        let present = wanted.filter(|(leaf, _)| *leaf <= if *leaf < 0x8000_0000 { basic } else { extended });
        Self::from_leaves(present.map(|(leaf, subleaf)| {
            let raw = __cpuid_count(leaf, subleaf);
            ((leaf, subleaf), Registers { eax: raw.eax, ebx: raw.ebx, ecx: raw.ecx, edx: raw.edx })
        }))
    }

    /// The compared leaves.
    pub fn leaves(&self) -> impl Iterator<Item = ((u32, u32), Registers)> {
        self.leaves.iter().map(|(at, registers)| (*at, *registers))
    }

    /// Such as `GenuineIntel`.
    #[must_use]
    pub fn vendor(&self) -> String {
        let raw = self.leaf(VENDOR);
        let bytes: Vec<u8> = [raw.ebx, raw.edx, raw.ecx].iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.into_iter().filter(u8::is_ascii_graphic).map(char::from).collect()
    }

    fn leaf(&self, at: (u32, u32)) -> Registers {
        self.leaves.get(&at).copied().unwrap_or_default()
    }

    fn features(&self, at: (u32, u32), register: Register) -> u32 {
        let not = NOT_FEATURES.iter().filter(|(leaf, reg, _)| *leaf == at && *reg == register);
        let mask = not.fold(0, |mask, (_, _, bits)| mask | bits);
        register.of(self.leaf(at)) & !mask
    }

    /// Why a guest that was started on `self` cannot go on on `target`.
    fn problems_on(&self, target: &Self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.vendor() != target.vendor() {
            problems.push(Problem::CpuVendor { source: self.vendor(), target: target.vendor() });
            return problems;
        }
        for (at, registers) in FEATURES {
            for register in registers {
                let missing = self.features(at, *register) & !target.features(at, *register);
                if missing != 0 {
                    problems.push(Problem::CpuFeatures {
                        leaf: at.0,
                        subleaf: at.1,
                        register: *register,
                        missing,
                    });
                }
            }
        }
        // Leaf 0xd: components in EDX:EAX, the size of all of them in ECX. Leaf 0x80000008: address bits.
        let (here, there) = (self.leaf(XSAVE), target.leaf(XSAVE));
        if here.eax & !there.eax != 0 || here.edx & !there.edx != 0 || here.ecx > there.ecx {
            problems.push(Problem::CpuXsave { source_bytes: here.ecx, target_bytes: there.ecx });
        }
        let bits = |cpu: &Self| cpu.leaf(ADDRESS_BITS).eax & 0xff;
        if bits(self) > bits(target) {
            problems.push(Problem::CpuAddressBits { source: bits(self), target: bits(target) });
        }
        problems
    }
}

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
    /// The CPU that it was started on.
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
    /// Its CPU.
    pub cpu: Cpu,
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
    /// Another maker.
    CpuVendor {
        /// Here.
        source: String,
        /// There.
        target: String,
    },
    /// Features that the guest may use and the target lacks.
    CpuFeatures {
        /// CPUID leaf.
        leaf: u32,
        /// CPUID subleaf.
        subleaf: u32,
        /// Register.
        register: Register,
        /// The bits.
        missing: u32,
    },
    /// The target cannot hold the guest's extended registers.
    CpuXsave {
        /// Bytes of them here.
        source_bytes: u32,
        /// Bytes of them there.
        target_bytes: u32,
    },
    /// Fewer physical address bits there.
    CpuAddressBits {
        /// Here.
        source: u32,
        /// There.
        target: u32,
    },
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
            Self::CpuVendor { .. } => "cpu_vendor",
            Self::CpuFeatures { .. } => "cpu_features",
            Self::CpuXsave { .. } => "cpu_xsave",
            Self::CpuAddressBits { .. } => "cpu_address_bits",
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
            Self::CpuVendor { source, target } => write!(f, "the CPU here is {source}, there {target}"),
            Self::CpuFeatures { leaf, subleaf, register, missing } => write!(
                f,
                "the CPU there lacks features that the guest may use: CPUID {leaf:#x}.{subleaf} {register:?} bits {missing:#010x}"
            ),
            Self::CpuXsave { source_bytes, target_bytes } => write!(
                f,
                "the extended CPU state differs: {source_bytes} bytes here, {target_bytes} there, or other components"
            ),
            Self::CpuAddressBits { source, target } => {
                write!(f, "the CPU here has {source} physical address bits, there {target}")
            }
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
    problems.extend(needs.cpu.problems_on(&target.cpu));
    problems
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
    use super::*;

    fn disk() -> (String, String) {
        ("vol".to_owned(), "vm/disk.vhdx".to_owned())
    }

    fn cpu() -> Cpu {
        Cpu::from_leaves([
            (VENDOR, Registers { eax: 0x20, ebx: 0x756e_6547, edx: 0x4965_6e69, ecx: 0x6c65_746e }),
            ((1, 0), Registers { eax: 7, ebx: 9, ecx: 0xff, edx: 0xff }),
            (XSAVE, Registers { eax: 7, ebx: 832, ecx: 832, edx: 0 }),
            (ADDRESS_BITS, Registers { eax: 0x3027, ..Registers::default() }),
        ])
    }

    fn needs() -> Needs {
        Needs {
            from: NodeId(1),
            to: NodeId(2),
            memory_bytes: 64 << 20,
            cpus: 1,
            paths: vec![disk()],
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
        }
    }

    fn with_cpu(change: impl FnOnce(&mut BTreeMap<(u32, u32), Registers>)) -> Facts {
        let mut facts = facts();
        change(&mut facts.cpu.leaves);
        facts
    }

    #[test]
    fn a_target_that_has_everything_is_accepted() {
        assert_eq!(check(&needs(), &facts()), []);
        assert_eq!(cpu().vendor(), "GenuineIntel");
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
        for part in ["version 2", "no such device", "64 MiB", "1 CPUs", "no such file"] {
            assert!(problems.iter().any(|problem| problem.contains(part)), "{part}: {problems:?}");
        }
        assert_eq!(problems.len(), 5);
        let unmounted = Facts { volumes: vec![], ..facts() };
        assert_eq!(check(&needs(), &unmounted), [Problem::Volume("vol".to_owned())]);
        let silent = Facts { paths: BTreeMap::new(), ..facts() };
        assert!(matches!(check(&needs(), &silent)[..], [Problem::Path { .. }]));
        assert_eq!(check(&Needs { to: NodeId(1), ..needs() }, &facts()), [Problem::SameNode(NodeId(1))]);
    }

    #[test]
    fn a_cpu_with_less_is_refused_and_one_with_more_is_not() {
        let less = with_cpu(|leaves| leaves.get_mut(&(1, 0)).expect("set").ecx = 0x7f);
        let missing = Problem::CpuFeatures { leaf: 1, subleaf: 0, register: Register::Ecx, missing: 0x80 };
        assert_eq!(check(&needs(), &less), [missing]);
        let more = with_cpu(|leaves| leaves.get_mut(&(1, 0)).expect("set").ecx = 0x1ff);
        assert_eq!(check(&needs(), &more), []);
        let small = with_cpu(|leaves| leaves.get_mut(&XSAVE).expect("set").eax = 3);
        assert!(matches!(check(&needs(), &small)[..], [Problem::CpuXsave { .. }]));
        let narrow = with_cpu(|leaves| leaves.get_mut(&ADDRESS_BITS).expect("set").eax = 0x3024);
        assert_eq!(check(&needs(), &narrow), [Problem::CpuAddressBits { source: 39, target: 36 }]);
        let other = with_cpu(|leaves| leaves.get_mut(&VENDOR).expect("set").ebx = 0x6874_7541);
        assert!(matches!(check(&needs(), &other)[..], [Problem::CpuVendor { .. }]));
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_machine_suits_itself() {
        let here = Cpu::of_this_machine();
        assert!(!here.vendor().is_empty());
        assert_eq!(here.problems_on(&here.clone()), []);
    }
}
