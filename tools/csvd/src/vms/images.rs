//! Work on the image of a running VM's disk: its process does it, while the guest goes on.
//!
//! A snapshot changes which image is the disk:
//! ```text
//!   process: hold requests, close the old image, make the child, open it    a crash here: the old image is the disk, and whole;
//!                          |                                                the child's file is referred to by nobody
//!   daemon:  one compare-and-swap: the record names the child               a crash here: the child is the disk; it is empty, over
//!                          |                                                a parent that was closed cleanly
//!   process: requests go on in the child                                    from here on as with any other disk
//! ```
//! The record is what a restart, a node that takes over and a move go by, so it changes after the child is durable and before
//! anything is written to it. An answer that was lost is found in the record (H6).
//!
//! **Invariant (E6):** while work is under way the VM is not moved, and none of its disks comes or goes.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use api::{Error, pb};
use hv::control::image_work::Work;
use hv::control::{
    ImageCompact, ImageLook, ImageMerge, ImageProgress, ImageResize, ImageSnapshot, ImageWork,
};
use lockmgr::cluster::{ProposeError, VmRecord, VmState};
use prost::Message;

use super::runner::Runner;
use super::{disks, running_here, spec_of};
use crate::core::Core;

/// Pause before something is asked again that was not answered.
const AGAIN_AFTER: Duration = Duration::from_millis(100);

/// Does the work to its end. The VM is one of this node.
pub(crate) async fn work_on_image(
    core: &Arc<Core>,
    request: pb::VmImageRequest,
) -> Result<pb::VmImageProgress, Error> {
    let during = |error: Error| error.during(format!("vhdx {} {}", request.action, request.path));
    let (record, runner) = running_here(core, &request.vm, "image").map_err(during)?;
    let _moving = runner.begin_move().ok_or_else(|| {
        during(
            Error::conflict(format!(
                "VM {} is being moved, or one of its images is being worked on",
                request.vm
            ))
            .hint("wait until that is done"),
        )
    })?;
    let disk = OfDisk::find(core, &record, &runner, &request).map_err(during)?;
    let result = disk.work(&request).await.map_err(during)?;
    core.note("vm.image", &request.vm, format!("vhdx {} of {} done", request.action, request.path));
    Ok(pb::VmImageProgress { result, ..pb::VmImageProgress::default() })
}

/// How far it is.
pub(crate) fn image_progress(core: &Core, vm: &str) -> Result<pb::VmImageProgress, Error> {
    let (_, runner) = running_here(core, vm, "image")?;
    Ok(runner.image.lock().unwrap_or_else(PoisonError::into_inner).clone())
}

/// A disk that is worked on.
struct OfDisk<'a> {
    core: &'a Arc<Core>,
    runner: &'a Runner,
    vm: &'a str,
    /// Epoch of the record in which the work was begun.
    epoch: u64,
    slot: u32,
    volume: &'a str,
    path: &'a str,
}

impl<'a> OfDisk<'a> {
    fn find(
        core: &'a Arc<Core>,
        record: &VmRecord,
        runner: &'a Runner,
        request: &'a pb::VmImageRequest,
    ) -> Result<Self, Error> {
        if !matches!(record.state, VmState::Running | VmState::Paused) {
            return Err(Error::conflict(format!("VM {} is {}", record.name, record.state))
                .hint("wait until it runs or is stopped"));
        }
        let (volume, path) = request.path.split_once(":/").unwrap_or_default();
        let spec = spec_of(record)?;
        let (slot, disk) = slot_of(&spec, volume, path).ok_or_else(|| {
            Error::conflict(format!("it is no disk of VM {} any more", record.name))
                .hint("`csvctl vm show` lists its disks")
        })?;
        if disk.read_only {
            return Err(
                Error::conflict(format!("VM {} only reads it", record.name)).hint("stop the VM first")
            );
        }
        Ok(Self { core, runner, vm: &request.vm, epoch: record.epoch, slot, volume, path })
    }

    async fn work(&self, request: &pb::VmImageRequest) -> Result<String, Error> {
        let work = self.wanted(request)?;
        if let Work::Merge(merge) = &work {
            self.refuse_kept(merge)?;
            disks::refuse_other_children(self.core, self.vm, self.volume, &[&merge.child, &merge.parent])
                .await?;
        }
        self.show(&ImageProgress::default());
        self.runner.control().begin_image(ImageWork { slot: self.slot, work: Some(work) }).await?;
        let mut seen = 0;
        loop {
            let news = self.watch(seen).await?;
            seen = news.version;
            self.show(&news);
            match news.phase.as_str() {
                "asking" => self.decide(&request.other).await?,
                "done" => return Ok(news.result),
                "failed" => {
                    let failure = news.failure.unwrap_or_default();
                    return Err(Error::conflict(failure.message).hint(failure.hint));
                }
                _ => {}
            }
        }
    }

    /// What a checkpoint is made of stays as it is: its images take nothing up, and stay where they are.
    fn refuse_kept(&self, merge: &ImageMerge) -> Result<(), Error> {
        let spec = spec_of(crate::view::vm(&self.core.state(), self.vm)?)?;
        let changes = |disk: &pb::VmDisk| {
            disk.volume == self.volume
                && (disk.path == merge.parent || (disk.path == merge.child && !merge.keep))
        };
        match spec.checkpoints.iter().find(|checkpoint| checkpoint.disks.iter().any(changes)) {
            Some(checkpoint) => Err(Error::conflict(format!("checkpoint {} needs it", checkpoint.name))
                .hint(format!(
                    "csvctl vm checkpoint delete {} {} merges its images",
                    self.vm, checkpoint.name
                ))),
            None => Ok(()),
        }
    }

    fn wanted(&self, request: &pb::VmImageRequest) -> Result<Work, Error> {
        let below = |path: &str| self.below(path);
        let what = request.action.clone();
        Ok(match request.action.as_str() {
            "snapshot" => Work::Snapshot(ImageSnapshot { path: below(&request.other)? }),
            "merge" => Work::Merge(ImageMerge {
                child: below(&request.other)?,
                parent: below(&request.parent)?,
                keep: request.keep,
            }),
            "compact" => Work::Compact(ImageCompact {}),
            "resize" => Work::Resize(ImageResize {
                how: request.size.clone(),
                size_bytes: request.size_bytes,
                dry_run: request.dry_run,
            }),
            "map" if !request.other.is_empty() => {
                Work::Look(ImageLook { what, since: below(&request.other)? })
            }
            "info" | "check" | "map" => Work::Look(ImageLook { what, since: String::new() }),
            other => {
                return Err(Error::usage(format!("`{other}` is no work on an image"))
                    .hint("is csvctl newer than csvd?"));
            }
        })
    }

    /// A path of the disk's volume; the process has no other.
    fn below(&self, path: &str) -> Result<String, Error> {
        match path.split_once(":/") {
            Some((volume, below)) if volume == self.volume => Ok(below.to_owned()),
            _ => Err(Error::usage(format!("{path} does not lie on volume {}", self.volume))
                .hint("all images of a chain lie on the volume of the VM's disk")),
        }
    }

    fn show(&self, news: &ImageProgress) {
        let mut shown = self.runner.image.lock().unwrap_or_else(PoisonError::into_inner);
        (shown.done, shown.total) = (news.done, news.total);
    }

    /// Asks until there is an answer: the process goes on by itself.
    async fn watch(&self, seen: u64) -> Result<ImageProgress, Error> {
        loop {
            match self.runner.control().watch_image(seen).await {
                Err(error) if !self.runner.has_ended() => {
                    tracing::warn!(vm = self.vm, %error, "no news of the work on an image");
                    tokio::time::sleep(AGAIN_AFTER).await;
                }
                answered => return answered,
            }
        }
    }

    /// Writes the new image into the record, and lets the process go on with what the record then says.
    async fn decide(&self, new: &str) -> Result<(), Error> {
        let new = self.below(new)?;
        self.core.vms.rehearsal.pass("snapshot").await;
        let named = self.name_in_record(&new).await;
        self.core.vms.rehearsal.pass("snapshot-recorded").await;
        if named {
            let text = format!("goes on in {}:/{new}; {}:/{} is kept", self.volume, self.volume, self.path);
            self.core.note("vm.snapshot", self.vm, text);
        }
        loop {
            match self.runner.control().decide_image(named).await {
                Err(error) if !self.runner.has_ended() => {
                    // An answer that was lost: then it does not ask any more.
                    if self.watch(0).await?.phase != "asking" {
                        return Ok(());
                    }
                    tracing::warn!(vm = self.vm, %error, "the answer to a snapshot has not arrived");
                    tokio::time::sleep(AGAIN_AFTER).await;
                }
                answered => return answered,
            }
        }
    }

    /// Whether the record names `new` as the disk. Certain in any case.
    async fn name_in_record(&self, new: &str) -> bool {
        loop {
            let Ok(state) = self.core.cluster.read().await else {
                tokio::time::sleep(AGAIN_AFTER).await;
                continue;
            };
            let ours = |record: &&VmRecord| record.owner == self.core.me && record.epoch == self.epoch;
            // Without the right to run it this process is about to end.
            let Some(record) = state.vms.get(self.vm).filter(ours) else { return false };
            let Ok(mut spec) = spec_of(record) else { return false };
            if slot_of(&spec, self.volume, new).is_some_and(|(slot, _)| slot == self.slot) {
                return true;
            }
            for (place, disk) in (0..).zip(&mut spec.disks) {
                if *disk.slot.get_or_insert(place) == self.slot {
                    new.clone_into(&mut disk.path);
                }
            }
            let command = record.update(|record| record.spec = spec.encode_to_vec().into());
            match self.core.cluster.propose(command).await {
                Ok(_) => return true,
                Err(ProposeError::NoQuorum { .. } | ProposeError::Invalid { .. }) => return false,
                // The record tells.
                Err(error) => {
                    tracing::warn!(vm = self.vm, %error, "whether the record names the snapshot is read from it");
                    tokio::time::sleep(AGAIN_AFTER).await;
                }
            }
        }
    }
}

fn slot_of<'a>(spec: &'a pb::VmSpec, volume: &str, path: &str) -> Option<(u32, &'a pb::VmDisk)> {
    let named = |(_, disk): &(u32, &pb::VmDisk)| disk.volume == volume && disk.path == path;
    (0..).zip(&spec.disks).find(named).map(|(place, disk)| (disk.slot.unwrap_or(place), disk))
}
