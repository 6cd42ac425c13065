//! An image as something to export: raw bytes, a VHDX to read, or a VHDX to write.

use std::path::Path;
use std::sync::Arc;

use api::Error;
use blockio::{Allocation, BlockDevice, FileDevice, NbdExport, OpenOptions};
use vhdx::{Disk, ReadSegment};

use super::export::Format;
use crate::commands::vhdx::failed;

pub(super) enum Image {
    Raw(Arc<FileDevice>, bool),
    Read(Arc<vhdx::Image>),
    Write(Arc<Disk>),
}

impl Image {
    pub(super) fn open(path: &Path, format: Format, read_only: bool) -> Result<Self, Error> {
        let options = OpenOptions { writable: !read_only, ..OpenOptions::buffered() };
        let file = FileDevice::open(path, options).map_err(|error| {
            let kind = if path.exists() { api::Kind::Failed } else { api::Kind::NotFound };
            Error::new(kind, error).during("nbd export")
        })?;
        if format == Format::Raw {
            // Past the page cache where the file system can: clients have caches of their own.
            let direct = OpenOptions { direct: true, ..options };
            let file = FileDevice::open(path, direct).unwrap_or(file);
            return Ok(Self::Raw(Arc::new(file), read_only));
        }
        let image = vhdx::Builder::open(Arc::new(file));
        let opened = if read_only {
            image.read_only().map(Arc::new).map(Self::Read)
        } else {
            image.writable().map(Arc::new).map(Self::Write)
        };
        opened.map_err(|error| failed("open", path, &error))
    }

    pub(super) fn export(&self) -> NbdExport {
        let (device, read_only, allocation): (Arc<dyn BlockDevice>, bool, Arc<dyn Allocation>) = match self {
            Self::Raw(file, read_only) => (file.clone(), *read_only, file.clone()),
            Self::Read(image) => (image.clone(), true, Arc::new(Readable(Arc::clone(image)))),
            Self::Write(disk) => (disk.clone(), false, Arc::new(Writable(Arc::clone(disk)))),
        };
        NbdExport { device, read_only, allocation: Some(allocation) }
    }

    /// Makes everything stable and leaves a clean file.
    pub(super) fn close(self, path: &Path) -> Result<(), Error> {
        match self {
            Self::Write(disk) => disk.close().map(drop).map_err(|error| failed("close", path, &error)),
            Self::Raw(file, false) => file
                .flush()
                .map_err(|error| Error::failed(error).during(format!("closing {}", path.display()))),
            Self::Raw(..) | Self::Read(_) => Ok(()),
        }
    }
}

struct Readable(Arc<vhdx::Image>);

impl Allocation for Readable {
    fn run_at(&self, offset: u64, len: u64) -> (u64, bool) {
        self.0.resolve_read(offset, len).map_or((len, false), |segments| first_run(&segments, len))
    }
}

struct Writable(Arc<Disk>);

impl Allocation for Writable {
    fn run_at(&self, offset: u64, len: u64) -> (u64, bool) {
        self.0.resolve_read(offset, len).map_or((len, false), |guard| first_run(guard.segments(), len))
    }
}

/// Length of the first run of one kind, and whether it is zeros that take no room.
fn first_run(segments: &[ReadSegment], len: u64) -> (u64, bool) {
    let pieces = segments.iter().map(|segment| match segment {
        ReadSegment::Zero { len } => (*len, true),
        ReadSegment::Data { len, .. } => (*len, false),
        _ => (0, false),
    });
    let mut run: Option<(u64, bool)> = None;
    for (piece, hole) in pieces {
        match &mut run {
            Some((length, kind)) if *kind == hole => *length += piece,
            Some(_) => break,
            None => run = Some((piece, hole)),
        }
    }
    run.map_or((len, false), |(length, hole)| (length.min(len), hole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_one_kind_that_follow_each_other_are_one_run() {
        let data = |len| ReadSegment::Data { file_offset: 0, len };
        let zero = |len| ReadSegment::Zero { len };
        assert_eq!(first_run(&[data(10), data(20), zero(5)], 35), (30, false));
        assert_eq!(first_run(&[zero(10), zero(1), data(5), zero(3)], 19), (11, true));
        assert_eq!(first_run(&[], 7), (7, false));
    }
}
