//! What a VM boots from: files of the host, read while the process may, or a test guest.

use std::path::Path;

use hv::Firmware;

use crate::config::{BUILTIN, RunnerConfig};
use crate::failure::Failure;

/// What a VM boots from; nothing for one that comes from elsewhere.
#[derive(Default)]
pub(crate) struct BootFiles {
    pub(crate) kernel: Vec<u8>,
    pub(crate) cmdline: String,
    pub(crate) initrd: Option<Vec<u8>>,
}

impl BootFiles {
    pub(crate) fn of(config: &RunnerConfig) -> Result<Self, Failure> {
        if config.incoming || config.restore_from.is_some() {
            return Ok(Self::default());
        }
        let (kernel, cmdline) = read_kernel(config)?;
        let initrd = config.initrd.as_ref().map(|path| read_file(path, "initrd")).transpose()?;
        Ok(Self { kernel, cmdline, initrd })
    }
}

/// The test guests read no tables, and a kernel that is told not to does not either.
pub(crate) fn firmware_for(config: &RunnerConfig) -> Firmware {
    let without =
        config.kernel.starts_with(BUILTIN) || config.cmdline.split(' ').any(|word| word == "acpi=off");
    if without { Firmware::CommandLine } else { Firmware::Acpi }
}

/// The kernel's image, and the command line with the role of a test guest.
fn read_kernel(config: &RunnerConfig) -> Result<(Vec<u8>, String), Failure> {
    let Some(role) = config.kernel.strip_prefix(BUILTIN) else {
        let image = read_file(Path::new(&config.kernel), "kernel")?;
        return Ok((image, config.cmdline.clone()));
    };
    if !hv_guest::ROLES.contains(&role) {
        return Err(Failure::new(
            format!("there is no test guest `{role}`"),
            format!("give one of {}", hv_guest::ROLES.join(", ")),
        ));
    }
    Ok((hv_guest::IMAGE.to_vec(), format!("role={role} {}", config.cmdline)))
}

fn read_file(path: &Path, what: &str) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| {
        Failure::new(
            format!("cannot read the {what} {}: {error}", path.display()),
            format!("give a readable file, or a test guest as {BUILTIN}ROLE"),
        )
    })
}
