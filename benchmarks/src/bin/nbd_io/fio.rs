//! fio's NBD client.

use std::path::Path;

use cluster_tests::run_tool;
use serde_json::Value;

use crate::{FILE_BYTES, Failure, Load};

/// Length of a turn, after a ramp.
const TURN: &str = "--runtime=1";

/// Requests per second of one turn.
pub(crate) fn drive(socket: &Path, load: &Load) -> Result<f64, Failure> {
    let kind = if load.write { "write" } else { "read" };
    let report = run_tool(
        "fio",
        &[
            "--name=turn",
            "--ioengine=nbd",
            &format!("--uri=nbd+unix:///?socket={}", socket.display()),
            &format!("--rw={}{kind}", if load.random { "rand" } else { "" }),
            &format!("--bs={}", load.block_bytes),
            &format!("--iodepth={}", load.depth),
            &format!("--size={FILE_BYTES}"),
            "--time_based=1",
            "--ramp_time=200ms",
            TURN,
            "--output-format=json",
        ],
    );
    let start = report.find('{').ok_or("fio prints JSON")?;
    let report: Value = serde_json::from_str(&report[start..])?;
    report["jobs"][0][kind]["iops"].as_f64().ok_or_else(|| "fio's report has no rate".into())
}
