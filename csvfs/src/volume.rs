//! Making a volume of a LUN, and telling what a LUN is.
//!
//! ```text
//! create:  probe -> wipe superblocks -> fixed areas -> metadata store -> flush -> superblock B -> flush -> A -> flush
//! ```
//! **Invariant:** a superblock is written last, so a LUN with a valid one is completely formatted; it is wiped first, so a
//! creation that was cut short leaves no old volume that seems to be whole.

use std::sync::Arc;

use blockio::{BlockDevice, IoError, IoOp};
use lockmgr::{ClusterId, Epoch, Term, VolumeId};
use uuid::Uuid;

use crate::format::owner::{OWNER_BYTES, OwnerBlock};
use crate::format::superblock::{
    INCOMPAT_JOURNAL, INCOMPAT_POOLS, INCOMPAT_REDB3, NAME_BYTES_MAX, SUPERBLOCK_BYTES, Superblock,
};
use crate::format::{Damaged, intent, layout};
use crate::meta::{Store, StoreError};
use crate::probe::{Found, probe};

/// Why a LUN cannot be made, or used as, a volume.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// Reading or writing the LUN failed.
    #[error("cannot {doing} the LUN: {source}")]
    Io {
        /// `read` or `write`.
        doing: &'static str,
        /// The cause.
        #[source]
        source: IoError,
    },
    /// The LUN holds something.
    #[error("refusing to format: the LUN holds {found}; to destroy it, say so (force)")]
    Occupied {
        /// What it holds.
        found: Box<Found>,
    },
    /// Too small to be a volume.
    #[error("the LUN has {size_bytes} bytes; a volume needs at least {min_bytes}")]
    TooSmall {
        /// Its size.
        size_bytes: u64,
        /// The smallest possible size.
        min_bytes: u64,
    },
    /// Not a usable name.
    #[error("'{name}' cannot be the name of a volume: use 1 to 64 letters, digits, '-', '_' or '.'")]
    BadName {
        /// The name.
        name: String,
    },
    /// No superblock here.
    #[error("the LUN is not a csvfs volume{}", found.as_ref().map_or(String::new(), |f| format!(": it holds {f}")))]
    NotAVolume {
        /// What it holds instead, if known.
        found: Option<Box<Found>>,
    },
    /// There is a superblock, but no copy is whole.
    #[error(
        "both superblocks of the volume are damaged ({first}; {second}); it will not be opened: restore one from a backup of the LUN"
    )]
    BothTorn {
        /// State of copy A.
        first: Damaged,
        /// State of copy B.
        second: Damaged,
    },
    /// The volume uses features that this program does not know.
    #[error("volume '{volume}' uses features that this version does not know ({}): use a newer version", features.join(", "))]
    UnknownFeatures {
        /// Name of the volume.
        volume: String,
        /// The features.
        features: Vec<String>,
    },
    /// The LUN has become smaller than the volume.
    #[error(
        "volume '{volume}' has {volume_bytes} bytes, but the LUN only {lun_bytes}: give the LUN its size back"
    )]
    Shrunk {
        /// Name of the volume.
        volume: String,
        /// Size of the volume.
        volume_bytes: u64,
        /// Size of the LUN.
        lun_bytes: u64,
    },
    /// The metadata store could not be made or opened.
    #[error("the volume's metadata store: {0}")]
    Store(#[from] StoreError),
}

/// What `create` is told.
#[derive(Clone, Debug)]
pub struct CreateParams {
    /// Name of the volume, for people.
    pub name: String,
    /// The cluster that may use it.
    pub cluster: ClusterId,
    /// Destroy what the LUN holds.
    pub force: bool,
}

/// A volume on a LUN.
#[derive(Debug)]
pub struct Volume;

impl Volume {
    /// Formats `device`.
    ///
    /// # Errors
    /// [`VolumeError::Occupied`] names what is there already; [`VolumeError::TooSmall`] and the rest as they say. Nothing is
    /// written before all of it was checked.
    pub fn create(device: Arc<dyn BlockDevice>, params: CreateParams) -> Result<Superblock, VolumeError> {
        let lun_bytes = Self::check_create(device.as_ref(), &params)?;
        let block = Superblock {
            volume: VolumeId(Uuid::new_v4()),
            cluster: params.cluster,
            name: params.name,
            lun_bytes,
            created_seconds: crate::clock::wall().seconds,
            compat: 0,
            ro_compat: 0,
            incompat: INCOMPAT_REDB3 | INCOMPAT_POOLS | INCOMPAT_JOURNAL,
            generation: 1,
        };
        format_lun(&device, &block)?;
        Ok(block)
    }

    /// Makes all checks of [`Volume::create`] and writes nothing. Gives the bytes that the volume would use.
    ///
    /// # Errors
    /// As [`Volume::create`].
    pub fn check_create(device: &dyn BlockDevice, params: &CreateParams) -> Result<u64, VolumeError> {
        let lun_bytes = usable_bytes(device.geometry().size_bytes);
        check_name(&params.name)?;
        if lun_bytes < layout::LUN_BYTES_MIN {
            let size_bytes = device.geometry().size_bytes;
            return Err(VolumeError::TooSmall { size_bytes, min_bytes: layout::LUN_BYTES_MIN });
        }
        let found = probe(device).map_err(reading)?;
        match found {
            Some(found) if !params.force => Err(VolumeError::Occupied { found: Box::new(found) }),
            _ => Ok(lun_bytes),
        }
    }
}

/// What a volume uses of a LUN of `size` bytes.
pub(crate) fn usable_bytes(size: u64) -> u64 {
    size - size % layout::BLOCK_BYTES
}

fn check_name(name: &str) -> Result<(), VolumeError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let good =
        (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with('.');
    if good { Ok(()) } else { Err(VolumeError::BadName { name: name.to_owned() }) }
}

fn format_lun(device: &Arc<dyn BlockDevice>, block: &Superblock) -> Result<(), VolumeError> {
    wipe(device.as_ref(), 0, layout::FIRST_CHUNK_OFFSET)?;
    device.flush().map_err(writing)?;
    let owner =
        OwnerBlock { volume: block.volume, node: None, epoch: Epoch(0), term: Term(0), generation: 1 };
    device.write_at(layout::OWNER_OFFSETS[0], &owner.encode(layout::OWNER_OFFSETS[0])).map_err(writing)?;
    for slot in 0..lockmgr::NODES_MAX {
        let header = intent::empty_ring(slot, block.volume);
        device.write_at(intent::ring_offset(slot), &header).map_err(writing)?;
    }
    Store::create(device.clone(), block.volume, block.lun_bytes)?;
    write_superblocks(device.as_ref(), block)
}

fn wipe(device: &dyn BlockDevice, offset: u64, len: u64) -> Result<(), VolumeError> {
    device.run(IoOp::WriteZeroes { offset, len, may_unmap: true }).map_err(writing)
}

/// Writes both copies, the second one first, each flushed: a crash leaves at least one of them whole.
fn write_superblocks(device: &dyn BlockDevice, block: &Superblock) -> Result<(), VolumeError> {
    device.flush().map_err(writing)?;
    for offset in layout::SUPERBLOCK_OFFSETS.into_iter().rev() {
        device.write_at(offset, &block.encode(offset)).map_err(writing)?;
        device.flush().map_err(writing)?;
    }
    Ok(())
}

impl Superblock {
    /// Reads the superblock of a volume: the newest whole copy, and only when this program knows all it must.
    ///
    /// # Errors
    /// See [`VolumeError`].
    pub fn read(device: &dyn BlockDevice) -> Result<Self, VolumeError> {
        let [a, b] = read_copies(device)?;
        let block = newest(a, b).map_err(|(first, second)| match (&first, &second) {
            (Damaged::Absent { .. }, Damaged::Absent { .. }) => {
                VolumeError::NotAVolume { found: probe(device).ok().flatten().map(Box::new) }
            }
            _ => VolumeError::BothTorn { first, second },
        })?;
        block.check_usable(device)?;
        Ok(block)
    }

    fn check_usable(&self, device: &dyn BlockDevice) -> Result<(), VolumeError> {
        let mut features = self.unknown_incompat();
        features.extend(self.unknown_ro_compat());
        if !features.is_empty() {
            return Err(VolumeError::UnknownFeatures { volume: self.name.clone(), features });
        }
        let lun_bytes = device.geometry().size_bytes;
        if lun_bytes < self.lun_bytes {
            let volume_bytes = self.lun_bytes;
            return Err(VolumeError::Shrunk { volume: self.name.clone(), volume_bytes, lun_bytes });
        }
        Ok(())
    }

    /// Gives a volume of an older version what this one adds to the format; it then has its feature bits.
    pub(crate) fn upgraded(self, device: &dyn BlockDevice) -> Result<Self, VolumeError> {
        let added = (INCOMPAT_POOLS | INCOMPAT_JOURNAL) & !self.incompat;
        if added == 0 {
            return Ok(self);
        }
        tracing::warn!(volume = %self.volume, name = %self.name, "upgrading the volume: pools, intent logs, a journal of the metadata");
        let next = Self { incompat: self.incompat | added, generation: self.generation + 1, ..self };
        write_superblocks(device, &next)?;
        Ok(next)
    }

    /// The volume with another size, written to both copies.
    pub(crate) fn resized(self, device: &dyn BlockDevice, lun_bytes: u64) -> Result<Self, VolumeError> {
        let next = Self { lun_bytes, generation: self.generation + 1, ..self };
        write_superblocks(device, &next)?;
        Ok(next)
    }

    /// Rewrites both copies when one of them is damaged or older. Only the coordinator may do this.
    pub(crate) fn repair(&self, device: &dyn BlockDevice) -> Result<(), VolumeError> {
        let [a, b] = read_copies(device)?;
        if a.as_ref() == Ok(self) && b.as_ref() == Ok(self) {
            return Ok(());
        }
        tracing::warn!(volume = %self.volume, name = %self.name, "repairing a damaged superblock copy");
        // The whole copy is overwritten last.
        let mut next = self.clone();
        next.generation += 1;
        let good_first = a.as_ref() == Ok(self);
        let order = if good_first { [1, 0] } else { [0, 1] };
        for copy in order {
            let offset = layout::SUPERBLOCK_OFFSETS[copy];
            device.write_at(offset, &next.encode(offset)).map_err(writing)?;
            device.flush().map_err(writing)?;
        }
        Ok(())
    }
}

/// Marks the volume as using a feature that a program must know to write. Only the coordinator may do this.
pub(crate) fn add_ro_compat(device: &dyn BlockDevice, bits: u64) -> Result<(), VolumeError> {
    let block = Superblock::read(device)?;
    if block.ro_compat & bits == bits {
        return Ok(());
    }
    let (ro_compat, generation) = (block.ro_compat | bits, block.generation + 1);
    write_superblocks(device, &Superblock { ro_compat, generation, ..block })
}

/// Marks the volume as using a feature without which no program may open it. Only the coordinator may do this.
pub(crate) fn add_incompat(device: &dyn BlockDevice, bits: u64) -> Result<(), VolumeError> {
    let block = Superblock::read(device)?;
    if block.incompat & bits == bits {
        return Ok(());
    }
    let (incompat, generation) = (block.incompat | bits, block.generation + 1);
    write_superblocks(device, &Superblock { incompat, generation, ..block })
}

type Copy = Result<Superblock, Damaged>;

pub(crate) fn read_copies(device: &dyn BlockDevice) -> Result<[Copy; 2], VolumeError> {
    let read = |offset: u64| -> Result<Copy, VolumeError> {
        if offset + SUPERBLOCK_BYTES as u64 > device.geometry().size_bytes {
            return Ok(Err(Damaged::Absent { what: "csvfs superblock", offset }));
        }
        let mut bytes = vec![0; SUPERBLOCK_BYTES];
        device.read_at(offset, &mut bytes).map_err(reading)?;
        Ok(Superblock::decode(&bytes, offset))
    };
    Ok([read(layout::SUPERBLOCK_OFFSETS[0])?, read(layout::SUPERBLOCK_OFFSETS[1])?])
}

fn newest(a: Copy, b: Copy) -> Result<Superblock, (Damaged, Damaged)> {
    match (a, b) {
        (Ok(a), Ok(b)) => Ok(if b.generation > a.generation { b } else { a }),
        (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one),
        (Err(a), Err(b)) => Err((a, b)),
    }
}

/// Reads the newest owner block of `volume`. A LUN without a valid one counts as never owned: both copies are written in
/// turn, so at most the newer is torn, and that one's coordinator has not yet served.
///
/// # Errors
/// Those of reading.
pub fn read_owner(device: &dyn BlockDevice, volume: VolumeId) -> Result<OwnerBlock, VolumeError> {
    let mut newest = OwnerBlock { volume, node: None, epoch: Epoch(0), term: Term(0), generation: 0 };
    for offset in layout::OWNER_OFFSETS {
        let mut bytes = vec![0; OWNER_BYTES];
        device.read_at(offset, &mut bytes).map_err(reading)?;
        match OwnerBlock::decode(&bytes, offset, volume) {
            Ok(block) if block.generation > newest.generation => newest = block,
            Ok(_) | Err(_) => {}
        }
    }
    Ok(newest)
}

/// Writes the successor of the owner block `last` and flushes.
pub(crate) fn write_owner(
    device: &dyn BlockDevice,
    last: &OwnerBlock,
    next: OwnerBlock,
) -> Result<(), VolumeError> {
    let next = OwnerBlock { generation: last.generation + 1, ..next };
    let offset = layout::OWNER_OFFSETS[usize::from(next.generation.is_multiple_of(2))];
    device.write_at(offset, &next.encode(offset)).map_err(writing)?;
    device.flush().map_err(writing)
}

fn reading(source: IoError) -> VolumeError {
    VolumeError::Io { doing: "read", source }
}

fn writing(source: IoError) -> VolumeError {
    VolumeError::Io { doing: "write", source }
}
