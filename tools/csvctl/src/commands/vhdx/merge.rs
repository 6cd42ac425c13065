//! `csvctl vhdx merge`.

use std::path::PathBuf;

use api::Error;
use api::pb::VmImageRequest;
use clap::Args;
use hv_runner::report::ImageMerged;

use super::in_use::{self, Use};
use super::online::{self, Online};
use super::{Roots, failed, file};
use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct Merge {
    /// The image to be merged; its file is removed afterwards
    child: PathBuf,
    /// Its parent, which takes all of it up and must have no other child
    parent: PathBuf,
    /// The child of CHILD, if there is one: it becomes a child of PARENT
    #[arg(long, value_name = "IMAGE")]
    top: Option<PathBuf>,
    /// Leave the file of CHILD where it is
    #[arg(long)]
    keep: bool,
    /// Check everything, change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    roots: Roots,
}

impl Merge {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let merged = match Online::of_child(&self.child, context).await {
            Some(disk) => self.in_use(disk, context).await?,
            None => {
                self.refuse_written(context).await?;
                self.closed(context).await?
            }
        };
        let (child, parent) = (self.child, self.parent);
        context.ui.show(&ImageMerged { child, parent, ..merged }, text)
    }

    /// The child lies below the disk of a VM that runs: its process merges.
    async fn in_use(&self, disk: Online, context: &Context) -> Result<ImageMerged, Error> {
        let (child, parent) = (online::shown(&self.child), online::shown(&self.parent));
        let top = Some(PathBuf::from(disk.disk()));
        if self.dry_run {
            return Ok(ImageMerged {
                child: child.into(),
                parent: parent.into(),
                top,
                data_bytes: 0,
                child_removed: false,
                dry_run: true,
            });
        }
        self.confirm(context)?;
        let request = VmImageRequest { other: child, parent, keep: self.keep, ..online::request("merge") };
        let merged: ImageMerged = disk.work(request, "merging", context).await?;
        Ok(ImageMerged { top, ..merged })
    }

    /// What a guest writes now is taken up after it goes on in another image.
    async fn refuse_written(&self, context: &Context) -> Result<(), Error> {
        match Online::of(&self.child, context).await {
            Some(disk) => Err(Error::conflict(format!(
                "vhdx merge: {} is what VM {} writes now",
                self.child.display(),
                disk.vm()
            ))
            .hint("let it go on in a new image with `csvctl vhdx snapshot`, then merge this one")),
            None => Ok(()),
        }
    }

    async fn closed(&self, context: &Context) -> Result<ImageMerged, Error> {
        let mut claims = Vec::new();
        for path in [Some(&self.child), Some(&self.parent), self.top.as_ref()].into_iter().flatten() {
            claims.push(in_use::claim(path, Use::Change, context).await?);
        }
        self.check_chain()?;
        let mut merged = ImageMerged {
            child: self.child.clone(),
            parent: self.parent.clone(),
            top: self.top.clone(),
            data_bytes: 0,
            child_removed: false,
            dry_run: self.dry_run,
        };
        if !self.dry_run {
            self.confirm(context)?;
            merged.data_bytes = self.merge(context)?;
            if !self.keep {
                std::fs::remove_file(&self.child)
                    .map_err(|error| Error::failed(format!("remove {}: {error}", self.child.display())))?;
                merged.child_removed = true;
            }
        }
        Ok(merged)
    }

    fn confirm(&self, context: &Context) -> Result<(), Error> {
        let what = format!("vhdx merge {} into {}", self.child.display(), self.parent.display());
        let name = self.child.file_name().unwrap_or_default().to_string_lossy();
        context.ui.confirm(&what, &name)
    }

    /// That CHILD is a child of PARENT, and TOP one of CHILD.
    fn check_chain(&self) -> Result<(), Error> {
        let pairs = [Some((&self.child, &self.parent)), self.top.as_ref().map(|top| (top, &self.child))];
        for (child, parent) in pairs.into_iter().flatten() {
            let image =
                file::open_image(child, &self.roots).map_err(|error| failed("merge", child, &error))?;
            let wanted = file::open(parent)?.identity();
            if image.parent().is_none_or(|parent| parent.identity() != wanted) {
                return Err(Error::usage(format!(
                    "vhdx merge: {} is not the parent of {}",
                    parent.display(),
                    child.display()
                ))
                .hint("`csvctl vhdx info` shows the parent of an image"));
            }
        }
        file::refuse_other_children("merge", &self.child, &self.roots, self.top.as_deref())?;
        file::refuse_other_children("merge", &self.parent, &self.roots, Some(&self.child))
    }

    fn merge(&self, context: &Context) -> Result<u64, Error> {
        let fail = |error| failed("merge", &self.child, &error);
        let (child, parent) = (file::open_writable(&self.child)?, file::open_writable(&self.parent)?);
        let steps = context.ui.progress("merging");
        let mut show = |progress: vhdx::Progress| steps.at(progress.done_bytes, progress.total_bytes);
        let done = match &self.top {
            None => {
                let (resolver, path) = file::place_of(&self.child, &self.roots);
                vhdx::merge(&child, &resolver, &path, &parent, &mut show)
            }
            Some(top) => {
                let image = file::with_parents(file::open_writable(top)?, top, &self.roots);
                let disk = image.writable().map_err(fail)?;
                let done = disk.merge_parent(&child, &parent, &mut show);
                disk.close().map_err(fail)?;
                done
            }
        };
        Ok(done.map_err(fail)?.data_bytes)
    }
}

fn text(merged: &ImageMerged) -> String {
    let verb = if merged.dry_run { "can be merged" } else { "merged" };
    let removed = if merged.child_removed { "; its file is removed" } else { "" };
    format!(
        "{} {verb} into {}: {} written{removed}",
        merged.child.display(),
        merged.parent.display(),
        units::size(merged.data_bytes)
    )
}
