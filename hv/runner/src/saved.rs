//! Saved states on a volume: writing one when the VM stops here, reading one when it goes on here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use csvfs::node::File;
use hv::snapshot::{self, RamWriter, SaveStats, SavedBy, SavedRam, SnapshotError};
use hv::state::SavedImage;
use hv::{Userfault, Vm, VmError};

use crate::config::{RunnerConfig, VolumePath};
use crate::failure::Failure;
use crate::runner::not_now;

/// RAM on its way to a file on the volume, while the guest runs and after it was paused.
pub(crate) struct Copying {
    pub(crate) to: VolumePath,
    pub(crate) file: Arc<File>,
    writer: RamWriter,
}

/// Pages that are taken at once.
const PART_PAGES: u64 = 16_384;
/// So little is left to the pause.
const RUMP_PAGES: u64 = 2048;
/// Passes while the guest runs.
const PASSES_MAX: u32 = 8;

impl Copying {
    /// Writes RAM while the guest runs, and again what it writes meanwhile, until little is left or following gains nothing.
    pub(crate) fn begin(
        to: &VolumePath,
        file: Arc<File>,
        vm: &Vm,
        off: &AtomicBool,
    ) -> Result<Self, Failure> {
        vm.track_writes().map_err(|error| not_now(&error))?;
        let writer = RamWriter::begin(&*file, vm.ram().clone()).map_err(|error| not_saved(&error))?;
        // Taken before the pages are read: what is written from here on is written again (H4).
        vm.fetch_written().map_err(|error| not_now(&error))?;
        let mut copying = Self { to: to.clone(), file, writer };
        let touched = snapshot::touched_pages(vm.ram()).map_err(|error| not_saved(&error))?;
        copying.write_parts(vm, off, |first, taken| {
            let at = usize::try_from(first / 64).expect("inside of the bitmap");
            touched[at..at + taken.len()].to_vec()
        })?;
        let mut before = u64::MAX;
        for _ in 0..PASSES_MAX {
            let left = vm.fetch_written().map_err(|error| not_now(&error))?;
            if left <= RUMP_PAGES || left > before / 10 * 9 {
                break;
            }
            before = left;
            copying.write_parts(vm, off, |_, taken| taken)?;
        }
        Ok(copying)
    }

    /// Writes what was written since, by a guest that is paused and whose devices are still.
    pub(crate) fn finish(mut self, vm: &Vm) -> Result<(Arc<File>, SavedRam), Failure> {
        vm.fetch_written().map_err(|error| not_now(&error))?;
        self.write_parts(vm, &AtomicBool::new(false), |_, taken| taken)?;
        Ok((self.file, self.writer.finish()))
    }

    /// Takes the written pages part by part, right before they are read, and writes those that `which` makes of them.
    fn write_parts(
        &mut self,
        vm: &Vm,
        off: &AtomicBool,
        which: impl Fn(u64, Vec<u64>) -> Vec<u64>,
    ) -> Result<(), Failure> {
        for (first, pages) in parts(vm) {
            if off.load(Ordering::Relaxed) {
                return Err(Failure::new("saving was given up", "the VM runs on"));
            }
            let taken = vm.take_written(first, pages).map_err(|error| not_now(&error))?;
            let bits = which(first, taken);
            self.writer.write(&*self.file, first, &bits).map_err(|error| not_saved(&error))?;
        }
        Ok(())
    }
}

/// First page and number of pages of each part; none goes over the end of a piece of RAM.
fn parts(vm: &Vm) -> impl Iterator<Item = (u64, u64)> {
    let mut first = 0;
    let mut parts = Vec::new();
    for region in vm.ram().regions() {
        let end = first + region.bytes / hv::PAGE_BYTES;
        while first < end {
            let pages = PART_PAGES.min(end - first);
            parts.push((first, pages));
            first += pages;
        }
    }
    parts.into_iter()
}

/// All of RAM at once, of a VM that is paused.
pub(crate) fn write_ram(file: &File, vm: &Vm) -> Result<SavedRam, Failure> {
    snapshot::write_ram(file, vm.ram()).map_err(|error| not_saved(&error))
}

/// The state, then everything durable.
pub(crate) fn write_state(
    file: &File,
    vm: &Vm,
    ram: SavedRam,
    config: &RunnerConfig,
) -> Result<SaveStats, Failure> {
    let machine = vm.save_state().map_err(|error| {
        Failure::new(
            format!("reading the VM's state failed: {error}"),
            "the VM runs on; look at the log of its hv",
        )
    })?;
    let by = SavedBy { vm: config.vm_id.as_bytes().to_vec(), epoch: config.vm_epoch };
    snapshot::write_state(file, ram, machine, &by).map_err(|error| not_saved(&error))
}

fn not_saved(error: &SnapshotError) -> Failure {
    let hint = match error {
        SnapshotError::Io { source: blockio::IoError::NoSpace { .. }, .. } => {
            "the volume has no room for the VM's memory: delete something or choose another volume"
        }
        _ => "the VM runs on; look at the volume's state with `csvctl volume show`",
    };
    Failure::new(with_cause(error), hint)
}

/// Reads and checks a saved state against this VM's configuration.
pub(crate) fn read(file: &File, at: &VolumePath, config: &RunnerConfig) -> Result<SavedImage, Failure> {
    let image = snapshot::read_contents(file).map_err(|error| not_restored(at, &error))?;
    if image.vm != config.vm_id.as_bytes() {
        return Err(Failure::new(
            format!("{}:{} is the state of another VM", at.volume, at.path),
            "name the state that was saved from this VM",
        ));
    }
    Ok(image)
}

/// Loads the state into a VM that has not run. RAM follows while the guest runs, where the kernel can do that; `failed` hears
/// of a page that cannot be had.
pub(crate) fn load(
    file: &Arc<File>,
    at: &VolumePath,
    image: &SavedImage,
    vm: &Vm,
    fault: Option<Userfault>,
    failed: impl Fn(String) + Send + Sync + 'static,
) -> Result<(), Failure> {
    match fault {
        Some(fault) => {
            vm.fill_lazily(fault, Arc::clone(file) as _, image, failed).map_err(|error| not_now(&error))?;
        }
        None => snapshot::read_ram(&**file, image, vm.ram()).map_err(|error| not_restored(at, &error))?,
    }
    let machine = image.machine.as_ref().expect("checked when the contents were read");
    vm.restore_state(machine).map_err(|error: VmError| {
        Failure::new(
            format!("the state {}:{} cannot be restored: {error}", at.volume, at.path),
            "was it saved on a host of another kind, or by a newer version?",
        )
    })
}

fn not_restored(at: &VolumePath, error: &SnapshotError) -> Failure {
    Failure::new(
        format!("{}:{} cannot be restored: {}", at.volume, at.path, with_cause(error)),
        "the source still has the VM if its migration was not committed",
    )
}

fn with_cause(error: &SnapshotError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
