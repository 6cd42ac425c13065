//! qemu's side: qemu-nbd under our own load, and qemu-img, both past the page cache.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use blockio::{OpenOptions, open_uri};
use cluster_tests::run_tool;

use crate::Failure;
use crate::load::{Flush, drive_through};

fn text(path: &Path) -> &str {
    path.to_str().expect("paths of a benchmark are UTF-8")
}

/// An empty dynamic image.
pub(crate) fn create(path: &Path, size_bytes: u64, block_bytes: u64) -> Result<(), Failure> {
    let options = format!("subformat=dynamic,block_size={block_bytes}");
    run_tool(
        "qemu-img",
        &["create", "-q", "-f", "vhdx", "-o", &options, text(path), &size_bytes.to_string()],
    );
    Ok(())
}

/// Ends the server when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Writes of 4 KiB at random places through qemu-nbd: the load that the library gets, over a socket of this machine. Writes
/// per second, flushes included.
pub(crate) fn random_writes(path: &Path, count: usize, flush: Flush, seed: u64) -> Result<f64, Failure> {
    let socket = path.with_extension("sock");
    let _server = serve(path, &socket)?;
    let uri = format!("nbd+unix:///?socket={}", text(&socket));
    let device = open_uri(&uri, OpenOptions::default())?;
    drive_through(&*device, 16, count, flush, seed)
}

fn serve(path: &Path, socket: &Path) -> Result<Server, Failure> {
    // It forks when it listens, so its end is the sign that it is ready; the pid file names who to end.
    let mut child = Command::new("qemu-nbd")
        .args(["-f", "vhdx", "--cache=none", "--persistent", "--shared=16", "-k", text(socket), text(path)])
        .stdin(Stdio::null())
        .spawn()?;
    // The socket is there before it is listened on.
    while UnixStream::connect(socket).is_err() {
        if let Some(status) = child.try_wait()? {
            return Err(format!("qemu-nbd ended with {status}").into());
        }
        std::thread::yield_now();
    }
    Ok(Server(child))
}

/// Converts a raw file to a dynamic image, or back.
pub(crate) fn convert(from: &Path, to: &Path, to_image: bool) -> Result<(), Failure> {
    let mut arguments = vec!["convert", "-t", "none", "-T", "none"];
    if to_image {
        arguments.extend(["-f", "raw", "-O", "vhdx", "-o", "subformat=dynamic,block_size=33554432"]);
    } else {
        arguments.extend(["-f", "vhdx", "-O", "raw"]);
    }
    arguments.extend([text(from), text(to)]);
    run_tool("qemu-img", &arguments);
    Ok(())
}
