//! What a machine must have for a lab. Whoever runs the lab among other tests skips it where that is missing.

use std::path::Path;

use crate::enclosure::UNSHARE;
use crate::kernel::Kernel;
use crate::tool::{LabError, run};

/// Of the smallest lab: three machines and what the host keeps of their drives.
const MEMORY_MIB_MIN: u64 = 2560;

/// Gets what can be got.
///
/// # Errors
/// What is missing, in one line.
pub(crate) fn check() -> Result<(), String> {
    if !Path::new("/dev/net/tun").exists() {
        return Err("there is no /dev/net/tun".into());
    }
    let memory = available_mib();
    if memory < MEMORY_MIB_MIN {
        return Err(format!("{memory} MiB of memory are available, and {MEMORY_MIB_MIN} are needed"));
    }
    let network = "ip link add lab0 type bridge && ip tuntap add lab1 mode tap";
    let made = run("unshare", &[&UNSHARE[..], &["sh", "-c", network]].concat());
    made.map_err(|error| because("a network namespace with a bridge and a tap cannot be made", &error))?;
    let kernel = crate::scenarios::cache().and_then(|cache| Kernel::get(&cache));
    kernel.map(drop).map_err(|error| because("the kernel's package cannot be had", &error))
}

/// The reason in short; all of it goes where errors go.
fn because(short: &str, error: &LabError) -> String {
    eprintln!("lab: {error}");
    short.to_owned()
}

fn available_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next());
    kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) / 1024
}
