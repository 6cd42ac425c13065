//! What is done to the image of a disk in use, step by step. Each gives its report as a JSON document.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use blockio::{BlockDevice, ImageFile};
use hv::control::{ImageLook, ImageMerge, ImageResize};
use serde::Serialize;
use vhdx::{Builder, ChildSpec, Image, NewSize, ParentPaths, VhdxError};

use crate::config::VolumePath;
use crate::disk::{WritableDisk, of_slot};
use crate::failure::Failure;
use crate::images::Work;
use crate::report::{
    self, ImageCheck, ImageCompacted, ImageCreated, ImageInfo, ImageMap, ImageMerged, ImageResized,
};
use crate::runner::{Phase, Runner};

type Outcome = Result<String, Failure>;

/// The guest goes on in a new child; the image that it wrote until now is kept as it is.
pub(crate) fn snapshot(runner: &Runner, work: &Work, slot: u32, path: &str) -> Outcome {
    let mut disks = runner.work_in("given a snapshot", &[Phase::Live])?;
    let disk = of_slot(&mut disks, slot)?;
    let used = disk.writable()?;
    let to = used.beside(path);
    let file: Arc<dyn ImageFile> = runner.volumes().create_new_file(&to)?;
    let done = used.disk.snapshot_when(&file, &absolute(path), || work.ask());
    if let Err(error) = done {
        // The record does not name it.
        runner.volumes().remove_file(&to);
        return Err(used.refused(&error));
    }
    disk.is_now(path);
    runner.show(&disks);
    document(&ImageCreated {
        path: path.into(),
        size_bytes: used.disk.geometry().size_bytes,
        block_bytes: ChildSpec::new(ParentPaths::default()).block_bytes,
        kind: "differencing".to_owned(),
        parent: Some(used.path().into()),
    })
}

/// The disk's parent is taken up into its own parent.
pub(crate) fn merge(runner: &Runner, work: &Work, slot: u32, asked: &ImageMerge) -> Outcome {
    let used = used(runner, slot)?;
    let (child_at, parent_at) = (used.beside(&asked.child), used.beside(&asked.parent));
    let child: Arc<dyn ImageFile> = runner.volumes().open_file(&child_at)?;
    let parent: Arc<dyn ImageFile> = runner.volumes().open_file(&parent_at)?;
    let top: Arc<dyn ImageFile> = runner.volumes().open_file(&used.beside(used.path()))?;
    refuse_other_children(runner, &used, &asked.child, &*top)?;
    refuse_other_children(runner, &used, &asked.parent, &*child)?;
    let mut show = |progress: vhdx::Progress| work.progress(progress.done_bytes, progress.total_bytes);
    let done = used.disk.merge_parent(&child, &parent, &mut show).map_err(|error| used.refused(&error))?;
    let child_removed = !asked.keep && runner.volumes().remove_file(&child_at);
    see_chain(runner, slot)?;
    document(&ImageMerged {
        child: asked.child.clone().into(),
        parent: asked.parent.clone().into(),
        top: Some(used.path().into()),
        data_bytes: done.data_bytes,
        child_removed,
        dry_run: false,
    })
}

/// An image that others rest on, besides `known`, stays as it is. The cluster knows those that VMs use; here also those are
/// found that none uses.
fn refuse_other_children(
    runner: &Runner,
    used: &WritableDisk,
    path: &str,
    known: &dyn ImageFile,
) -> Result<(), Failure> {
    let at = used.beside(path);
    let file: Arc<dyn ImageFile> = runner.volumes().open_file(&at)?;
    let relatives = runner.volumes().relatives(&at.volume)?;
    let found = Builder::open(file).parents(relatives, &absolute(path)).children();
    for child in found.map_err(|error| used.refused(&error))? {
        let other: Arc<dyn ImageFile> = runner.volumes().open_file(&used.beside(&child))?;
        if other.identity() != known.identity() {
            return Err(Failure::new(
                format!("{}:{path} has another child, {child}, which needs it as it is", at.volume),
                "convert the other child to an image of its own, or delete it",
            ));
        }
    }
    Ok(())
}

/// The chain has changed: whoever asks which files the VM uses is told so.
fn see_chain(runner: &Runner, slot: u32) -> Result<(), Failure> {
    let mut disks = runner.work_in("shown", &[Phase::Live])?;
    of_slot(&mut disks, slot)?.see_chain();
    runner.show(&disks);
    Ok(())
}

/// Space of zero blocks and gaps is given back.
pub(crate) fn compact(runner: &Runner, work: &Work, slot: u32) -> Outcome {
    let used = used(runner, slot)?;
    let done = used.disk.compact(&mut |progress| {
        work.progress(progress.scanned_blocks, progress.total_blocks);
        ControlFlow::Continue(())
    });
    let done = done.map_err(|error| used.refused(&error))?;
    document(&ImageCompacted {
        path: used.path().into(),
        old_file_bytes: done.old_file_bytes,
        file_bytes: done.new_file_bytes,
        zero_blocks: done.zero_blocks,
        moved_blocks: done.moved_blocks,
    })
}

/// The disk becomes larger or smaller, and the guest is told.
pub(crate) fn resize(runner: &Runner, slot: u32, asked: &ImageResize) -> Outcome {
    let used = used(runner, slot)?;
    let size = match asked.how.as_str() {
        "expand_to" => NewSize::ExpandTo(asked.size_bytes),
        "unsafely_to" => NewSize::UnsafelyTo(asked.size_bytes),
        "to_minimum" => NewSize::ToMinimumSafe,
        _ => NewSize::To(asked.size_bytes),
    };
    let old_size_bytes = used.disk.geometry().size_bytes;
    let minimum = used.disk.look_at_image(Image::minimum_safe_bytes).map_err(|error| used.refused(&error))?;
    let size_bytes = match size {
        NewSize::ToMinimumSafe => minimum.min(old_size_bytes),
        _ => asked.size_bytes,
    };
    let mut shown = ImageResized {
        path: used.path().into(),
        old_size_bytes,
        size_bytes,
        minimum_safe_size_bytes: minimum,
        table_moved: false,
        dry_run: asked.dry_run,
    };
    if !asked.dry_run {
        let done = used.disk.resize(size).map_err(|error| used.refused(&error))?;
        (shown.size_bytes, shown.table_moved) = (done.new_bytes, done.table_moved);
        runner.remeasure(slot)?;
    }
    document(&shown)
}

/// Tells what the image is, at one moment.
pub(crate) fn look(runner: &Runner, slot: u32, asked: &ImageLook) -> Outcome {
    let used = used(runner, slot)?;
    let path = PathBuf::from(used.path());
    let refused = |error: VhdxError| used.refused(&error);
    match asked.what.as_str() {
        "info" => document(&ImageInfo::new(path, used.disk.look(vhdx::info).map_err(refused)?)),
        "check" => {
            let report = used.disk.look(|file| Ok(vhdx::check(file))).map_err(refused)?;
            document(&ImageCheck::new(path, report, &[]))
        }
        "map" => map(runner, &used, &asked.since),
        other => {
            Err(Failure::new(format!("an image cannot be asked for `{other}`"), "is csvd newer than hv?"))
        }
    }
}

fn map(runner: &Runner, used: &WritableDisk, since: &str) -> Outcome {
    let wanted = match since {
        "" => None,
        since => Some(runner.volumes().open_file(&used.beside(since))?.identity()),
    };
    let extents = used.disk.look_at_image(|image| said(image, wanted.as_deref()));
    let extents = extents.map_err(|error| used.refused(&error))?.ok_or_else(|| {
        Failure::new(
            format!("{since} is no parent of {}", used.path()),
            "`csvctl vm show` lists the parents of a VM's disks",
        )
    })?;
    document(&ImageMap {
        path: used.path().into(),
        since: (!since.is_empty()).then(|| since.into()),
        size_bytes: used.disk.geometry().size_bytes,
        extents,
    })
}

fn said(image: &Image, since: Option<&str>) -> Result<Option<Vec<report::Extent>>, VhdxError> {
    let extents = match since {
        None => report::extents(image).map(Some),
        Some(since) => report::changed(image, since),
    };
    extents.map_err(|source| VhdxError::Io { doing: "mapping the image".to_owned(), source })
}

fn used(runner: &Runner, slot: u32) -> Result<WritableDisk, Failure> {
    let mut disks = runner.work_in("worked on", &[Phase::Live])?;
    of_slot(&mut disks, slot)?.writable()
}

fn absolute(path: &str) -> String {
    format!("/{}", path.trim_start_matches('/'))
}

fn document<T: Serialize>(report: &T) -> Outcome {
    serde_json::to_string(report).map_err(|error| {
        Failure::new(format!("the report cannot be told: {error}"), "look at the image again")
    })
}

impl WritableDisk {
    /// Another file on the same volume.
    fn beside(&self, path: &str) -> VolumePath {
        VolumePath { volume: self.spec.volume.clone(), path: path.to_owned() }
    }

    fn path(&self) -> &str {
        &self.spec.path
    }
}
