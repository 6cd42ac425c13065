//! A server on a Unix socket, in a process of its own.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::Failure;

/// Ends with a signal, and is waited for, when dropped.
pub(crate) struct Server {
    process: Child,
    socket: PathBuf,
}

impl Server {
    /// `qemu-nbd`, past the page cache, with io_uring as our own engine has.
    pub(crate) fn qemu(file: &Path, socket: &Path) -> Result<Self, Failure> {
        let mut command = Command::new("qemu-nbd");
        command.args(["-f", "raw", "--cache=none", "--aio=io_uring", "--discard=unmap", "--persistent"]);
        command.arg("--shared=16").arg("-k").arg(socket).arg(file);
        Self::start(command, socket)
    }

    /// `csvctl nbd export`.
    pub(crate) fn ours(file: &Path, socket: &Path) -> Result<Self, Failure> {
        let mut command = Command::new(cluster_tests::binary("csvctl"));
        command.args(["nbd", "export", "--format", "raw", "--socket"]).arg(socket).arg(file);
        Self::start(command, socket)
    }

    fn start(mut command: Command, socket: &Path) -> Result<Self, Failure> {
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        let mut server = Self { process, socket: socket.to_owned() };
        while UnixStream::connect(socket).is_err() {
            if let Some(status) = server.process.try_wait()? {
                return Err(format!("{command:?} ended with {status}").into());
            }
            std::thread::yield_now();
        }
        Ok(server)
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
        // A killed server leaves its socket behind.
        drop(std::fs::remove_file(&self.socket));
    }
}
