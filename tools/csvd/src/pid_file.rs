//! The pid file: who the daemon of this folder is, for whoever must make certain that it is dead.
//!
//! It is locked as long as the daemon lives, and names its process group, which its VMs belong to.
//!
//! **Invariant:** once [`PidFile::take`] has returned, no process of an earlier incarnation of this node is alive. The
//! beginning of a new epoch relies on it: whatever the old one held may be given to others (A1).

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::Duration;

use api::Error;
use lockmgr::fence::ProcessGroup;

/// Longest time that killed processes may take to be gone; they are normally gone at once.
const GONE_WITHIN: Duration = Duration::from_secs(30);

/// The lock on the pid file.
#[derive(Debug)]
pub(crate) struct PidFile {
    _lock: File,
}

impl PidFile {
    /// Takes over the folder: ends what an earlier incarnation left running, and writes down this process's group.
    pub(crate) fn take(path: &Path) -> Result<Self, Error> {
        let cannot = |doing: &str, error: std::io::Error| {
            Error::failed(format!("{doing} {}: {error}", path.display()))
        };
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)
            .map_err(|error| cannot("open", error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::conflict(format!(
                    "a daemon is already running here: it holds {}",
                    path.display()
                ))
                .hint("stop it first, or use another folder"));
            }
            Err(TryLockError::Error(error)) => return Err(cannot("lock", error)),
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(|error| cannot("read", error))?;
        end_former(&text)?;
        let own = ProcessGroup::own().map_err(|error| {
            Error::failed(error).hint("start csvd with --new-session, or as a service of its own")
        })?;
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{own}"))
            .and_then(|()| file.sync_data())
            .map_err(|error| cannot("write", error))?;
        Ok(Self { _lock: file })
    }
}

/// Ends the processes that the earlier daemon of this folder has left, such as its VMs.
fn end_former(text: &str) -> Result<(), Error> {
    // Empty, or cut off while it was written: nothing had been started by then.
    let Ok(former) = text.parse::<ProcessGroup>() else { return Ok(()) };
    // A daemon that begins anew is its own former one: the process goes on, what it had started does not.
    let ended = if former.is_own() { former.end_others(GONE_WITHIN) } else { former.end(GONE_WITHIN) };
    let ended = ended.map_err(|error| {
        Error::failed(error)
            .during("ending what this node's earlier daemon has left")
            .hint("it may still write to a LUN; the node cannot join before it is gone")
    })?;
    if ended > 0 {
        tracing::warn!(
            group = former.id(),
            ended,
            "processes of this node's earlier daemon were still there: killed"
        );
    }
    Ok(())
}
