//! Saved states on a volume: writing one when the VM stops here, reading one when it goes on here.

use csvfs::node::File;
use hv::snapshot::{self, SaveStats, SavedBy, SnapshotError};
use hv::state::SavedImage;
use hv::{Vm, VmError};

use crate::config::{RunnerConfig, VolumePath};
use crate::failure::Failure;

/// RAM first; the state is taken and written after it.
pub(crate) fn write_ram(file: &File, vm: &Vm) -> Result<snapshot::SavedRam, Failure> {
    snapshot::write_ram(file, vm.ram()).map_err(|error| not_saved(&error))
}

/// The state, then everything durable.
pub(crate) fn write_state(
    file: &File,
    vm: &Vm,
    ram: snapshot::SavedRam,
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

/// Loads RAM and state into a VM that has not run.
pub(crate) fn load(file: &File, at: &VolumePath, image: &SavedImage, vm: &Vm) -> Result<(), Failure> {
    snapshot::read_ram(file, image, vm.ram()).map_err(|error| not_restored(at, &error))?;
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
