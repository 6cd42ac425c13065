//! `csvctl vhdx create`.

use std::path::{Path, PathBuf};

use api::Error;
use blockio::BlockDevice;
use clap::Args;
use serde::Serialize;
use vhdx::{ChildSpec, Spec, VhdxError};

use super::in_use::{self, Use};
use super::{Roots, failed, file};
use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// The image to make
    path: PathBuf,
    /// Size of the disk, such as 8G
    #[arg(long, value_parser = units::parse_size, value_name = "SIZE", required_unless_present = "parent")]
    size: Option<u64>,
    /// Make a child of this image: it holds only what is written from now on, and the parent must not be written any more
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["fixed", "sector"])]
    parent: Option<PathBuf>,
    /// Give every block its place now
    #[arg(long)]
    fixed: bool,
    /// Size of a block, a power of two from 1M to 256M
    #[arg(long, value_parser = units::parse_size, value_name = "SIZE")]
    block: Option<u64>,
    /// Sector size that the guest sees: 512 or 4096
    #[arg(long, default_value_t = 512, value_name = "BYTES")]
    sector: u32,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    roots: Roots,
}

#[derive(Serialize)]
struct Created {
    path: PathBuf,
    size_bytes: u64,
    block_bytes: u64,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<PathBuf>,
}

impl Create {
    /// The command that makes `child` a child of `parent`.
    pub(super) fn child_of(parent: PathBuf, child: PathBuf, roots: Roots) -> Self {
        let sector = 512;
        Self {
            path: child,
            size: None,
            parent: Some(parent),
            fixed: false,
            block: None,
            sector,
            force: false,
            roots,
        }
    }

    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let _replaced = match self.path.exists() {
            true if self.force => Some(in_use::claim(&self.path, Use::Change, context).await?),
            _ => None,
        };
        let created = match &self.parent {
            Some(parent) => {
                // A parent that somebody writes is no parent.
                let _claim = in_use::claim(parent, Use::Read, context).await?;
                self.create_child(parent)?
            }
            None => self.create()?,
        };
        context.ui.show(&created, |created| {
            format!("{}: {} {} image", created.path.display(), units::size(created.size_bytes), created.kind)
        })
    }

    fn create(&self) -> Result<Created, Error> {
        let size = self.size.unwrap_or_default();
        let mut spec = if self.fixed { Spec::fixed(size) } else { Spec::dynamic(size) };
        spec.block_bytes = self.block.unwrap_or(spec.block_bytes);
        spec.logical_sector = self.sector;
        let target = file::make(&self.path, self.force)?;
        vhdx::create(&target, &spec).map_err(|error| self.give_up(&error))?;
        let kind = if spec.fixed { "fixed" } else { "dynamic" };
        Ok(self.created(spec.size_bytes, spec.block_bytes, kind))
    }

    fn create_child(&self, parent: &Path) -> Result<Created, Error> {
        let image =
            file::open_image(parent, &self.roots).map_err(|error| failed("create", parent, &error))?;
        let paths =
            file::paths_to(&self.path, parent).map_err(|error| failed("create", &self.path, &error))?;
        let mut spec = ChildSpec::new(paths);
        spec.size_bytes = self.size;
        spec.block_bytes = self.block.unwrap_or(spec.block_bytes);
        let target = file::make(&self.path, self.force)?;
        vhdx::create_child(&target, &image, &spec).map_err(|error| self.give_up(&error))?;
        let size_bytes = self.size.unwrap_or(image.geometry().size_bytes);
        Ok(self.created(size_bytes, spec.block_bytes, "differencing"))
    }

    fn created(&self, size_bytes: u64, block_bytes: u64, kind: &'static str) -> Created {
        Created { path: self.path.clone(), size_bytes, block_bytes, kind, parent: self.parent.clone() }
    }

    fn give_up(&self, error: &VhdxError) -> Error {
        file::clear_away(&self.path);
        failed("create", &self.path, error)
    }
}
