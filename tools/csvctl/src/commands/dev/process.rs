//! A node's daemon as a process: started apart from this terminal, found by its pid file, ended for sure.
//!
//! The daemon makes a session of its own, so its process group holds it and its VMs, and locks its pid file for as long
//! as it lives. **Invariant:** a pid is only signalled while the lock of its pid file is held by somebody.

use std::fs::{self, File, TryLockError};
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use api::Error;
use api::config::NodeConfig;
use api::pb::WaitRequest;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::files::cannot;

/// The daemon's program: beside csvctl, or what `CSVD` names.
pub(crate) fn program() -> Result<PathBuf, Error> {
    if let Some(path) = std::env::var_os("CSVD") {
        return Ok(path.into());
    }
    let here = std::env::current_exe().map_err(|error| Error::failed(format!("finding csvctl: {error}")))?;
    let path = here.with_file_name("csvd");
    if path.exists() {
        Ok(path)
    } else {
        Err(Error::not_found(format!("the daemon {} does not exist", path.display()))
            .hint("install csvd beside csvctl, or name it in the variable CSVD"))
    }
}

/// Starts a daemon and waits until it answers on its socket. `listener` is the socket that it shall listen on; without
/// it the daemon binds its address itself.
pub(crate) fn start(config: &NodeConfig, listener: Option<TcpListener>) -> Result<(), Error> {
    let program = program()?;
    let mut command = Command::new(&program);
    command.arg("--config").arg(config.dir.join("csvd.toml")).arg("--new-session");
    if let Some(listener) = listener {
        command.arg("--inherit-listener").stdin(Stdio::from(OwnedFd::from(listener)));
    } else {
        command.stdin(Stdio::null());
    }
    let stderr = dying_words(config)?;
    let mut child = command
        .current_dir("/")
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .map_err(|error| Error::failed(format!("start {}: {error}", program.display())))?;
    let stdout = child.stdout.take().expect("stdout is piped");
    // One line when it is ready, or the end of the pipe when it is gone: no clock is needed to tell.
    let mut line = String::new();
    let read = BufReader::new(stdout).read_line(&mut line);
    if read.is_ok() && line.trim() == "ready" {
        return Ok(());
    }
    let status = child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
    Err(Error::failed(format!("node {} did not start ({status}): {}", config.name, last_words(config)))
        .hint(format!("its log is {}", config.log_file().display())))
}

fn words_path(config: &NodeConfig) -> PathBuf {
    config.dir.join("log").join("csvd.err")
}

fn dying_words(config: &NodeConfig) -> Result<File, Error> {
    let path = words_path(config);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(|error| cannot("make", dir, &error))?;
    }
    File::create(&path).map_err(|error| cannot("make", &path, &error))
}

fn last_words(config: &NodeConfig) -> String {
    let mut text = String::new();
    // A daemon that cannot start says so in a few lines.
    let read = File::open(words_path(config)).and_then(|file| file.take(4096).read_to_string(&mut text));
    match read {
        Ok(_) if !text.trim().is_empty() => text.trim().trim_start_matches("error: ").replace('\n', " "),
        _ => "it said nothing".to_owned(),
    }
}

/// A running daemon.
#[derive(Debug)]
pub(crate) struct Running {
    pid: Pid,
    /// Readable when the process has ended.
    exit: OwnedFd,
}

impl Running {
    /// The daemon of `pid_file`, when it is alive.
    pub(crate) fn find(pid_file: &Path) -> Result<Option<Self>, Error> {
        let file = match File::open(pid_file) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(cannot("open", pid_file, &error)),
        };
        match file.try_lock_shared() {
            Ok(()) => return Ok(None),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(cannot("lock", pid_file, &error)),
        }
        let text = fs::read_to_string(pid_file).map_err(|error| cannot("read", pid_file, &error))?;
        // The process, then when it was started, for whoever must be certain that it is the same one.
        let number = text.split_ascii_whitespace().next();
        let Some(pid) = number.and_then(|number| number.parse().ok()).and_then(Pid::from_raw) else {
            return Err(Error::failed(format!("{} holds no process id", pid_file.display())));
        };
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(exit) => Ok(Some(Self { pid, exit })),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(error) => Err(Error::failed(format!("watch process {}: {error}", pid.as_raw_nonzero()))),
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Signals the daemon and its VMs.
    pub(crate) fn signal_group(&self, signal: Signal) -> Result<(), Error> {
        match kill_process_group(self.pid, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(Error::failed(format!("signal process group {}: {error}", self.pid()))),
        }
    }

    /// Asks the daemon itself to end.
    pub(crate) fn ask_to_end(&self) -> Result<(), Error> {
        match rustix::process::pidfd_send_signal(&self.exit, Signal::TERM) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(Error::failed(format!("signal process {}: {error}", self.pid()))),
        }
    }

    /// Waits until the daemon has ended; `false` when `limit` passes first.
    pub(crate) fn wait_end(&self, limit: Duration) -> Result<bool, Error> {
        let end = now() + limit;
        loop {
            let left = end.saturating_duration_since(now());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut fds = [PollFd::new(&self.exit, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    return Err(Error::failed(format!("wait for process {}: {error}", self.pid())));
                }
            }
        }
    }
}

/// Pause before a daemon that begins anew is connected to again.
const CONNECT_AGAIN_AFTER: Duration = Duration::from_millis(50);

/// Waits until the daemon says that what `request` asks for has come. One that the others had held for dead, as on a machine that
/// stood still for a while, begins anew in the same process: its socket goes and comes back meanwhile.
pub(crate) async fn await_ready(config: &NodeConfig, request: WaitRequest) -> Result<(), Error> {
    let running = Running::find(&config.pid_file())?;
    let end = now() + Duration::from_millis(request.timeout_ms);
    loop {
        let left = end.saturating_duration_since(now());
        let timeout_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
        let Err(error) = ask_ready(config, WaitRequest { timeout_ms, ..request.clone() }).await else {
            return Ok(());
        };
        let comes_back = error.kind == api::Kind::Unreachable
            && match &running {
                Some(running) => !running.wait_end(Duration::ZERO)?,
                None => false,
            };
        if !comes_back || left.is_zero() {
            return Err(error.during(format!("waiting for node {}", config.name)));
        }
        tokio::time::sleep(CONNECT_AGAIN_AFTER).await;
    }
}

async fn ask_ready(config: &NodeConfig, request: WaitRequest) -> Result<(), Error> {
    let mut client = api::connect(&config.admin_socket()).await?;
    client.wait(request).await?;
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "a limit for a wait, in a command")]
fn now() -> Instant {
    Instant::now()
}
