//! `csvctl vhdx create`.

use std::path::PathBuf;

use api::Error;
use clap::Args;
use serde::Serialize;
use vhdx::Spec;

use super::{failed, file};
use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// The image to make
    path: PathBuf,
    /// Size of the disk, such as 8G
    #[arg(long, value_parser = units::parse_size, value_name = "SIZE")]
    size: u64,
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
}

#[derive(Serialize)]
struct Created {
    path: PathBuf,
    size_bytes: u64,
    block_bytes: u64,
    kind: &'static str,
}

impl Create {
    pub(crate) fn run(self, context: &Context) -> Result<(), Error> {
        let mut spec = if self.fixed { Spec::fixed(self.size) } else { Spec::dynamic(self.size) };
        spec.block_bytes = self.block.unwrap_or(spec.block_bytes);
        spec.logical_sector = self.sector;
        let target = file::make(&self.path, self.force)?;
        vhdx::create(&target, &spec).map_err(|error| {
            file::clear_away(&self.path);
            failed("create", &self.path, &error)
        })?;
        let created = Created {
            path: self.path,
            size_bytes: spec.size_bytes,
            block_bytes: spec.block_bytes,
            kind: if spec.fixed { "fixed" } else { "dynamic" },
        };
        context.ui.show(&created, |created| {
            format!("{}: {} {} image", created.path.display(), units::size(created.size_bytes), created.kind)
        })
    }
}
