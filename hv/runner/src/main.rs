//! The hv process: one VM, its disks on cluster volumes, a control socket.
//!
//! `hv --config FILE` runs a VM; `hv caps` prints what this host's KVM can do. When the VM is ready, one JSON line goes to
//! stdout; when it cannot be started, one JSON line with error and hint to stderr, and the exit code is 1.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "the two lines that a supervisor reads")]

use std::path::PathBuf;
use std::process::ExitCode;

use hv_runner::config::RunnerConfig;
use hv_runner::{Ended, Failure, Runner, confine_main, serve_control};

/// The VM could not be started.
const EXIT_FAILED: u8 = 1;
/// The node's lease is over.
const EXIT_LEASE_OVER: u8 = 3;
/// A part of the guest's memory cannot be read.
const EXIT_MEMORY_LOST: i32 = 4;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("HV_LOG").unwrap_or_else(|_| "info".into()),
        )
        .init();
    match run() {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("{}", serde_json::json!({ "error": failure.error, "hint": failure.hint }));
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn run() -> Result<ExitCode, Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--config", path] => run_vm(RunnerConfig::load(&PathBuf::from(path))?),
        ["caps"] => print_caps(),
        _ => Err(Failure::new("unknown arguments", "call `hv --config FILE`, or `hv caps`")),
    }
}

fn run_vm(config: RunnerConfig) -> Result<ExitCode, Failure> {
    let (socket, node, vm) = (config.control_socket.clone(), config.node, config.vm.clone());
    let state = if config.incoming || config.restore_from.is_some() { "incoming" } else { "running" };
    let (runner, ended) = Runner::start(config)?;
    let server = serve_control(&runner, node, &vm)?;
    println!("{}", serde_json::json!({ "state": state }));
    confine_main()?;
    let why = ended.recv().unwrap_or(Ended::Stopped);
    if let Ended::MemoryLost(reason) = &why {
        tracing::error!(reason, vm, "a part of the guest's memory cannot be read: it ends here");
        // The processors that wait for that part never leave the kernel by themselves.
        std::process::exit(EXIT_MEMORY_LOST);
    }
    tracing::info!(?why, vm, "ending");
    // Requests that are being answered get their answers, those that wait for something at once; nobody can ask anything new.
    runner.vm().let_go();
    drop(server);
    drop(runner);
    drop(std::fs::remove_file(&socket));
    Ok(match why {
        Ended::Stopped | Ended::MemoryLost(_) => ExitCode::SUCCESS,
        Ended::LeaseOver(_) => ExitCode::from(EXIT_LEASE_OVER),
    })
}

fn print_caps() -> Result<ExitCode, Failure> {
    let caps = hv::HostCaps::probe().map_err(|error| {
        Failure::new(error.to_string(), "load the kvm module, and check who may open /dev/kvm")
    })?;
    println!(
        "{}",
        serde_json::json!({
            "api_version": caps.api_version,
            "xsave_bytes": caps.xsave_bytes,
            "tsc_control": caps.tsc_control,
            "clock_realtime": caps.clock_realtime,
            "manual_dirty_log": caps.manual_dirty_log,
        })
    );
    Ok(ExitCode::SUCCESS)
}
