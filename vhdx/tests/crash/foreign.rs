//! What qemu makes of an image after a crash.

use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use blockio::{BlockDevice, MemoryDevice};

use crate::common::{MIB, qemu_img, text};
use crate::guest::{SECTOR, stamped};
use crate::judge::Verdict;

/// qemu looks for holes by reading, so only small disks are worth its time.
const DISK_BYTES_MAX: u64 = 64 * MIB;

/// qemu replays the log, finds nothing to complain of, and reads the same stamps.
pub(crate) fn qemu_agrees(image: &MemoryDevice, sectors: &[u64], stamps: &[u64]) -> Verdict {
    if sectors.iter().any(|sector| sector * SECTOR >= DISK_BYTES_MAX) {
        return Ok(());
    }
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let (path, raw) = (folder.path().join("image.vhdx"), folder.path().join("image.raw"));
    save(image, &path).map_err(|error| error.to_string())?;
    qemu_img(&["check", "-q", "-r", "all", "-f", "vhdx", text(&path)]);
    qemu_img(&["check", "-q", "-f", "vhdx", text(&path)]);
    qemu_img(&["convert", "-f", "vhdx", "-O", "raw", text(&path), text(&raw)]);
    let raw = std::fs::File::open(raw).map_err(|error| error.to_string())?;
    for (sector, stamp) in sectors.iter().zip(stamps) {
        let mut found = vec![0; 512];
        // Past the end of the disk, after a cut around a resize, there is nothing.
        raw.read_at(&mut found, sector * SECTOR).map_err(|error| error.to_string())?;
        if found != stamped(*stamp) {
            return Err(format!("qemu does not find {stamp} in sector {sector}"));
        }
    }
    Ok(())
}

/// Writes the image to a file, without its zeros.
fn save(image: &MemoryDevice, path: &Path) -> std::io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    let size = image.geometry().size_bytes;
    file.set_len(size)?;
    let content = image.to_bytes();
    for (number, page) in
        content.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|byte| *byte != 0))
    {
        file.seek(SeekFrom::Start(number as u64 * 4096))?;
        file.write_all(page)?;
    }
    Ok(())
}
