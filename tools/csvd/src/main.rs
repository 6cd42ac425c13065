//! The cluster node daemon.
//!
//! ```text
//!   csvctl --> admin/ (gRPC on csvd.sock)                 hv processes --> node_socket.rs (frames on node.sock)
//!                |                                                             |
//!                v                                                             v
//!   forward.rs (to the node that must act)   volumes/ (LUNs, mounts, coordinators) <--- router.rs (requests, pushes)
//!                |                                |                            |
//!                v                                v                            v
//!   drain/ (emptying a node)             |                                |                            |
//!   vms/ (hv processes, quick moves)      membership/ (epoch, heartbeats, lease, verdicts, fences)
//!                \________________________________|____________________________/
//!                                                 v
//!                          lockmgr::cluster (Raft: members, owners, VM records) over wire::Mesh
//! ```
//!
//! Async code waits for messages; everything that waits for a disk or a lock runs on a thread of its own.
//!
//! **Invariant:** what this daemon does to a volume or a VM follows from a record of the cluster's state, changed by
//! compare-and-swap *before* it acts; a daemon that cannot read the record does nothing.

mod admin;
mod clients;
mod core;
mod daemon;
mod dispatch;
mod drain;
mod forward;
mod log;
mod membership;
mod messages;
mod node_socket;
mod pid_file;
mod redirect;
mod router;
mod settings;
mod view;
mod vms;
mod volumes;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use api::Error;
use api::config::NodeConfig;
use clap::Parser;
use daemon::Afterwards;
use rustix::io::Errno;
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::thread::{CapabilitySet, capabilities};

/// Run a node of the cluster
#[derive(Debug, Parser)]
#[command(name = "csvd", version)]
struct Args {
    /// `witness`: only vote, without volumes and VMs; the node must have joined as one (`csvctl node join --witness`)
    #[arg(value_enum, value_name = "ROLE")]
    role: Option<Role>,
    /// The node's configuration
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Leave the terminal's session: the daemon and its VMs become a process group of their own
    #[arg(long)]
    new_session: bool,
    /// Listen on the socket that was passed as stdin, instead of binding the configured address
    #[arg(long)]
    inherit_listener: bool,
    /// Keep to an older version of the protocol between nodes, as a node that is not upgraded yet
    #[arg(long, hide = true, env = "CSVD_PROTOCOL_MAX", value_name = "VERSION")]
    protocol_max: Option<u32>,
}

/// What a node can be asked to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Role {
    Witness,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let ended = run(&args).and_then(|afterwards| match afterwards {
        Afterwards::Nothing => Ok(()),
        Afterwards::BeginAnew => Err(begin_anew()),
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, hint = error.hint, "the daemon ends");
            say(&error);
            ExitCode::from(error.kind.exit_code())
        }
    }
}

/// Executes the program anew, with the same arguments, in the session that it has. Returns only when that fails.
fn begin_anew() -> Error {
    use std::os::unix::process::CommandExt;
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return Error::failed(format!("finding the program to begin anew: {error}")),
    };
    let args = std::env::args_os().skip(1).filter(|arg| arg != "--new-session");
    let error = std::process::Command::new(&program).args(args).exec();
    Error::failed(format!("execute {} anew: {error}", program.display()))
        .hint("start the daemon again: it joins with a new epoch")
}

fn run(args: &Args) -> Result<Afterwards, Error> {
    let config: NodeConfig = daemon::load(&args.config)?;
    if args.role == Some(Role::Witness) && !config.witness {
        return Err(Error::conflict(format!("{} is a node with volumes, not a witness", config.name))
            .hint("a witness joins with `csvctl node join --witness`"));
    }
    if args.new_session {
        rustix::process::setsid().map_err(|error| Error::failed(format!("making a session: {error}")))?;
    }
    log::start(&config.log_file())?;
    if let Some(version) = args.protocol_max {
        wire::speak_at_most(version).map_err(|error| Error::usage(error.explain()))?;
    }
    stay_in_memory();
    for dir in [&config.dir.join("mnt"), &config.data_dir(), &config.vm_dir()] {
        std::fs::create_dir_all(dir)
            .map_err(|error| Error::failed(format!("making {}: {error}", dir.display())))?;
    }
    // Two threads serve everything that waits for messages; what blocks has threads of its own. Guests that keep all processors
    // busy shall not delay them: leases, fencing and the guests' own moves depend on their answers.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .on_thread_start(threads::prompt)
        .worker_threads(2)
        .max_blocking_threads(64)
        .thread_stack_size(1 << 20)
        .enable_all()
        .build()
        .map_err(|error| Error::failed(format!("starting the runtime: {error}")))?;
    let outcome = runtime.block_on(daemon::run(config, args.inherit_listener));
    // A blocked disk must not keep an ended daemon alive.
    runtime.shutdown_background();
    outcome
}

/// Memory that this process needs must not be waited for by writes to its own mounts, nor be read back from where it was swapped to (F8).
fn stay_in_memory() {
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::info!(%error, "not an I/O flusher: under memory pressure mounts may be slow");
    }
    // Only with the right to lock as much as it likes: at a limit, allocations would fail. What was never used takes no memory.
    let may = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    if let Err(error) = if may { mlockall(all) } else { Err(Errno::PERM) } {
        tracing::info!(%error, "memory is not locked: while the machine swaps, mounts may be slow");
    }
}

/// Tells a person, or whoever started the daemon and reads its stderr.
fn say(error: &Error) {
    let mut out = std::io::stderr().lock();
    drop(writeln!(out, "error: {}", error.message));
    if !error.hint.is_empty() {
        drop(writeln!(out, " hint: {}", error.hint));
    }
}
