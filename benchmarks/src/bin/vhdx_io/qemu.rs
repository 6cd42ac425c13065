//! qemu's side: qemu-nbd under fio, and qemu-img, both past the page cache.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use cluster_tests::run_tool;
use serde_json::Value;

use crate::load::Flush;
use crate::{Failure, SPARSE_BYTES};

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

/// Writes of 4 KiB at random places through qemu-nbd, 16 at a time. Writes per second, flushes included.
pub(crate) fn random_writes(path: &Path, count: usize, flush: Flush) -> Result<f64, Failure> {
    let socket = path.with_extension("sock");
    let _server = serve(path, &socket)?;
    let sync = match flush {
        Flush::AtEnd => "--end_fsync=1",
        Flush::AfterEach => "--fsync=1",
    };
    let report = run_tool(
        "fio",
        &[
            "--name=bench",
            "--ioengine=nbd",
            &format!("--uri=nbd+unix:///?socket={}", text(&socket)),
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=16",
            &format!("--size={SPARSE_BYTES}"),
            &format!("--number_ios={count}"),
            sync,
            "--output-format=json",
        ],
    );
    let start = report.find('{').ok_or("fio prints JSON")?;
    let report: Value = serde_json::from_str(&report[start..])?;
    let job = &report["jobs"][0];
    let millis = job["job_runtime"].as_f64().ok_or("a runtime")?;
    Ok(job["write"]["total_ios"].as_f64().ok_or("a count")? * 1000.0 / millis)
}

fn serve(path: &Path, socket: &Path) -> Result<Server, Failure> {
    // It forks when it listens, so its end is the sign that it is ready; the pid file names who to end.
    let mut child = Command::new("qemu-nbd")
        .args(["-f", "vhdx", "--cache=none", "--persistent", "--shared=16", "-k", text(socket), text(path)])
        .stdin(Stdio::null())
        .spawn()?;
    while !socket.exists() {
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
