//! The VM's disks: VHDX images on a volume, open for writing, for reading, or known but not in use.
//!
//! **Invariant:** at most one of these forms exists at a time; a disk is given to the VM only after it was opened for its
//! use here (H2), and the VM has let go of it before it is closed (H3).

use std::sync::Arc;

use blockio::{BlockDevice, ImageFile};
use csvfs::node::File;
use uuid::Uuid;
use vhdx::{Builder, ErrorKind, NewSize, Standby, VhdxError};

use crate::config::{DiskSpec, VolumePath};
use crate::failure::Failure;
use crate::volume::Volumes;

/// Of larger tables only the beginning gets its space ahead: a disk of many TiB should not cost gigabytes at once.
const STRUCTURES_BYTES_MAX: u64 = 64 << 20;

/// One disk of the VM.
pub(crate) struct RunnerDisk {
    slot: u32,
    spec: DiskSpec,
    state: State,
    /// Where its parents were found when it was opened, the nearest first.
    parents: Vec<String>,
}

/// A disk that the guest writes, for work on its image.
pub(crate) struct WritableDisk {
    pub(crate) disk: Arc<vhdx::Disk>,
    pub(crate) spec: DiskSpec,
}

enum State {
    Closed,
    Standby(Box<Standby>),
    Writable(Arc<vhdx::Disk>),
    ReadOnly,
}

impl RunnerDisk {
    pub(crate) fn new(slot: u32, spec: DiskSpec) -> Self {
        Self { slot, spec, state: State::Closed, parents: Vec::new() }
    }

    /// The disks of a configuration, each in its slot.
    pub(crate) fn all(specs: &[DiskSpec]) -> Vec<Self> {
        let disk = |(place, spec): (u32, &DiskSpec)| Self::new(spec.slot.unwrap_or(place), spec.clone());
        (0..).zip(specs).map(disk).collect()
    }

    pub(crate) fn slot(&self) -> u32 {
        self.slot
    }

    /// What the guest sees as serial number: the same wherever the VM runs.
    pub(crate) fn serial(&self, vm: Uuid) -> String {
        format!("{}-{}", &vm.simple().to_string()[..12], self.slot)
    }

    /// Changes the size of the disk while the guest uses it.
    pub(crate) fn resize(&self, size_bytes: u64) -> Result<(), Failure> {
        let used = self.writable()?;
        used.disk.resize(NewSize::To(size_bytes)).map(drop).map_err(|error| used.refused(&error))
    }

    /// The disk, if the guest writes it.
    pub(crate) fn writable(&self) -> Result<WritableDisk, Failure> {
        match &self.state {
            State::Writable(disk) => Ok(WritableDisk { disk: Arc::clone(disk), spec: self.spec.clone() }),
            _ => Err(Failure::new(
                format!("the disk {}:{} is not open for writing", self.spec.volume, self.spec.path),
                "a disk that is only read stays as it is",
            )),
        }
    }

    /// The guest goes on in another image.
    pub(crate) fn is_now(&mut self, path: &str) {
        path.clone_into(&mut self.spec.path);
        self.see_chain();
    }

    /// Looks anew at which images the disk is made of.
    pub(crate) fn see_chain(&mut self) {
        if let State::Writable(disk) = &self.state {
            self.parents = disk.parent_paths();
        }
    }

    /// Where its parents lie below the volume's root, the nearest first.
    pub(crate) fn parents(&self) -> Vec<String> {
        self.parents.iter().map(|path| path.trim_start_matches('/').to_owned()).collect()
    }

    pub(crate) fn spec(&self) -> &DiskSpec {
        &self.spec
    }

    /// Opens the disk for the VM.
    pub(crate) fn open(&mut self, volumes: &Volumes) -> Result<Arc<dyn BlockDevice>, Failure> {
        if self.spec.read_only {
            let image = self.builder(volumes)?.read_only().map_err(|error| self.refused(&error))?;
            self.parents = image.parent_paths();
            self.state = State::ReadOnly;
            return Ok(Arc::new(image));
        }
        let disk = match std::mem::replace(&mut self.state, State::Closed) {
            // Everything that was read before the take-over is read again by this.
            State::Standby(standby) => standby.activate(),
            _ => self.builder(volumes)?.repair(true).writable(),
        };
        let disk = Arc::new(disk.map_err(|error| self.refused(&error))?);
        self.state = State::Writable(Arc::clone(&disk));
        self.see_chain();
        Ok(disk)
    }

    /// Takes space for the image's log and tables, of which a new image has only some: a volume that is full stops what the
    /// guest writes to new blocks, and never what makes its old ones durable.
    pub(crate) fn reserve_structures(&self, volumes: &Volumes) -> Result<(), Failure> {
        let State::Writable(disk) = &self.state else { return Ok(()) };
        let at = VolumePath { volume: self.spec.volume.clone(), path: self.spec.path.clone() };
        let end = disk.table_end().min(STRUCTURES_BYTES_MAX);
        volumes.open_file(&at)?.allocate(0, end, true).map_err(|error| {
            Failure::new(
                format!("no space for the tables of disk {}:{}: {error}", at.volume, at.path),
                "delete something on the volume, or extend it",
            )
        })
    }

    /// Looks at the disk while another node may still write it: early failures, warm caches, no change.
    pub(crate) fn stand_by(&mut self, volumes: &Volumes) -> Result<(), Failure> {
        let standby = self.builder(volumes)?.inactive().map_err(|error| self.refused(&error))?;
        self.state = State::Standby(Box::new(standby));
        Ok(())
    }

    /// Makes everything durable and leaves a clean image. The VM must have let go of it.
    pub(crate) fn close(&mut self) -> Result<(), Failure> {
        match std::mem::replace(&mut self.state, State::Closed) {
            State::Writable(disk) => disk.close().map(drop).map_err(|error| self.refused(&error)),
            State::Closed | State::Standby(_) | State::ReadOnly => Ok(()),
        }
    }

    fn builder(&self, volumes: &Volumes) -> Result<Builder, Failure> {
        let at = VolumePath { volume: self.spec.volume.clone(), path: self.spec.path.clone() };
        let file: Arc<File> = volumes.open_file(&at)?;
        let path = format!("/{}", at.path.trim_start_matches('/'));
        Ok(Builder::open(file as Arc<dyn ImageFile>).parents(volumes.parents(&at.volume)?, &path))
    }

    fn refused(&self, error: &VhdxError) -> Failure {
        Failure::new(
            format!("the disk {}:{} cannot be used: {error}", self.spec.volume, self.spec.path),
            hint(error),
        )
    }
}

impl WritableDisk {
    /// Why work on the image failed; the guest goes on.
    pub(crate) fn refused(&self, error: &VhdxError) -> Failure {
        Failure::new(
            format!("{}:{}: {}", self.spec.volume, self.spec.path, crate::report::message(error)),
            hint(error),
        )
    }
}

/// The disk in a slot.
pub(crate) fn of_slot(disks: &mut [RunnerDisk], slot: u32) -> Result<&mut RunnerDisk, Failure> {
    disks.iter_mut().find(|disk| disk.slot == slot).ok_or_else(|| {
        Failure::new(format!("there is no disk in slot {slot}"), "look at its disks with `csvctl vm show`")
    })
}

fn hint(error: &VhdxError) -> &'static str {
    match error.kind() {
        ErrorKind::NotVhdx => "make it one with `csvctl vhdx convert`, or name the right file",
        ErrorKind::Truncated => "the copy was cut short: copy the image again",
        ErrorKind::Io => "look at the volume's state with `csvctl volume show`",
        _ => "look at the image with `csvctl vhdx info`",
    }
}
