//! `csvctl vhdx convert`.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::Error;
use blockio::{BlockDevice, ImageFile};
use clap::{Args, ValueEnum};
use rustix::fs::{SeekFrom, seek};
use serde::Serialize;
use vhdx::{ChildSpec, ErrorKind, Image, Progress, Spec, VhdxError};

use super::in_use::{self, Use};
use super::{Roots, failed, file};
use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct Convert {
    /// An image, with its parents if it has some, or raw bytes
    source: PathBuf,
    /// What to make
    target: PathBuf,
    /// Form of the target; without it, vhdx for a name that ends so, raw otherwise
    #[arg(long, value_enum)]
    to: Option<Form>,
    /// Make a fixed image
    #[arg(long)]
    fixed: bool,
    /// Make an image that holds only what differs from this one
    #[arg(long, value_name = "IMAGE", conflicts_with = "fixed")]
    parent: Option<PathBuf>,
    /// Size of a block of the new image, a power of two from 1M to 256M
    #[arg(long, value_parser = units::parse_size, value_name = "SIZE")]
    block: Option<u64>,
    /// Replace an existing target
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    roots: Roots,
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

/// Where the bytes come from.
enum Source {
    Image(Image),
    Raw(Arc<dyn ImageFile>, File),
}

impl Convert {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let form = self.to.unwrap_or_else(|| form_of(&self.target));
        if same_file(&self.source, &self.target) {
            return Err(Error::usage("vhdx convert: source and target are the same file"));
        }
        if form == Form::Raw && (self.fixed || self.parent.is_some() || self.block.is_some()) {
            return Err(Error::usage("vhdx convert: raw bytes have no blocks, no parent and no kind")
                .hint("leave --fixed, --parent and --block away, or add --to vhdx"));
        }
        let _claim = in_use::claim(&self.source, Use::Read, context).await?;
        let _replaced = match self.target.exists() {
            true if self.force => Some(in_use::claim(&self.target, Use::Change, context).await?),
            _ => None,
        };
        let source = self.open_source()?;
        let steps = context.ui.progress("converting");
        let mut show = |progress: Progress| steps.at(progress.done_bytes, progress.total_bytes);
        let done = match form {
            Form::Raw => self.to_raw(&source, &mut show),
            Form::Vhdx => self.to_vhdx(&source, &mut show),
        };
        drop(steps);
        let done = done?;
        let converted = Converted {
            source: self.source,
            target: self.target,
            to: if form == Form::Raw { "raw" } else { "vhdx" },
            size_bytes: done.total_bytes,
            data_bytes: done.data_bytes,
        };
        context.ui.show(&converted, text)
    }

    fn open_source(&self) -> Result<Source, Error> {
        match file::open_image(&self.source, &self.roots) {
            Ok(image) => Ok(Source::Image(image)),
            Err(error) if error.kind() == ErrorKind::NotVhdx => {
                let sparse =
                    File::open(&self.source).map_err(|error| file::cannot_open(&self.source, &error))?;
                Ok(Source::Raw(file::open(&self.source)?, sparse))
            }
            Err(error) => Err(failed("convert", &self.source, &error)),
        }
    }

    fn to_raw(&self, source: &Source, show: &mut dyn FnMut(Progress)) -> Result<Progress, Error> {
        let Source::Image(image) = source else {
            return Err(Error::usage(format!("vhdx convert {}: it is raw already", self.source.display()))
                .hint("copy it, or give the target a name that ends in .vhdx"));
        };
        let target = file::make(&self.target, self.force)?;
        vhdx::to_raw(image, &target, show).map_err(|error| self.give_up(&error))
    }

    fn to_vhdx(&self, source: &Source, show: &mut dyn FnMut(Progress)) -> Result<Progress, Error> {
        let mut spec = source.spec();
        spec.fixed = self.fixed;
        spec.block_bytes = self.block.unwrap_or(spec.block_bytes);
        if let Some(parent) = &self.parent {
            return self.to_child(source, parent, spec.size_bytes, show);
        }
        let target = file::make(&self.target, self.force)?;
        let data = |offset| source.data_from(offset);
        vhdx::from_raw(source.device(), Some(&data), &target, &spec, show)
            .map_err(|error| self.give_up(&error))
    }

    fn to_child(
        &self,
        source: &Source,
        parent_path: &Path,
        size_bytes: u64,
        show: &mut dyn FnMut(Progress),
    ) -> Result<Progress, Error> {
        let parent = file::open_image(parent_path, &self.roots)
            .map_err(|error| failed("convert", parent_path, &error))?;
        let target: Arc<dyn ImageFile> = Arc::new(file::make(&self.target, self.force)?);
        let mut convert = || -> Result<Progress, VhdxError> {
            let mut child = ChildSpec::new(file::paths_to(&self.target, parent_path)?);
            child.size_bytes = Some(size_bytes);
            child.block_bytes = self.block.unwrap_or(child.block_bytes);
            vhdx::create_child(&*target, &parent, &child)?;
            let builder =
                file::with_parents(Arc::clone(&target), &self.target, &self.roots.with(parent_path));
            let disk = builder.writable()?;
            let done = vhdx::write_difference(source.device(), &parent, &disk, show)?;
            disk.close()?;
            Ok(done)
        };
        convert().map_err(|error| self.give_up(&error))
    }

    /// Half a target is worse than none.
    fn give_up(&self, error: &VhdxError) -> Error {
        file::clear_away(&self.target);
        failed("convert", &self.source, error)
    }
}

impl Source {
    fn device(&self) -> &dyn BlockDevice {
        match self {
            Self::Image(image) => image,
            Self::Raw(file, _) => file,
        }
    }

    /// The image that holds the same disk.
    fn spec(&self) -> Spec {
        let geometry = self.device().geometry();
        match self {
            Self::Image(_) => {
                Spec { logical_sector: geometry.block_bytes, ..Spec::dynamic(geometry.size_bytes) }
            }
            Self::Raw(..) => Spec::dynamic(geometry.size_bytes.next_multiple_of(512)),
        }
    }

    fn data_from(&self, offset: u64) -> Option<Range<u64>> {
        match self {
            Self::Image(image) => image.data_from(offset),
            Self::Raw(_, file) => data_from(file, offset),
        }
    }
}

fn text(converted: &Converted) -> String {
    format!(
        "{} -> {} ({}): {}, {} of it data",
        converted.source.display(),
        converted.target.display(),
        converted.to,
        units::size(converted.size_bytes),
        units::size(converted.data_bytes)
    )
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
