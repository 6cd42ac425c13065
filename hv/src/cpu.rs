//! Processors as data: what a host can give to a guest, the baseline that several hosts can all give, and what stands
//! between a guest's processor and a host.
//!
//! ```text
//!   host A: of_host --.                                      guest: told the baseline's table, whatever host it starts on
//!   host B: of_host --+-- meet --> baseline (frozen, data)
//!   host C: of_host --'             baseline.problems_on(host)   empty: that host can run the guest
//! ```
//! **Invariant:** `a.meet(b)` has problems on neither of them: what is not known to be harmless is kept only where it is equal.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use prost::Message;

use crate::state::{CpuidLeaf, HostCpu, Msr};

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

impl Registers {
    fn from_fn(of: impl Fn(Register) -> u32) -> Self {
        Self {
            eax: of(Register::Eax),
            ebx: of(Register::Ebx),
            ecx: of(Register::Ecx),
            edx: of(Register::Edx),
        }
    }
}

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
    const ALL: [Self; 4] = [Self::Eax, Self::Ebx, Self::Ecx, Self::Edx];

    fn of(self, registers: Registers) -> u32 {
        match self {
            Self::Eax => registers.eax,
            Self::Ebx => registers.ebx,
            Self::Ecx => registers.ecx,
            Self::Edx => registers.edx,
        }
    }

    fn of_mut(self, registers: &mut Registers) -> &mut u32 {
        match self {
            Self::Eax => &mut registers.eax,
            Self::Ebx => &mut registers.ebx,
            Self::Ecx => &mut registers.ecx,
            Self::Edx => &mut registers.edx,
        }
    }
}

impl std::str::FromStr for Register {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = ["eax", "ebx", "ecx", "edx"];
        let at = names.iter().position(|name| *name == text);
        at.map(|at| Self::ALL[at]).ok_or_else(|| format!("{text} is no register: use {}", names.join(", ")))
    }
}

/// Leaf and subleaf.
pub type Leaf = (u32, u32);

/// Leaves of one processor that are taken from a message.
pub const LEAVES_MAX: usize = 256;
/// Feature registers of one processor that are taken from a message.
pub const MSRS_MAX: usize = 64;

const VENDOR: Leaf = (0, 0);
const MODEL: Leaf = (1, 0);
const XSAVE: Leaf = (0xd, 0);
const XSAVE_MORE: Leaf = (0xd, 1);
const KVM: Leaf = (0x4000_0000, 0);
const POWER: Leaf = (0x8000_0007, 0);
const ADDRESS_BITS: Leaf = (0x8000_0008, 0);
const INVARIANT_TSC: u32 = 1 << 8;
/// In leaf 7: register 0x10a is there.
const ARCH_CAPABILITIES_THERE: u32 = 1 << 29;
/// The register that tells which weaknesses a processor does not have.
pub(crate) const ARCH_CAPABILITIES: u32 = 0x10a;
/// Bits of it that tell of a weakness: one host with it is enough.
const WEAKNESSES: u64 = 1 << 2 | 1 << 19;
/// Rates that differ by less than this need no scaling.
const TSC_TOLERANCE_PPM: u64 = 250;
/// Bytes of the state that every processor has, before the components of leaf 0xd.
const XSAVE_FIXED_BYTES: u32 = 576;
/// First component with a leaf of its own.
const XSAVE_FIRST: u32 = 2;

/// Leaves whose bits are features, with the registers that hold them: a guest that saw a bit needs it.
const FEATURES: [(Leaf, &[Register]); 12] = [
    (MODEL, &[Register::Ecx, Register::Edx]),
    ((7, 0), &[Register::Ebx, Register::Ecx, Register::Edx]),
    ((7, 1), &Register::ALL),
    ((7, 2), &[Register::Edx]),
    (XSAVE, &[Register::Eax, Register::Edx]),
    (XSAVE_MORE, &[Register::Eax, Register::Ecx, Register::Edx]),
    ((0x4000_0001, 0), &[Register::Eax]),
    ((0x8000_0001, 0), &[Register::Ecx, Register::Edx]),
    (POWER, &[Register::Ebx, Register::Edx]),
    (ADDRESS_BITS, &[Register::Ebx]),
    ((0x8000_0021, 0), &[Register::Eax]),
    ((0x8000_0022, 0), &[Register::Eax]),
];

/// Registers that say how far something goes: the smallest counts.
const MAXIMA: [(Leaf, Register); 4] = [
    (VENDOR, Register::Eax),
    ((7, 0), Register::Eax),
    (KVM, Register::Eax),
    ((0x8000_0000, 0), Register::Eax),
];

/// Bits that tell of the moment or of a processor's place, not of what it can do: OSXSAVE, APIC on, more than one thread,
/// OSPKE.
const NOT_FEATURES: [(Leaf, Register, u32); 4] = [
    (MODEL, Register::Ecx, 1 << 27),
    (MODEL, Register::Edx, 1 << 9),
    (MODEL, Register::Edx, 1 << 28),
    ((7, 0), Register::Ecx, 1 << 4),
];

/// Leaves that describe a processor without promising anything: caches, addresses of tables, names, places.
fn describes_only(leaf: u32) -> bool {
    matches!(leaf, 0x2 | 0x4 | 0xb | 0x1f | 0x8000_0002..=0x8000_0006 | 0x8000_001d | 0x8000_001e)
}

/// A processor as a guest sees it, and what of the host matters when a guest arrives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Cpu {
    leaves: BTreeMap<Leaf, Registers>,
    /// Feature registers.
    msrs: BTreeMap<u32, u64>,
    /// Rate of the time-stamp counter; 0 when the host does not know.
    tsc_khz: u32,
    /// Whether the host can give a guest another rate.
    tsc_scaling: bool,
}

/// Why a guest cannot go on, or begin, on a host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CpuProblem {
    /// Another maker.
    Vendor {
        /// The guest's.
        guest: String,
        /// The host's.
        host: String,
    },
    /// Features that the guest may use and the host lacks.
    Features {
        /// CPUID leaf.
        leaf: u32,
        /// CPUID subleaf.
        subleaf: u32,
        /// Register.
        register: Register,
        /// The bits.
        missing: u32,
    },
    /// The host knows fewer leaves.
    Maximum {
        /// CPUID leaf whose EAX counts them.
        leaf: u32,
        /// The guest's.
        guest: u32,
        /// The host's.
        host: u32,
    },
    /// A component of the extended state has another place or size.
    Xsave {
        /// Its number.
        component: u32,
    },
    /// Fewer physical address bits.
    AddressBits {
        /// The guest's.
        guest: u32,
        /// The host's.
        host: u32,
    },
    /// The guest relies on the rate of its time-stamp counter, and the host has another one and cannot scale it.
    Tsc {
        /// The guest's.
        guest_khz: u32,
        /// The host's.
        host_khz: u32,
    },
    /// The guest was told that the processor does not have weaknesses that the host's has.
    Weaknesses {
        /// Bits of register 0x10a.
        bits: u64,
    },
}

impl CpuProblem {
    /// Which kind of problem, for programs: these words do not change.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Vendor { .. } => "cpu_vendor",
            Self::Features { .. } => "cpu_features",
            Self::Maximum { .. } => "cpu_leaves",
            Self::Xsave { .. } => "cpu_xsave",
            Self::AddressBits { .. } => "cpu_address_bits",
            Self::Tsc { .. } => "cpu_tsc",
            Self::Weaknesses { .. } => "cpu_weaknesses",
        }
    }
}

impl fmt::Display for CpuProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vendor { guest, host } => write!(f, "the guest's CPU is {guest}, there it is {host}"),
            Self::Features { leaf, subleaf, register, missing } => write!(
                f,
                "the CPU there lacks features that the guest may use: CPUID {leaf:#x}.{subleaf} {register:?} bits {missing:#010x}"
            ),
            Self::Maximum { leaf, guest, host } => {
                write!(
                    f,
                    "the guest may ask for CPUID leaves up to {guest:#x} from {leaf:#x} on, there they end at {host:#x}"
                )
            }
            Self::Xsave { component } => {
                write!(f, "component {component} of the extended CPU state has another place or size there")
            }
            Self::AddressBits { guest, host } => {
                write!(f, "the guest has {guest} physical address bits, the CPU there has {host}")
            }
            Self::Tsc { guest_khz, host_khz } => write!(
                f,
                "the guest relies on a time-stamp counter of {guest_khz} kHz, there it has {host_khz} kHz and cannot be scaled"
            ),
            Self::Weaknesses { bits } => {
                write!(
                    f,
                    "the CPU there has weaknesses that the guest was told not to have: bits {bits:#x} of MSR 0x10a"
                )
            }
        }
    }
}

impl Cpu {
    pub(crate) fn new(
        leaves: impl IntoIterator<Item = (Leaf, Registers)>,
        msrs: impl IntoIterator<Item = (u32, u64)>,
        (tsc_khz, tsc_scaling): (u32, bool),
    ) -> Self {
        Self { leaves: leaves.into_iter().collect(), msrs: msrs.into_iter().collect(), tsc_khz, tsc_scaling }
    }

    /// From leaves alone.
    pub fn from_leaves(leaves: impl IntoIterator<Item = (Leaf, Registers)>) -> Self {
        Self::new(leaves, [], (0, false))
    }

    /// All leaves.
    pub fn leaves(&self) -> impl Iterator<Item = (Leaf, Registers)> {
        self.leaves.iter().map(|(at, registers)| (*at, *registers))
    }

    pub(crate) fn msrs(&self) -> impl Iterator<Item = (u32, u64)> {
        self.msrs.iter().map(|(index, value)| (*index, *value))
    }

    /// As bytes that [`Cpu::decode`] reads.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let leaves = self.leaves().map(|((function, index), it)| CpuidLeaf {
            function,
            index,
            flags: 0,
            eax: it.eax,
            ebx: it.ebx,
            ecx: it.ecx,
            edx: it.edx,
        });
        let host = HostCpu {
            leaves: leaves.collect(),
            msrs: self.msrs().map(|(index, value)| Msr { index, value }).collect(),
            tsc_khz: self.tsc_khz,
            tsc_scaling: self.tsc_scaling,
        };
        host.encode_to_vec()
    }

    /// Reads what [`Cpu::encode`] wrote.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let host = HostCpu::decode(bytes).map_err(|error| format!("a CPU record cannot be read: {error}"))?;
        if host.leaves.len() > LEAVES_MAX || host.msrs.len() > MSRS_MAX {
            return Err("a CPU record has too many entries".to_owned());
        }
        let leaf = |it: &CpuidLeaf| {
            ((it.function, it.index), Registers { eax: it.eax, ebx: it.ebx, ecx: it.ecx, edx: it.edx })
        };
        let msrs = host.msrs.iter().map(|msr| (msr.index, msr.value));
        Ok(Self::new(host.leaves.iter().map(leaf), msrs, (host.tsc_khz, host.tsc_scaling)))
    }

    /// Such as `GenuineIntel`.
    #[must_use]
    pub fn vendor(&self) -> String {
        let raw = self.leaf(VENDOR);
        let bytes: Vec<u8> = [raw.ebx, raw.edx, raw.ecx].iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.into_iter().filter(u8::is_ascii_graphic).map(char::from).collect()
    }

    /// The same without a feature, for rehearsals of a weaker processor.
    #[must_use]
    pub fn without(mut self, at: Leaf, register: Register, bits: u32) -> Self {
        if let Some(registers) = self.leaves.get_mut(&at) {
            *register.of_mut(registers) &= !bits;
        }
        self
    }

    fn leaf(&self, at: Leaf) -> Registers {
        self.leaves.get(&at).copied().unwrap_or_default()
    }

    fn features(&self, at: Leaf, register: Register) -> u32 {
        let not = NOT_FEATURES.iter().filter(|(leaf, reg, _)| *leaf == at && *reg == register);
        let mask = not.fold(0, |mask, (_, _, bits)| mask | bits);
        register.of(self.leaf(at)) & !mask
    }

    fn address_bits(&self) -> u32 {
        self.leaf(ADDRESS_BITS).eax & 0xff
    }

    pub(crate) fn is_intel(&self) -> bool {
        self.vendor() == "GenuineIntel"
    }

    /// As a processor that does not tell which weaknesses it does not have.
    pub(crate) fn without_weaknesses_told(mut self) -> Self {
        self.msrs.remove(&ARCH_CAPABILITIES);
        self.without((7, 0), Register::Edx, ARCH_CAPABILITIES_THERE)
    }

    fn weakness_bits(&self) -> u64 {
        self.msrs.get(&ARCH_CAPABILITIES).copied().unwrap_or(0)
    }

    /// Components of the extended state that have a leaf of their own.
    fn components(&self) -> impl Iterator<Item = u32> {
        let (low, more) = (self.leaf(XSAVE), self.leaf(XSAVE_MORE));
        let bits = u64::from(low.eax | more.ecx) | u64::from(low.edx | more.edx) << 32;
        (XSAVE_FIRST..63).filter(move |component| bits >> component & 1 == 1)
    }

    /// Everything that stands against a guest with this processor on that host.
    #[must_use]
    pub fn problems_on(&self, host: &Self) -> Vec<CpuProblem> {
        if self.vendor() != host.vendor() {
            return vec![CpuProblem::Vendor { guest: self.vendor(), host: host.vendor() }];
        }
        let mut problems = self.missing_on(host);
        for (at, register) in MAXIMA {
            let (guest, host) = (register.of(self.leaf(at)), register.of(host.leaf(at)));
            if guest > host {
                problems.push(CpuProblem::Maximum { leaf: at.0, guest, host });
            }
        }
        for component in self.components() {
            let of = |cpu: &Self| {
                let leaf = cpu.leaf((XSAVE.0, component));
                (leaf.eax, leaf.ebx)
            };
            if of(self) != of(host) {
                problems.push(CpuProblem::Xsave { component });
            }
        }
        if self.address_bits() > host.address_bits() {
            problems.push(CpuProblem::AddressBits { guest: self.address_bits(), host: host.address_bits() });
        }
        if self.relies_on_tsc() && !host.has_rate(self.tsc_khz) {
            problems.push(CpuProblem::Tsc { guest_khz: self.tsc_khz, host_khz: host.tsc_khz });
        }
        let bits = self.weakness_bits() & !host.weakness_bits() & !WEAKNESSES;
        if bits != 0 {
            problems.push(CpuProblem::Weaknesses { bits });
        }
        problems
    }

    fn missing_on(&self, host: &Self) -> Vec<CpuProblem> {
        let mut problems = Vec::new();
        for (at, registers) in FEATURES {
            for register in registers {
                let missing = self.features(at, *register) & !host.features(at, *register);
                if missing != 0 {
                    let (leaf, subleaf) = at;
                    problems.push(CpuProblem::Features { leaf, subleaf, register: *register, missing });
                }
            }
        }
        problems
    }

    fn relies_on_tsc(&self) -> bool {
        self.tsc_khz != 0 && self.leaf(POWER).edx & INVARIANT_TSC != 0
    }

    fn has_rate(&self, khz: u32) -> bool {
        let tolerance = u64::from(khz) * TSC_TOLERANCE_PPM / 1_000_000;
        self.tsc_scaling || u64::from(self.tsc_khz.abs_diff(khz)) <= tolerance
    }

    /// What both can give; nothing when they are of different makers.
    #[must_use]
    pub fn meet(&self, other: &Self) -> Option<Self> {
        if self.vendor() != other.vendor() {
            return None;
        }
        let shared: BTreeSet<Leaf> =
            self.leaves.keys().filter(|at| other.leaves.contains_key(at)).copied().collect();
        let mut met = Self {
            leaves: shared.into_iter().map(|at| (at, self.meet_leaf(other, at))).collect(),
            msrs: BTreeMap::new(),
            tsc_khz: self.tsc_khz,
            tsc_scaling: self.tsc_scaling && other.tsc_scaling,
        };
        met.drop_components_that_differ(self, other);
        if !(self.has_rate(other.tsc_khz) && other.has_rate(self.tsc_khz)) {
            met = met.without(POWER, Register::Edx, INVARIANT_TSC);
        }
        let (ours, theirs) = (self.msrs.get(&ARCH_CAPABILITIES), other.msrs.get(&ARCH_CAPABILITIES));
        if let (Some(ours), Some(theirs)) = (ours, theirs) {
            let value = (ours & theirs) | ((ours | theirs) & WEAKNESSES);
            met.msrs.insert(ARCH_CAPABILITIES, value);
        } else {
            met = met.without_weaknesses_told();
        }
        Some(met)
    }

    fn meet_leaf(&self, other: &Self, at: Leaf) -> Registers {
        let (ours, theirs) = (self.leaf(at), other.leaf(at));
        if ours == theirs || describes_only(at.0) {
            return ours;
        }
        let features =
            FEATURES.iter().find(|(leaf, _)| *leaf == at).map_or(&[][..], |(_, registers)| registers);
        Registers::from_fn(|register| {
            let (a, b) = (register.of(ours), register.of(theirs));
            if features.contains(&register) {
                a & b
            } else if MAXIMA.contains(&(at, register)) || (at == MODEL && register != Register::Ebx) {
                a.min(b)
            } else if at == ADDRESS_BITS && register == Register::Eax {
                (a & 0xff).min(b & 0xff) | (a & 0xff00).min(b & 0xff00)
            } else if a == b || [MODEL, VENDOR, KVM, XSAVE, ADDRESS_BITS].contains(&at) {
                a
            } else {
                0
            }
        })
    }

    /// Components of the extended state are kept where both have them in the same place; the sizes are those of the rest.
    fn drop_components_that_differ(&mut self, a: &Self, b: &Self) {
        let mut end = XSAVE_FIXED_BYTES;
        for component in XSAVE_FIRST..63 {
            let at = (XSAVE.0, component);
            let wanted = self.components().any(|one| one == component);
            if wanted && a.leaf(at) == b.leaf(at) {
                let (size, offset) = (a.leaf(at).eax, a.leaf(at).ebx);
                if component < 32 && self.leaf(XSAVE).eax >> component & 1 == 1 {
                    end = end.max(offset.saturating_add(size));
                }
                continue;
            }
            self.leaves.remove(&at);
            let (low, high) = if component < 32 { (1 << component, 0) } else { (0, 1 << (component - 32)) };
            for (leaf, first) in [(XSAVE, Register::Eax), (XSAVE_MORE, Register::Ecx)] {
                if let Some(registers) = self.leaves.get_mut(&leaf) {
                    *first.of_mut(registers) &= !low;
                    registers.edx &= !high;
                }
            }
        }
        if a.leaf(XSAVE) != b.leaf(XSAVE)
            && let Some(xsave) = self.leaves.get_mut(&XSAVE)
        {
            (xsave.ebx, xsave.ecx) = (end, end);
        }
    }

    /// The features that KVM has dropped without a word from a table that was set on a vCPU.
    pub(crate) fn dropped_in(&self, kept: &Self) -> Vec<CpuProblem> {
        self.missing_on(kept)
    }

    /// The same without what KVM has dropped: it may list features that it does not give.
    pub(crate) fn reduced_to(mut self, kept: &Self) -> Self {
        for problem in self.dropped_in(kept) {
            if let CpuProblem::Features { leaf, subleaf, register, missing } = problem {
                self = self.without((leaf, subleaf), register, missing);
            }
        }
        self
    }

    /// The same host with the features that its KVM adds to any guest by itself: what became of `given` when it was set.
    pub(crate) fn with_extras(mut self, given: &Self, kept: &Self) -> Self {
        for (at, registers) in FEATURES {
            for register in registers {
                let extra = kept.features(at, *register) & !given.features(at, *register);
                if extra != 0 {
                    *register.of_mut(self.leaves.entry(at).or_default()) |= extra;
                }
            }
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn intel() -> Cpu {
        let leaf = |eax, ebx, ecx, edx| Registers { eax, ebx, ecx, edx };
        Cpu::new(
            [
                (VENDOR, leaf(0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69)),
                (MODEL, leaf(0x50657, 9, 0xff, 0xff)),
                ((4, 0), leaf(0x121, 1, 2, 3)),
                ((7, 0), leaf(2, 0xff, 0xff, 0xff | ARCH_CAPABILITIES_THERE)),
                (XSAVE, leaf(0b111, 832, 832, 0)),
                (XSAVE_MORE, leaf(0xf, 832, 0, 0)),
                ((0xd, 2), leaf(256, 576, 0, 0)),
                (POWER, leaf(0, 0, 0, INVARIANT_TSC)),
                (ADDRESS_BITS, leaf(0x3027, 0xf, 0, 0)),
                ((0x15, 0), leaf(1, 2, 3, 0)),
            ],
            [(ARCH_CAPABILITIES, 0b11)],
            (2_000_000, false),
        )
    }

    fn changed(at: Leaf, change: impl FnOnce(&mut Registers)) -> Cpu {
        let mut cpu = intel();
        change(cpu.leaves.get_mut(&at).expect("set"));
        cpu
    }

    #[test]
    fn a_processor_suits_itself_and_survives_its_bytes() {
        assert_eq!(intel().problems_on(&intel()), []);
        assert_eq!(Cpu::decode(&intel().encode()), Ok(intel()));
        assert_eq!(intel().meet(&intel()), Some(intel()));
        assert_eq!(intel().vendor(), "GenuineIntel");
    }

    #[test]
    fn each_thing_that_a_host_lacks_is_named() {
        let only = |host: &Cpu| {
            let found = intel().problems_on(host);
            assert_eq!(found.len(), 1, "{found:?}");
            found[0].clone()
        };
        let features = CpuProblem::Features { leaf: 1, subleaf: 0, register: Register::Ecx, missing: 0x80 };
        assert_eq!(only(&changed(MODEL, |it| it.ecx = 0x7f)), features);
        assert_eq!(only(&intel().without(MODEL, Register::Ecx, 0x80)), features);
        assert_eq!(only(&changed((0xd, 2), |it| it.ebx = 640)), CpuProblem::Xsave { component: 2 });
        let narrow = changed(ADDRESS_BITS, |it| it.eax = 0x3024);
        assert_eq!(only(&narrow), CpuProblem::AddressBits { guest: 39, host: 36 });
        let short = changed(VENDOR, |it| it.eax = 0x16);
        assert_eq!(only(&short), CpuProblem::Maximum { leaf: 0, guest: 0x20, host: 0x16 });
        let slow = Cpu { tsc_khz: 1_900_000, ..intel() };
        assert_eq!(only(&slow), CpuProblem::Tsc { guest_khz: 2_000_000, host_khz: 1_900_000 });
        assert_eq!(intel().problems_on(&Cpu { tsc_scaling: true, ..slow }), []);
        let weak = Cpu { msrs: [(ARCH_CAPABILITIES, 0b01)].into(), ..intel() };
        assert_eq!(only(&weak), CpuProblem::Weaknesses { bits: 0b10 });
        let other = changed(VENDOR, |it| it.ebx = 0x6874_7541);
        assert!(matches!(only(&other), CpuProblem::Vendor { .. }));
        assert_eq!(intel().meet(&other), None);
        let more = changed(MODEL, |it| it.ecx = 0x1ff);
        assert_eq!(intel().problems_on(&more), []);
    }

    #[test]
    fn what_kvm_adds_to_every_guest_by_itself_is_no_reason_to_refuse_a_state() {
        let (given, kept) = (intel(), changed(MODEL, |it| it.ecx = 0xfff));
        assert_eq!(given.dropped_in(&kept), []);
        assert_eq!(kept.clone().reduced_to(&given), given, "what was dropped is gone");
        assert_eq!(kept.problems_on(&intel()).len(), 1);
        assert_eq!(kept.problems_on(&intel().with_extras(&given, &kept)), []);
    }

    #[test]
    fn a_baseline_has_the_weaknesses_of_all_and_the_strengths_of_none_alone() {
        let weak = Cpu { msrs: [(ARCH_CAPABILITIES, 0b101)].into(), tsc_khz: 1_000_000, ..intel() };
        let met = intel().meet(&weak).expect("one maker");
        assert_eq!(met.msrs[&ARCH_CAPABILITIES], 0b101);
        assert_eq!(met.leaf(POWER).edx & INVARIANT_TSC, 0, "no rate is promised that not all have");
        let without = Cpu { msrs: BTreeMap::new(), ..intel() };
        let met = intel().meet(&without).expect("one maker");
        assert_eq!(met.leaf((7, 0)).edx & ARCH_CAPABILITIES_THERE, 0);
        let moved = changed((0xd, 2), |it| it.ebx = 640);
        let met = intel().meet(&moved).expect("one maker");
        assert_eq!((met.leaf(XSAVE).eax, met.leaves.contains_key(&(0xd, 2))), (0b011, false));
        assert_eq!(
            intel().meet(&changed((0x15, 0), |it| it.ecx = 9)).expect("one maker").leaf((0x15, 0)).ecx,
            0
        );
    }

    prop_compose! {
        fn any_registers()(eax: u32, ebx: u32, ecx: u32, edx: u32) -> Registers {
            Registers { eax, ebx, ecx, edx }
        }
    }

    fn any_cpu() -> impl Strategy<Value = Cpu> {
        let leaf = prop_oneof![
            Just(MODEL),
            Just((7, 0)),
            Just((7, 1)),
            Just(XSAVE),
            Just(XSAVE_MORE),
            Just((0xd, 2)),
            Just((0xd, 9)),
            Just(POWER),
            Just(ADDRESS_BITS),
            Just(KVM),
            Just((4, 0)),
            Just((0x15, 0)),
        ];
        let leaves = proptest::collection::btree_map(leaf, any_registers(), 0..12);
        let msrs = proptest::collection::btree_map(Just(ARCH_CAPABILITIES), any::<u64>(), 0..2);
        (leaves, msrs, 0u32..3, any::<bool>()).prop_map(|(leaves, msrs, tsc_khz, tsc_scaling)| {
            let mut cpu = Cpu { leaves, msrs, tsc_khz: tsc_khz * 1_000_000, tsc_scaling };
            cpu.leaves.insert(VENDOR, Registers { eax: 0x20, ..Registers::default() });
            cpu
        })
    }

    proptest! {
        #[test]
        fn what_two_hosts_can_both_give_has_problems_on_neither(a in any_cpu(), b in any_cpu()) {
            let met = a.meet(&b).expect("one maker");
            prop_assert_eq!(met.problems_on(&a), []);
            prop_assert_eq!(met.problems_on(&b), []);
        }

        #[test]
        fn any_bytes_are_a_record_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _read = Cpu::decode(&bytes);
        }
    }
}
