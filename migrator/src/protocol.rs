//! Messages between the daemons of source and target, checked when they come in.
//!
//! **Invariant:** nothing of a message is used before it has been checked: lengths are bounded, ids are in range (H7).

use std::collections::BTreeMap;

use hv::Cpu;
use lockmgr::{NODES_MAX, NodeId};
use prost::Message;
use uuid::Uuid;

use crate::PROTOCOL_VERSION;
use crate::preflight::Facts;
use crate::target::TargetAnswer;

/// The generated messages.
#[expect(missing_docs, reason = "generated; the .proto file is the documentation")]
pub mod pb {
    include!(concat!(env!("OUT_DIR"), "/migrator.rs"));
}

/// Longest message in bytes.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Longest name or path in bytes.
const TEXT_BYTES_MAX: usize = 4096;
/// Most disks of a VM.
const DISKS_MAX: usize = 64;

/// Why a message is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// It cannot be decoded.
    #[error("a migration message cannot be decoded: {0}")]
    Decode(#[from] prost::DecodeError),
    /// A field is out of bounds.
    #[error("a migration message is not valid: {0}")]
    Invalid(&'static str),
    /// The sender is newer or older.
    #[error(
        "the other node speaks migration version {theirs}, this one {PROTOCOL_VERSION}; upgrade the older one"
    )]
    Version {
        /// The sender's.
        theirs: u32,
    },
}

/// Which move a message is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Move {
    /// Name of the VM.
    pub vm: String,
    /// Its id.
    pub vm_id: Uuid,
    /// The source.
    pub from: NodeId,
    /// The target.
    pub to: NodeId,
    /// Epoch of the record before the commit.
    pub epoch: u64,
    /// Distinguishes the attempts at one epoch.
    pub attempt: u64,
}

/// Where a saved state lies, and what it is a state of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Volume; empty in a live move, whose state comes over the memory streams.
    pub volume: String,
    /// Path below its root.
    pub path: String,
    /// The VM's configuration, opaque here.
    pub spec: Vec<u8>,
}

impl Saved {
    /// Of a live move: nothing is saved.
    #[must_use]
    pub fn nowhere(spec: Vec<u8>) -> Self {
        Self { volume: String::new(), path: String::new(), spec }
    }

    /// Whether RAM and state come over the memory streams.
    #[must_use]
    pub fn is_streamed(&self) -> bool {
        self.volume.is_empty()
    }
}

/// A message to the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToTarget {
    /// What are you and what do you have?
    Inquire {
        /// The move that is thought of.
        of: Move,
        /// The paths that it needs: (volume, path).
        paths: Vec<(String, String)>,
    },
    /// Load the state and wait.
    Prepare(Move, Saved),
    /// Look at the record: the VM is yours.
    Activate(Move, Saved),
    /// The move is off and was never committed.
    Cancel(Move),
}

/// An answer of the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromTarget {
    /// To `Inquire`.
    Facts(Facts),
    /// To the others.
    Answer(TargetAnswer),
}

impl ToTarget {
    /// The bytes of the message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        use pb::to_target::What;
        let what = match self {
            Self::Inquire { of, paths } => {
                let disk = |(volume, path): &(String, String)| pb::Disk {
                    volume: volume.clone(),
                    path: path.clone(),
                };
                What::Inquire(pb::Inquire {
                    r#move: Some(of.into()),
                    disks: paths.iter().map(disk).collect(),
                })
            }
            Self::Prepare(of, saved) => What::Prepare(pb::PrepareTarget {
                r#move: Some(of.into()),
                saved_volume: saved.volume.clone(),
                saved_path: saved.path.clone(),
                spec: saved.spec.clone(),
            }),
            Self::Activate(of, saved) => What::Activate(pb::Activate {
                r#move: Some(of.into()),
                saved_volume: saved.volume.clone(),
                saved_path: saved.path.clone(),
                spec: saved.spec.clone(),
            }),
            Self::Cancel(of) => What::Cancel(pb::Cancel { r#move: Some(of.into()) }),
        };
        pb::ToTarget { version: PROTOCOL_VERSION, what: Some(what) }.encode_to_vec()
    }

    /// Reads a message.
    ///
    /// # Errors
    /// When it is too long, cannot be decoded, is of another version, or has fields out of bounds.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        use pb::to_target::What;
        check_length(bytes)?;
        let message = pb::ToTarget::decode(bytes)?;
        // `Inquire` is understood in every version: its answer tells which versions there are.
        let what = message.what.ok_or(ProtocolError::Invalid("it says nothing that this version knows"))?;
        if message.version != PROTOCOL_VERSION && !matches!(what, What::Inquire(_)) {
            return Err(ProtocolError::Version { theirs: message.version });
        }
        Ok(match what {
            What::Inquire(it) => Self::Inquire { of: move_of(it.r#move)?, paths: paths(it.disks)? },
            What::Prepare(it) => {
                Self::Prepare(move_of(it.r#move)?, saved(it.saved_volume, it.saved_path, it.spec)?)
            }
            What::Activate(it) => {
                Self::Activate(move_of(it.r#move)?, saved(it.saved_volume, it.saved_path, it.spec)?)
            }
            What::Cancel(it) => Self::Cancel(move_of(it.r#move)?),
        })
    }
}

impl FromTarget {
    /// The bytes of the message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        use pb::from_target::What;
        let what = match self {
            Self::Facts(facts) => What::Facts(facts.into()),
            Self::Answer(TargetAnswer::Prepared) => What::Prepared(pb::Prepared {}),
            Self::Answer(TargetAnswer::Activated) => What::Activated(pb::Activated {}),
            Self::Answer(TargetAnswer::Cancelled) => What::Cancelled(pb::Cancelled {}),
            Self::Answer(TargetAnswer::Refused(reason)) => {
                What::Refused(pb::Refused { reason: reason.clone() })
            }
            Self::Answer(TargetAnswer::ActivateFailed(reason)) => {
                What::ActivateFailed(pb::ActivateFailed { reason: reason.clone() })
            }
        };
        pb::FromTarget { version: PROTOCOL_VERSION, what: Some(what) }.encode_to_vec()
    }

    /// Reads a message.
    ///
    /// # Errors
    /// When it is too long, cannot be decoded, is of another version, or has fields out of bounds.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        use pb::from_target::What;
        check_length(bytes)?;
        let message = pb::FromTarget::decode(bytes)?;
        let what = message.what.ok_or(ProtocolError::Invalid("it says nothing that this version knows"))?;
        if message.version != PROTOCOL_VERSION && !matches!(what, What::Facts(_)) {
            return Err(ProtocolError::Version { theirs: message.version });
        }
        Ok(match what {
            What::Facts(it) => Self::Facts(it.try_into()?),
            What::Prepared(_) => Self::Answer(TargetAnswer::Prepared),
            What::Activated(_) => Self::Answer(TargetAnswer::Activated),
            What::Cancelled(_) => Self::Answer(TargetAnswer::Cancelled),
            What::Refused(it) => Self::Answer(TargetAnswer::Refused(text(it.reason)?)),
            What::ActivateFailed(it) => Self::Answer(TargetAnswer::ActivateFailed(text(it.reason)?)),
        })
    }
}

impl From<&Move> for pb::Move {
    fn from(of: &Move) -> Self {
        Self {
            vm: of.vm.clone(),
            vm_id: of.vm_id.as_bytes().to_vec(),
            from: of.from.0.into(),
            to: of.to.0.into(),
            epoch: of.epoch,
            attempt: of.attempt,
        }
    }
}

impl From<&Facts> for pb::Facts {
    fn from(facts: &Facts) -> Self {
        let path = |((volume, path), problem): (&(String, String), &Option<String>)| pb::PathFact {
            volume: volume.clone(),
            path: path.clone(),
            problem: problem.clone().unwrap_or_default(),
        };
        Self {
            kvm_problem: facts.kvm_problem.clone().unwrap_or_default(),
            memory_available_bytes: facts.memory_available_bytes,
            cpus: facts.cpus,
            volumes: facts.volumes.clone(),
            paths: facts.paths.iter().map(path).collect(),
            version_min: facts.version_min,
            version_max: facts.version_max,
            processor: facts.cpu.encode(),
            takes_deltas: facts.takes_deltas,
            devices: facts.devices,
        }
    }
}

impl TryFrom<pb::Facts> for Facts {
    type Error = ProtocolError;

    fn try_from(facts: pb::Facts) -> Result<Self, ProtocolError> {
        if facts.paths.len() > DISKS_MAX + 1 {
            return Err(ProtocolError::Invalid("it lists too much"));
        }
        let mut paths = BTreeMap::new();
        for fact in facts.paths {
            let problem = Some(text(fact.problem)?).filter(|problem| !problem.is_empty());
            paths.insert((text(fact.volume)?, text(fact.path)?), problem);
        }
        Ok(Self {
            kvm_problem: Some(text(facts.kvm_problem)?).filter(|problem| !problem.is_empty()),
            memory_available_bytes: facts.memory_available_bytes,
            cpus: facts.cpus,
            volumes: facts.volumes.into_iter().map(text).collect::<Result<_, _>>()?,
            paths,
            version_min: facts.version_min,
            version_max: facts.version_max,
            cpu: Cpu::decode(&facts.processor)
                .map_err(|_| ProtocolError::Invalid("the record of its CPU"))?,
            takes_deltas: facts.takes_deltas,
            devices: facts.devices,
        })
    }
}

fn check_length(bytes: &[u8]) -> Result<(), ProtocolError> {
    if bytes.len() > MESSAGE_BYTES_MAX { Err(ProtocolError::Invalid("it is too long")) } else { Ok(()) }
}

pub(crate) fn move_of(it: Option<pb::Move>) -> Result<Move, ProtocolError> {
    let it = it.ok_or(ProtocolError::Invalid("it does not say which move it is about"))?;
    let vm_id =
        Uuid::from_slice(&it.vm_id).map_err(|_| ProtocolError::Invalid("the VM's id is not 16 bytes"))?;
    if it.epoch == u64::MAX {
        return Err(ProtocolError::Invalid("there is no epoch after this one"));
    }
    Ok(Move {
        vm: text(it.vm)?,
        vm_id,
        from: node(it.from)?,
        to: node(it.to)?,
        epoch: it.epoch,
        attempt: it.attempt,
    })
}

fn node(id: u32) -> Result<NodeId, ProtocolError> {
    let id = u16::try_from(id).ok().filter(|id| (1..=NODES_MAX).contains(id));
    id.map(NodeId).ok_or(ProtocolError::Invalid("there is no such node"))
}

fn saved(volume: String, path: String, spec: Vec<u8>) -> Result<Saved, ProtocolError> {
    Ok(Saved { volume: text(volume)?, path: text(path)?, spec })
}

fn paths(disks: Vec<pb::Disk>) -> Result<Vec<(String, String)>, ProtocolError> {
    if disks.len() > DISKS_MAX + 1 {
        return Err(ProtocolError::Invalid("it lists too many disks"));
    }
    disks.into_iter().map(|disk| Ok((text(disk.volume)?, text(disk.path)?))).collect()
}

fn text(text: String) -> Result<String, ProtocolError> {
    if text.len() > TEXT_BYTES_MAX {
        Err(ProtocolError::Invalid("a name or path is too long"))
    } else {
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use hv::cpu::Registers;

    use super::*;

    fn a_move() -> Move {
        let vm_id = Uuid::from_u128(7);
        Move { vm: "web".to_owned(), vm_id, from: NodeId(1), to: NodeId(2), epoch: 5, attempt: 1 }
    }

    fn a_saved() -> Saved {
        Saved { volume: "vol".to_owned(), path: "vm/web.state".to_owned(), spec: vec![1, 2, 3] }
    }

    #[test]
    fn messages_come_back_as_they_were() {
        let paths = vec![("vol".to_owned(), "vm/disk.vhdx".to_owned())];
        let all = [
            ToTarget::Inquire { of: a_move(), paths: paths.clone() },
            ToTarget::Prepare(a_move(), a_saved()),
            ToTarget::Activate(a_move(), a_saved()),
            ToTarget::Cancel(a_move()),
        ];
        for message in all {
            assert_eq!(ToTarget::decode(&message.encode()), Ok(message));
        }
        let facts = Facts {
            kvm_problem: Some("none".to_owned()),
            memory_available_bytes: 1 << 30,
            cpus: 2,
            volumes: vec!["vol".to_owned()],
            paths: BTreeMap::from([(paths[0].clone(), Some("no such file".to_owned()))]),
            version_min: 1,
            version_max: 2,
            cpu: Cpu::from_leaves([((1, 0), Registers { eax: 1, ebx: 2, ecx: 3, edx: 4 })]),
            takes_deltas: true,
            devices: 1,
        };
        // A release before says nothing of it.
        let silent = pb::Facts::default();
        let silent =
            pb::Facts { takes_deltas: silent.takes_deltas, devices: silent.devices, ..(&facts).into() };
        let silent = Facts::try_from(silent).unwrap();
        assert!(!silent.takes_deltas && silent.devices == 0);
        let reason = || "why".to_owned();
        let answers = [
            FromTarget::Facts(facts),
            FromTarget::Answer(TargetAnswer::Prepared),
            FromTarget::Answer(TargetAnswer::Refused(reason())),
            FromTarget::Answer(TargetAnswer::Activated),
            FromTarget::Answer(TargetAnswer::ActivateFailed(reason())),
            FromTarget::Answer(TargetAnswer::Cancelled),
        ];
        for answer in answers {
            assert_eq!(FromTarget::decode(&answer.encode()), Ok(answer));
        }
    }

    // Invariant H7
    #[test]
    fn messages_out_of_bounds_are_refused() {
        let refused = |change: &dyn Fn(&mut Move)| {
            let mut of = a_move();
            change(&mut of);
            assert!(ToTarget::decode(&ToTarget::Cancel(of).encode()).is_err());
        };
        refused(&|of| of.from = NodeId(0));
        refused(&|of| of.to = NodeId(NODES_MAX + 1));
        refused(&|of| of.vm = "x".repeat(TEXT_BYTES_MAX + 1));
        refused(&|of| of.epoch = u64::MAX);
        let newer = pb::ToTarget {
            version: 9,
            what: Some(pb::to_target::What::Cancel(pb::Cancel { r#move: Some((&a_move()).into()) })),
        };
        assert_eq!(ToTarget::decode(&newer.encode_to_vec()), Err(ProtocolError::Version { theirs: 9 }));
        assert!(ToTarget::decode(&vec![0; MESSAGE_BYTES_MAX + 1]).is_err());
    }

    proptest! {
        // Invariant H7
        #[test]
        fn arbitrary_bytes_are_refused_or_understood_but_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = ToTarget::decode(&bytes);
            let _ = FromTarget::decode(&bytes);
        }
    }
}
