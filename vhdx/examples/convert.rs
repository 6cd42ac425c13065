//! Converts an image to raw bytes or back: `convert to-raw IMAGE RAW`, `convert from-raw RAW IMAGE`.

use std::sync::Arc;

use blockio::{BlockDevice, FileDevice, OpenOptions};
use vhdx::{Builder, Spec, from_raw, to_raw};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, direction, source, target] = args.as_slice() else {
        return Err("usage: convert to-raw|from-raw SOURCE TARGET".into());
    };
    let source =
        Arc::new(FileDevice::open(source, OpenOptions { direct: false, ..OpenOptions::read_only() })?);
    std::fs::File::create(target)?;
    let target = FileDevice::open(target, OpenOptions::buffered())?;
    match direction.as_str() {
        "to-raw" => to_raw(&Builder::open(source).read_only()?, &target, &mut |_| ())?,
        "from-raw" => {
            let spec = Spec::dynamic(source.geometry().size_bytes);
            let sparse = std::fs::File::open(source.path())?;
            let data = |offset| data_from(&sparse, offset);
            from_raw(&*source, Some(&data), &target, &spec, &mut |_| ())?
        }
        other => return Err(format!("unknown direction {other}").into()),
    };
    Ok(())
}

/// The next range at or after `offset` that is no hole of the file.
fn data_from(file: &std::fs::File, offset: u64) -> Option<std::ops::Range<u64>> {
    let start = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset)).ok()?;
    Some(start..rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start)).unwrap_or(u64::MAX))
}
