//! Disks that are added, removed, resized and limited, and memory that a guest is asked to give back, while the VM runs or while it is
//! stopped.
//!
//! ```text
//!   add:     record (the disk is the VM's: no other may take it) -> process opens and inserts it; refused: record back
//!   remove:  process ejects and closes it -> record
//!   clone:   process holds the guest still, closes its disks, clones the file, runs on
//!   balloon: process tells the guest -> record
//! ```
//! **Invariant (E6):** a disk is in the record as long as a process may have it open for writing.

use std::sync::Arc;

use api::{Error, pb};
use hv::control::control::Op;
use hv::control::{Balloon, DiskAdd, DiskClone, DiskLimit, DiskRemove, DiskResize};
use lockmgr::cluster::{VmRecord, VmState};
use prost::Message;

use super::runner::{Moving, Runner};
use super::{described, disks, spec_of};
use crate::core::Core;
use crate::view;

/// Carries out one change. The VM belongs to this node.
pub(crate) async fn change_disk(core: &Arc<Core>, request: pb::VmDiskRequest) -> Result<pb::Vm, Error> {
    let during = |error: Error| error.during(format!("vm disk {} {}", request.action, request.name));
    let _decision = core.vms.decide(&request.name).await;
    let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
    let record = view::vm(&state, &request.name)?.clone();
    let change = Change::begin(core, record).map_err(during)?;
    let disk = request.disk.clone().unwrap_or_default();
    match request.action.as_str() {
        "add" => change.add(disk).await,
        "remove" => change.remove(&disk).await,
        "resize" => change.resize(&disk, request.size_bytes).await,
        "limit" => change.limit(&disk).await,
        "clone" => change.clone_to(&disk, request.clone_to).await,
        other => {
            Err(Error::usage(format!("`{other}` is no change of a disk")).hint("is csvctl newer than csvd?"))
        }
    }
    .map_err(during)?;
    described(core, &request.name)
}

/// Asks the guest to give so much of its memory back, now and whenever it runs. The VM belongs to this node.
pub(crate) async fn set_balloon(core: &Arc<Core>, request: pb::VmBalloonRequest) -> Result<pb::Vm, Error> {
    let during = |error: Error| error.during(format!("vm balloon {}", request.name));
    let _decision = core.vms.decide(&request.name).await;
    let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
    let record = view::vm(&state, &request.name)?.clone();
    let change = Change::begin(core, record).map_err(during)?;
    change.balloon(request.bytes).await.map_err(during)?;
    super::show(core, &request.name).await
}

/// A VM that is being changed: it is not moved meanwhile.
struct Change<'a> {
    core: &'a Arc<Core>,
    record: VmRecord,
    spec: pb::VmSpec,
    /// Its process, when it has one.
    runner: Option<Arc<Runner>>,
    _moving: Option<Moving>,
}

impl<'a> Change<'a> {
    fn begin(core: &'a Arc<Core>, record: VmRecord) -> Result<Self, Error> {
        let wrong =
            || Error::conflict(format!("it is {}", record.state)).hint("wait until it runs or is stopped");
        let runner = match record.state {
            VmState::Running | VmState::Paused => Some(core.vms.get(&record.name).ok_or_else(wrong)?),
            VmState::Stopped | VmState::Failed => None,
            _ => return Err(wrong()),
        };
        let moving = match &runner {
            Some(runner) => Some(
                runner
                    .begin_move()
                    .ok_or_else(|| Error::conflict("it is being moved").hint("wait until it has arrived"))?,
            ),
            None => None,
        };
        let mut spec = spec_of(&record)?;
        // From now on each disk has its slot in writing: places in the list change.
        for (place, disk) in (0..).zip(&mut spec.disks) {
            disk.slot.get_or_insert(place);
        }
        Ok(Self { core, record, spec, runner, _moving: moving })
    }

    async fn add(mut self, mut disk: pb::VmDisk) -> Result<(), Error> {
        let slot = self.free_slot()?;
        disk.slot = Some(slot);
        disks::refuse_parents(self.core, std::slice::from_ref(&disk)).await?;
        let before = self.spec.clone();
        self.spec.disks.push(disk.clone());
        let wanted = disks::of(self.core, &self.spec).await?;
        disks::refuse_shared(self.core, &self.record.name, &wanted, &self.core.state()).await?;
        self.write(&self.spec).await?;
        let pb::VmDisk { volume, path, read_only, .. } = disk;
        let inserted = async {
            // Once more, now that everybody sees that this VM wants it: of two that want it at once none overlooks the other.
            super::disks_are_free(self.core, &self.record.name, &wanted).await?;
            self.tell(Op::DiskAdd(DiskAdd { slot, volume, path, read_only })).await
        };
        if let Err(error) = inserted.await {
            self.write(&before).await?;
            return Err(error);
        }
        Ok(())
    }

    async fn remove(mut self, disk: &pb::VmDisk) -> Result<(), Error> {
        let place = self.place_of(disk)?;
        let slot = self.spec.disks.remove(place).slot.unwrap_or_default();
        self.tell(Op::DiskRemove(DiskRemove { slot })).await?;
        self.write(&self.spec).await
    }

    async fn resize(self, disk: &pb::VmDisk, size_bytes: u64) -> Result<(), Error> {
        let slot = self.spec.disks[self.place_of(disk)?].slot.unwrap_or_default();
        if self.runner.is_none() {
            return Err(Error::conflict("it does not run").hint("resize the image with `csvctl vhdx resize`"));
        }
        self.tell(Op::DiskResize(DiskResize { slot, size_bytes })).await
    }

    async fn limit(mut self, disk: &pb::VmDisk) -> Result<(), Error> {
        let place = self.place_of(disk)?;
        let pb::VmDisk { iops, bytes_per_second, .. } = *disk;
        let kept = &mut self.spec.disks[place];
        (kept.iops, kept.bytes_per_second) = (iops, bytes_per_second);
        let slot = kept.slot.unwrap_or_default();
        self.tell(Op::DiskLimit(DiskLimit { slot, iops, bytes_per_second })).await?;
        self.write(&self.spec).await
    }

    async fn balloon(mut self, bytes: u64) -> Result<(), Error> {
        let most = hv::balloon_bytes_max(self.spec.memory_bytes);
        if bytes > most {
            let all = self.spec.memory_bytes;
            return Err(Error::usage(format!("{bytes} of its {all} bytes of memory cannot be given back"))
                .hint(format!("give at most {most} bytes: a guest needs some memory to go on")));
        }
        self.spec.balloon_bytes = bytes / hv::PAGE_BYTES * hv::PAGE_BYTES;
        self.tell(Op::Balloon(Balloon { bytes })).await?;
        self.write(&self.spec).await
    }

    /// Only of a VM with a process: without one nobody has the disk open.
    async fn clone_to(self, disk: &pb::VmDisk, path: String) -> Result<(), Error> {
        let slot = self.spec.disks[self.place_of(disk)?].slot.unwrap_or_default();
        if self.runner.is_none() {
            return Err(Error::conflict("it does not run any more").hint("clone the file once more"));
        }
        self.tell(Op::DiskClone(DiskClone { slot, path })).await
    }

    fn free_slot(&self) -> Result<u32, Error> {
        let taken = |slot: &u32| self.spec.disks.iter().any(|disk| disk.slot == Some(*slot));
        let slots = u32::try_from(hv::DISKS_MAX).expect("a few");
        (0..slots).find(|slot| !taken(slot)).ok_or_else(|| {
            Error::conflict(format!("all {slots} disk slots are taken")).hint("remove a disk first")
        })
    }

    fn place_of(&self, disk: &pb::VmDisk) -> Result<usize, Error> {
        let same = |other: &pb::VmDisk| (&other.volume, &other.path) == (&disk.volume, &disk.path);
        self.spec.disks.iter().position(same).ok_or_else(|| {
            Error::not_found(format!("the VM has no disk {}:/{}", disk.volume, disk.path))
                .hint("`csvctl vm show` lists its disks")
        })
    }

    async fn tell(&self, op: Op) -> Result<(), Error> {
        match &self.runner {
            Some(runner) => runner.control().disk(op).await,
            None => Ok(()),
        }
    }

    async fn write(&self, spec: &pb::VmSpec) -> Result<(), Error> {
        let command = self.record.update(|record| record.spec = spec.encode_to_vec().into());
        self.core.propose(command).await.map(drop)
    }
}
