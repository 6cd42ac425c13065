//! GlusterFS with one brick and two mounts, in a folder on the same disk.
//!
//! Runs apart from the machine: what the processes leave behind lies in memory that only they see, and they end with the program.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use benchmarks::ADDRESS;
use tempfile::TempDir;

const VOLUME: &str = "csvbench";
/// Where its daemons keep state and logs.
const FOLDERS: [&str; 2] = ["/var/lib/glusterd", "/var/log/glusterfs"];

/// A running volume.
pub(crate) struct Gluster {
    folder: TempDir,
    daemon: Child,
}

fn run(program: &str, arguments: &[&str]) -> Option<()> {
    let mut command = Command::new(program);
    let status = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success()).then_some(())
}

fn gluster(arguments: &[&str]) -> Option<()> {
    run("gluster", &[&["--mode=script", "volume"], arguments].concat())
}

impl Gluster {
    /// None where it cannot run: the table shows our side alone then.
    pub(crate) fn start() -> Option<Self> {
        for folder in FOLDERS {
            Path::new(folder).is_dir().then_some(())?;
            run("mount", &["-t", "tmpfs", "none", folder])?;
        }
        let folder = TempDir::with_prefix("gluster-").ok()?;
        let daemon =
            Command::new("glusterd").arg("-N").stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()?;
        let new = Self { folder, daemon };
        new.serve().map(|()| new)
    }

    fn serve(&self) -> Option<()> {
        for name in ["brick", "m1", "m2"] {
            std::fs::create_dir(self.folder.path().join(name)).ok()?;
        }
        // The daemon answers as soon as it is up; each try waits for it itself.
        (0..50).find_map(|_| gluster(&["info"]))?;
        let brick = format!("{ADDRESS}:{}", self.folder.path().join("brick").display());
        gluster(&["create", VOLUME, &brick, "force"])?;
        gluster(&["start", VOLUME])?;
        let volume = format!("{ADDRESS}:/{VOLUME}");
        self.mounts()
            .iter()
            .try_for_each(|at| run("mount", &["-t", "glusterfs", &volume, &at.to_string_lossy()]))
    }

    pub(crate) fn mounts(&self) -> Vec<PathBuf> {
        ["m1", "m2"].map(|name| self.folder.path().join(name)).into()
    }
}

impl Drop for Gluster {
    fn drop(&mut self) {
        // Of one that did not start there may be nothing to unmount.
        for mount in self.mounts() {
            run("umount", &[&mount.to_string_lossy()]);
        }
        gluster(&["stop", VOLUME]);
        drop(self.daemon.kill());
        drop(self.daemon.wait());
    }
}
