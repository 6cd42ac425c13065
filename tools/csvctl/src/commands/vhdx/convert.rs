//! `csvctl vhdx convert`.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use api::Error;
use clap::{Args, ValueEnum};
use rustix::fs::{SeekFrom, seek};
use serde::Serialize;
use vhdx::{Builder, Progress, Spec};

use super::{failed, file};
use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct Convert {
    /// An image, or raw bytes
    source: PathBuf,
    /// What to make
    target: PathBuf,
    /// Form of the target; without it, vhdx for a name that ends so, raw otherwise
    #[arg(long, value_enum)]
    to: Option<Form>,
    /// Make a fixed image
    #[arg(long)]
    fixed: bool,
    /// Size of a block of the new image, a power of two from 1M to 256M
    #[arg(long, value_parser = units::parse_size, value_name = "SIZE")]
    block: Option<u64>,
    /// Replace an existing target
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Form {
    Vhdx,
    Raw,
}

#[derive(Serialize)]
struct Converted {
    source: PathBuf,
    target: PathBuf,
    to: &'static str,
    size_bytes: u64,
    data_bytes: u64,
}

impl Convert {
    pub(crate) fn run(self, context: &Context) -> Result<(), Error> {
        let form = self.to.unwrap_or_else(|| form_of(&self.target));
        if same_file(&self.source, &self.target) {
            return Err(Error::usage("vhdx convert: source and target are the same file"));
        }
        let bar = context.ui.progress(0, "converting");
        let mut show = |progress: Progress| {
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.done_bytes);
        };
        let done = match form {
            Form::Raw => self.to_raw(&mut show),
            Form::Vhdx => self.to_vhdx(&mut show),
        };
        bar.finish_and_clear();
        let done = done?;
        let converted = Converted {
            source: self.source,
            target: self.target,
            to: if form == Form::Raw { "raw" } else { "vhdx" },
            size_bytes: done.total_bytes,
            data_bytes: done.data_bytes,
        };
        context.ui.show(&converted, |converted| {
            format!(
                "{} -> {} ({}): {}, {} of it data",
                converted.source.display(),
                converted.target.display(),
                converted.to,
                units::size(converted.size_bytes),
                units::size(converted.data_bytes)
            )
        })
    }

    fn to_raw(&self, show: &mut dyn FnMut(Progress)) -> Result<Progress, Error> {
        let image = Builder::open(file::open(&self.source)?)
            .read_only()
            .map_err(|error| failed("convert", &self.source, &error))?;
        let target = file::make(&self.target, self.force)?;
        vhdx::to_raw(&image, &target, show).map_err(|error| self.give_up(&error))
    }

    fn to_vhdx(&self, show: &mut dyn FnMut(Progress)) -> Result<Progress, Error> {
        let source = file::open(&self.source)?;
        let looked = vhdx::info(&source);
        if looked.is_ok() {
            return Err(Error::usage(format!(
                "vhdx convert {}: it is an image already",
                self.source.display()
            ))
            .hint("convert it to raw first, or copy it"));
        }
        let sparse = File::open(&self.source)
            .map_err(|error| Error::failed(format!("open {}: {error}", self.source.display())))?;
        let size = source.geometry().size_bytes.next_multiple_of(512);
        let mut spec = if self.fixed { Spec::fixed(size) } else { Spec::dynamic(size) };
        spec.block_bytes = self.block.unwrap_or(spec.block_bytes);
        let target = file::make(&self.target, self.force)?;
        let data = |offset| data_from(&sparse, offset);
        vhdx::from_raw(&source, Some(&data), &target, &spec, show).map_err(|error| self.give_up(&error))
    }

    /// Half a target is worse than none.
    fn give_up(&self, error: &vhdx::VhdxError) -> Error {
        file::clear_away(&self.target);
        failed("convert", &self.source, error)
    }
}

fn form_of(target: &Path) -> Form {
    let vhdx = target
        .extension()
        .is_some_and(|ending| ending.eq_ignore_ascii_case("vhdx") || ending.eq_ignore_ascii_case("avhdx"));
    if vhdx { Form::Vhdx } else { Form::Raw }
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((std::fs::canonicalize(a), std::fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

/// The next range at or after `offset` that is no hole of the file. A filesystem that cannot tell has none.
fn data_from(file: &File, offset: u64) -> Option<Range<u64>> {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(start) => {
            let end = seek(file, SeekFrom::Hole(start)).unwrap_or(u64::MAX);
            Some(start..end)
        }
        Err(rustix::io::Errno::NXIO) => None,
        Err(_) => Some(offset..u64::MAX),
    }
}
