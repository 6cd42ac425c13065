//! Deleting a checkpoint, and merging its images with what rests on them.
//!
//! ```text
//!   D <--- X <--- T        D is needed by no checkpoint any more, and X alone rests on it:
//!   D+X <-------- T        X is merged into D, whoever named X names D, X goes
//! ```
//! An image on which several others rest, or that another VM needs, stays. So does one that cannot be merged while the VM runs:
//! only the image that the guest writes, and the one below it, can be taken up then.
//!
//! **Invariant:** the record names only images with the content that they had: it changes after the merge, in which X keeps its
//! content, and before X is removed.

use std::sync::Arc;

use api::{Error, pb};
use lockmgr::cluster::{VmRecord, VmState};
use prost::Message;

use super::{find, images};
use crate::core::Core;
use crate::view;
use crate::vms::migration::{parse_saved, remove_state};
use crate::vms::{disks, settle, spec_of, work_on_image};

/// Gives the images that stay, each with the reason.
pub(super) async fn delete(
    core: &Arc<Core>,
    name: &str,
    checkpoint: &str,
    dry_run: bool,
) -> Result<Vec<String>, Error> {
    let gone = {
        let _decision = core.vms.decide(name).await;
        let record = settled(core, name).await?;
        let spec = spec_of(&record)?;
        let gone = find(&spec, checkpoint)?.clone();
        if dry_run {
            return Ok(Vec::new());
        }
        let next = without(spec, &gone);
        settle(core, &record, |record| record.spec = next.encode_to_vec().into()).await?;
        gone
    };
    if let Some(file) = parse_saved(&gone.state) {
        remove_state(core, file);
    }
    core.note("vm.checkpoint_deleted", name, format!("checkpoint {checkpoint} deleted"));
    let mut kept = Vec::new();
    for disk in gone.disks.iter().filter(|disk| !disk.read_only) {
        if let Err(why) = (Tidy { core, vm: name, disk }).run().await {
            kept.push(format!("{}:/{}: {}", disk.volume, disk.path, why.message));
        }
    }
    Ok(kept)
}

/// The record of a VM that either runs or does not.
async fn settled(core: &Arc<Core>, name: &str) -> Result<VmRecord, Error> {
    let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
    let record = view::vm(&state, name)?;
    match record.state {
        VmState::Starting | VmState::Saving | VmState::Migrating => {
            Err(Error::conflict(format!("it is {}", record.state)).hint("wait until it runs or is stopped"))
        }
        _ => Ok(record.clone()),
    }
}

/// The configuration without a checkpoint; what came after it comes after the one before it.
fn without(mut spec: pb::VmSpec, gone: &pb::VmCheckpoint) -> pb::VmSpec {
    spec.checkpoints.retain(|checkpoint| checkpoint.name != gone.name);
    let later = spec.checkpoints.iter_mut().map(|checkpoint| &mut checkpoint.after);
    for after in later.chain([&mut spec.checkpoint]).filter(|after| **after == gone.name) {
        after.clone_from(&gone.after);
    }
    spec
}

/// An image that was a checkpoint's.
struct Tidy<'a> {
    core: &'a Arc<Core>,
    vm: &'a str,
    disk: &'a pb::VmDisk,
}

impl Tidy<'_> {
    /// Merges the image with what rests on it, or removes it when nothing does. An error says why it stays.
    async fn run(&self) -> Result<(), Error> {
        let record = settled(self.core, self.vm).await?;
        let spec = spec_of(&record)?;
        if self.names(&spec).any(|path| path == self.disk.path) {
            return Ok(());
        }
        disks::refuse_other_children(self.core, self.vm, &self.disk.volume, &[&self.disk.path]).await?;
        let chains = self.chains(&record, &spec).await?;
        match children(&chains, &self.disk.path).as_slice() {
            [] if images::is_made_here(&self.disk.path) => {
                images::remove(self.core, &self.disk.volume, &self.disk.path).await;
                Ok(())
            }
            [] => Err(Error::conflict("nothing rests on it; remove it if nobody needs it")),
            [child] => self.take_up(&record, &chains, child).await,
            more => Err(Error::conflict(format!("{} rest on it", more.join(" and ")))),
        }
    }

    /// The images on the disk's volume that the record names.
    fn names<'s>(&'s self, spec: &'s pb::VmSpec) -> impl Iterator<Item = &'s str> {
        let of_checkpoints = spec.checkpoints.iter().flat_map(|checkpoint| &checkpoint.disks);
        let all = spec.disks.iter().chain(of_checkpoints);
        all.filter(|disk| disk.volume == self.disk.volume).map(|disk| disk.path.as_str())
    }

    /// Each image that the record names, with its parents.
    async fn chains(&self, record: &VmRecord, spec: &pb::VmSpec) -> Result<Vec<Vec<String>>, Error> {
        let mut chains = Vec::new();
        for (place, disk) in (0..).zip(&spec.disks).filter(|(_, disk)| disk.volume == self.disk.volume) {
            let slot = disk.slot.unwrap_or(place);
            chains.push(with(&disk.path, disks::parents(self.core, record, slot, disk).await?));
        }
        for disk in spec.checkpoints.iter().flat_map(|checkpoint| &checkpoint.disks) {
            if disk.volume == self.disk.volume {
                chains.push(with(&disk.path, disks::parents_at_rest(self.core, disk).await));
            }
        }
        Ok(chains)
    }

    /// Merges `child` into the image.
    async fn take_up(&self, record: &VmRecord, chains: &[Vec<String>], child: &str) -> Result<(), Error> {
        let above = children(chains, child);
        match record.state {
            VmState::Running | VmState::Paused => self.take_up_in_use(record, child, &above).await?,
            _ => self.take_up_at_rest(child, &above).await?,
        }
        self.name_instead(child).await?;
        images::remove(self.core, &self.disk.volume, child).await;
        Ok(())
    }

    /// The process of the VM merges, while the guest goes on.
    async fn take_up_in_use(&self, record: &VmRecord, child: &str, above: &[String]) -> Result<(), Error> {
        let spec = spec_of(record)?;
        let tops: Vec<_> = spec.disks.iter().filter(|disk| disk.volume == self.disk.volume).collect();
        let is_top = |path: &str| tops.iter().any(|disk| disk.path == path && !disk.read_only);
        let top = if is_top(child) {
            // What the guest writes now is taken up after it writes something else.
            let next = images::next_of(child);
            self.ask(child, "snapshot", &next, "").await?;
            next
        } else {
            match above {
                [top] if is_top(top) => top.clone(),
                _ => return Err(Error::conflict("it lies too deep to be merged while the VM runs")),
            }
        };
        self.ask(&top, "merge", child, &self.disk.path).await
    }

    async fn ask(&self, disk: &str, action: &str, other: &str, parent: &str) -> Result<(), Error> {
        let full = |path: &str| match path {
            "" => String::new(),
            path => format!("{}:/{path}", self.disk.volume),
        };
        let request = pb::VmImageRequest {
            path: full(disk),
            action: action.to_owned(),
            other: full(other),
            parent: full(parent),
            // The record may name it.
            keep: true,
            vm: self.vm.to_owned(),
            ..pb::VmImageRequest::default()
        };
        work_on_image(self.core, request).await.map(drop)
    }

    async fn take_up_at_rest(&self, child: &str, above: &[String]) -> Result<(), Error> {
        let _decision = self.core.vms.decide(self.vm).await;
        let record = settled(self.core, self.vm).await?;
        if matches!(record.state, VmState::Running | VmState::Paused) {
            return Err(Error::conflict("the VM was started meanwhile"));
        }
        let top = match above {
            [] => None,
            [top] => Some(top.clone()),
            more => return Err(Error::conflict(format!("{} rest on {child}", more.join(" and ")))),
        };
        let node = images::node(self.core, &self.disk.volume)?;
        let (volume, parent, child) = (self.disk.volume.clone(), self.disk.path.clone(), child.to_owned());
        let merged = tokio::task::spawn_blocking(move || {
            hv_runner::chain::merge(&volume, &node, (&child, &parent), top.as_deref())
        });
        let failed = |error| Error::failed(hv_runner::report::message(&error));
        merged.await.map_err(Error::failed)?.map_err(failed)
    }

    /// Whoever named `child` names the image that has taken it up.
    async fn name_instead(&self, child: &str) -> Result<(), Error> {
        let _decision = self.core.vms.decide(self.vm).await;
        let record = settled(self.core, self.vm).await?;
        let mut spec = spec_of(&record)?;
        let of_checkpoints = spec.checkpoints.iter_mut().flat_map(|checkpoint| &mut checkpoint.disks);
        let all = of_checkpoints.chain(&mut spec.disks);
        let named = |disk: &&mut pb::VmDisk| disk.volume == self.disk.volume && disk.path == child;
        let mut changed = false;
        for disk in all.filter(named) {
            disk.path.clone_from(&self.disk.path);
            changed = true;
        }
        if changed {
            settle(self.core, &record, |record| record.spec = spec.encode_to_vec().into()).await?;
        }
        Ok(())
    }
}

fn with(image: &str, parents: Vec<String>) -> Vec<String> {
    [vec![image.to_owned()], parents].concat()
}

/// The images that rest directly on `image`, each once.
fn children(chains: &[Vec<String>], image: &str) -> Vec<String> {
    let pairs = chains.iter().flat_map(|chain| chain.windows(2));
    let mut found: Vec<_> = pairs.filter(|pair| pair[1] == image).map(|pair| pair[0].clone()).collect();
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_rests_on_an_image_is_found_in_all_chains_and_told_once() {
        let chain = |names: &str| names.split(' ').map(ToOwned::to_owned).collect::<Vec<_>>();
        let chains = [chain("t x d"), chain("x d"), chain("y d"), chain("d")];
        assert_eq!(children(&chains, "d"), ["x", "y"]);
        assert_eq!(children(&chains, "x"), ["t"]);
        assert!(children(&chains, "t").is_empty());
    }

    #[test]
    fn a_checkpoint_that_goes_leaves_its_place_in_the_order_to_the_one_before() {
        let checkpoint = |name: &str, after: &str| pb::VmCheckpoint {
            name: name.into(),
            after: after.into(),
            ..pb::VmCheckpoint::default()
        };
        let checkpoints = vec![checkpoint("a", ""), checkpoint("b", "a"), checkpoint("c", "b")];
        let spec = pb::VmSpec { checkpoint: "b".into(), checkpoints, ..pb::VmSpec::default() };
        let left = without(spec, &checkpoint("b", "a"));
        assert_eq!((left.checkpoint.as_str(), left.checkpoints[1].after.as_str()), ("a", "a"));
        assert_eq!(left.checkpoints.len(), 2);
    }
}
