//! How this node reaches a volume, for `volume state` and `health`.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// What users see of a volume on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) state: State,
    /// In words.
    pub(crate) reason: String,
    /// Milliseconds since 1970.
    pub(crate) since_ms: u64,
}

/// The states that this release knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Not usable now; applications wait.
    Paused(Code),
    /// Mounted; file data goes straight to the LUN.
    Direct,
}

/// Why a volume is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// It has only just appeared in the records.
    Starting,
    /// The LUN cannot be opened, or is not what the record says.
    NoLun,
    /// No coordinator answers.
    NoCoordinator,
    /// The mount point cannot be used.
    NoMount,
    /// The node is leaving the volume.
    Leaving,
}

impl State {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Paused(_) => "paused",
            Self::Direct => "direct",
        }
    }

    pub(crate) fn code(self) -> &'static str {
        match self {
            Self::Direct => "ok",
            Self::Paused(Code::Starting) => "starting",
            Self::Paused(Code::NoLun) => "no_lun",
            Self::Paused(Code::NoCoordinator) => "no_coordinator",
            Self::Paused(Code::NoMount) => "no_mount",
            Self::Paused(Code::Leaving) => "leaving",
        }
    }
}

/// The present status of a volume on this node.
#[derive(Debug)]
pub(crate) struct StatusCell {
    /// Rank: a leaf.
    status: Mutex<Status>,
}

impl StatusCell {
    pub(crate) fn new() -> Self {
        let status = Status {
            state: State::Paused(Code::Starting),
            reason: "the volume is being opened".to_owned(),
            since_ms: unix_ms(),
        };
        Self { status: Mutex::new(status) }
    }

    pub(crate) fn get(&self) -> Status {
        self.lock().clone()
    }

    /// Sets state and reason; `true` when the state is another one than before.
    pub(crate) fn set(&self, state: State, reason: &str) -> bool {
        let mut status = self.lock();
        let changed = status.state != state;
        if changed {
            status.since_ms = unix_ms();
        }
        status.state = state;
        reason.clone_into(&mut status.reason);
        changed
    }

    fn lock(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time of day, for people.
#[expect(clippy::disallowed_methods, reason = "shown to people; nothing is decided by it")]
pub(crate) fn unix_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
