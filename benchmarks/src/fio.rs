//! One job of fio on a file.

use std::path::Path;

use cluster_tests::run_tool;
use serde_json::Value;

/// What fio does, past the page cache.
#[derive(Debug)]
pub struct Job {
    /// For people.
    pub name: &'static str,
    /// `read`, `write`, `randread` or `randwrite`.
    pub rw: &'static str,
    /// Bytes of a request, as fio writes them.
    pub block: &'static str,
    /// Requests in flight.
    pub depth: u32,
    /// What follows each write: `fsync`, `fdatasync`, or nothing.
    pub sync: Option<&'static str>,
    /// The ratio to the raw file that is to be reached; 0 where there is none.
    pub goal: f64,
}

impl Job {
    /// A job of unforced requests, as many at a time as `depth`.
    #[must_use]
    pub const fn of(
        name: &'static str,
        rw: &'static str,
        block: &'static str,
        depth: u32,
        goal: f64,
    ) -> Self {
        Self { name, rw, block, depth, sync: None, goal }
    }

    /// Runs for so many seconds, or over the whole file of so many bytes once, and gives MB/s.
    ///
    /// # Panics
    /// When fio fails, or prints something else than its report.
    #[must_use]
    pub fn run(&self, file: &Path, bytes: &str, engine: &str, seconds: Option<&str>) -> f64 {
        let mut arguments = vec![
            "--name=bench".to_owned(),
            format!("--filename={}", file.display()),
            format!("--rw={}", self.rw),
            format!("--bs={}", self.block),
            format!("--iodepth={}", self.depth),
            format!("--size={bytes}"),
            format!("--ioengine={engine}"),
            "--direct=1".into(),
            "--output-format=json".into(),
        ];
        arguments.extend(self.sync.map(|call| format!("--{call}=1")));
        if let Some(seconds) = seconds {
            arguments.extend(["--time_based=1".into(), format!("--runtime={seconds}")]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let report: Value = serde_json::from_str(&run_tool("fio", &arguments)).expect("fio prints JSON");
        let side = if self.rw.ends_with("read") { "read" } else { "write" };
        report["jobs"][0][side]["bw_bytes"].as_f64().expect("a bandwidth") / 1e6
    }
}
