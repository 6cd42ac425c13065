//! Running a benchmark apart from the machine, so that nothing of its peers outlives it.
//!
//! ```text
//!   program --exec--> unshare: own mounts, processes, network, /run --> sh --> program again, with TMPDIR of its own
//!                                 \-- when sh ends, however: all processes are killed, all mounts go
//! ```

use std::os::unix::process::CommandExt;
use std::process::Command;

/// Tells the program that it runs apart already.
const APART: &str = "CSV_BENCH_APART";
/// An address that is not loopback, of those that documentation may use: some peers take no other.
pub const ADDRESS: &str = "192.0.2.1";

/// The first process of the namespaces. Its folder lies where temporary files lie, on the disk that is measured.
const FIRST: &str = r#"
ip link set lo up
ip address add "$1/32" dev lo
mount -t tmpfs none /run
TMPDIR=$(mktemp -d --suffix=.csv-bench) || exit 1
export TMPDIR
shift
"$@"
code=$?
# What lies over folders goes first: it is not ours to remove.
tac /proc/mounts | while read -r _ at _; do case "$at" in "$TMPDIR"/*) umount -l "$at";; esac; done
rm -rf --one-file-system "$TMPDIR"
exit $code
"#;

/// Returns inside namespaces of its own, with `TMPDIR` set to a folder that is removed in the end. Everything that is started
/// from now on ends with the program, also when it panics or is interrupted.
///
/// # Errors
/// When the program could not be started again, with the reason.
pub fn run_apart() -> Result<(), String> {
    if std::env::var_os(APART).is_some() {
        return Ok(());
    }
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "--net",
        "--",
        "sh",
        "-c",
        FIRST,
    ]);
    command.args(["sh", ADDRESS]).arg(program).args(std::env::args_os().skip(1)).env(APART, "1");
    // Only a failure returns.
    let error = command.exec();
    Err(format!("cannot run apart from this machine: unshare: {error} (it needs root and util-linux)"))
}
