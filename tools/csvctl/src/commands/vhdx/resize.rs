//! `csvctl vhdx resize`.

use std::path::PathBuf;
use std::sync::Arc;

use api::Error;
use api::pb::VmImageRequest;
use clap::Args;
use hv_runner::report::ImageResized;
use vhdx::NewSize;

use super::in_use::{self, Use};
use super::online::{self, Online};
use super::{Roots, failed, file};
use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct Resize {
    /// The image; no other image may have it as its parent
    path: PathBuf,
    /// New size of the disk, such as 20G
    #[arg(long, value_parser = units::parse_size, value_name = "SIZE", required_unless_present = "to_minimum")]
    size: Option<u64>,
    /// Shrink to the smallest size that keeps all partitions, or all data where there are none
    #[arg(long, conflicts_with_all = ["size", "expand_only", "allow_unsafe_shrink"])]
    to_minimum: bool,
    /// Refuse to shrink
    #[arg(long, conflicts_with = "allow_unsafe_shrink")]
    expand_only: bool,
    /// Shrink even if that cuts off data
    #[arg(long)]
    allow_unsafe_shrink: bool,
    /// Show what would be done
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    roots: Roots,
}

impl Resize {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let resized = match Online::of(&self.path, context).await {
            Some(disk) => self.in_use(disk, context).await?,
            None => self.closed(context).await?,
        };
        context.ui.show(&ImageResized { path: self.path, ..resized }, text)
    }

    async fn in_use(&self, disk: Online, context: &Context) -> Result<ImageResized, Error> {
        if self.allow_unsafe_shrink && !self.dry_run {
            let what =
                format!("vhdx resize {}: what lies behind the new end is cut off", self.path.display());
            self.confirm(&what, context)?;
        }
        let how = match self.new_size() {
            NewSize::To(_) => "to",
            NewSize::ExpandTo(_) => "expand_to",
            NewSize::UnsafelyTo(_) => "unsafely_to",
            NewSize::ToMinimumSafe => "to_minimum",
        };
        let request = VmImageRequest {
            size: how.to_owned(),
            size_bytes: self.size.unwrap_or_default(),
            dry_run: self.dry_run,
            ..online::request("resize")
        };
        disk.work(request, "resizing", context).await
    }

    async fn closed(&self, context: &Context) -> Result<ImageResized, Error> {
        let _claim = in_use::claim(&self.path, Use::Change, context).await?;
        let image = file::open_writable(&self.path)?;
        let fail = |error| failed("resize", &self.path, &error);
        let old_bytes = vhdx::info(&image).map_err(fail)?.disk_bytes;
        let chain = || file::with_parents(Arc::clone(&image), &self.path, &self.roots);
        let minimum = chain().read_only().and_then(|image| image.minimum_safe_bytes()).map_err(fail)?;
        let wanted = self.size.unwrap_or(minimum.min(old_bytes));
        let mut shown = ImageResized {
            path: self.path.clone(),
            old_size_bytes: old_bytes,
            size_bytes: wanted,
            minimum_safe_size_bytes: minimum,
            table_moved: false,
            dry_run: self.dry_run,
        };
        file::refuse_other_children("resize", &self.path, &self.roots, None)?;
        if !self.dry_run {
            self.confirm_loss(wanted, minimum, context)?;
            let done = chain().resize(self.new_size()).map_err(fail)?;
            (shown.size_bytes, shown.table_moved) = (done.new_bytes, done.table_moved);
        }
        Ok(shown)
    }

    fn new_size(&self) -> NewSize {
        match self.size {
            None => NewSize::ToMinimumSafe,
            Some(size) if self.expand_only => NewSize::ExpandTo(size),
            Some(size) if self.allow_unsafe_shrink => NewSize::UnsafelyTo(size),
            Some(size) => NewSize::To(size),
        }
    }

    /// Only a shrink that destroys something asks.
    fn confirm_loss(&self, wanted: u64, minimum: u64, context: &Context) -> Result<(), Error> {
        if wanted >= minimum || !self.allow_unsafe_shrink {
            return Ok(());
        }
        let what = format!(
            "vhdx resize {}: {} would be cut off for ever",
            self.path.display(),
            units::size(minimum - wanted)
        );
        self.confirm(&what, context)
    }

    fn confirm(&self, what: &str, context: &Context) -> Result<(), Error> {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        context.ui.confirm(what, &name)
    }
}

fn text(shown: &ImageResized) -> String {
    let verb = if shown.dry_run { "would be resized" } else { "resized" };
    format!(
        "{} {verb} from {} to {} (smallest safe size {})",
        shown.path.display(),
        units::size(shown.old_size_bytes),
        units::size(shown.size_bytes),
        units::size(shown.minimum_safe_size_bytes)
    )
}
