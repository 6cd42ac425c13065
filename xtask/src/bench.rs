//! The benchmarks of `benchmarks/`, each with the raw device in the same run.

use crate::packages;
use crate::run::{Failure, cargo, command, root, target_dir};

/// Runs all benchmarks, or the named one with its own options.
pub(crate) fn run(options: &[String]) -> Result<(), Failure> {
    packages::ensure(packages::TEST)?;
    cargo(&["build", "--release", "--workspace", "--bins", "--locked"])?;
    let release = target_dir().join("release");
    let known = [
        "node_io",
        "disk_io",
        "net_io",
        "mount_io",
        "fuse_io",
        "fuse_meta",
        "clients",
        "scale",
        "vhdx_io",
        "nbd_io",
        "memory",
        "migration",
        "failover",
    ];
    let (chosen, options): (Vec<&str>, &[String]) = match options {
        [] => (known.to_vec(), &[]),
        [name, options @ ..] if known.contains(&name.as_str()) => (vec![name], options),
        _ => {
            let usage = format!("usage: cargo xtask bench [{} [ITS OPTIONS]]", known.join("|"));
            return Err(Failure::usage(&usage));
        }
    };
    if chosen.iter().any(|name| name.starts_with("fuse_")) {
        packages::ensure(packages::PEERS)?;
    }
    for name in chosen {
        command(release.join(name).as_os_str(), options, &root())?;
    }
    Ok(())
}
