//! The consoles of this node's VMs: from their processes, and what is kept of those whose process has ended. And what is typed there.
//!
//! ```text
//!   guest ends --> its process is asked for all that it has --> kept --> the process is told to end
//! ```
//! A process ends soon after its guest, and what the guest has said last is what people look for. It is kept until the VM starts
//! again or is deleted; whoever was following is told the rest of that boot before anything of the next one.
//!
//! **Invariant:** no more than [`KEPT_MAX`] consoles are kept, each no longer than its process had kept it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::{Error, pb};
use hv::control::ConsoleReply;
use lockmgr::cluster::VmState;

use super::runner::CONSOLE_BYTES;
use super::{Runner, running_here};
use crate::core::Core;
use crate::view;

/// Consoles of VMs that have ended, the last ones of this node.
const KEPT_MAX: usize = 16;
/// Longest time that a process may take to tell what it has. It is about to be ended.
const TAKE_WITHIN: Duration = Duration::from_secs(5);
/// Longest wait for output within one answer.
const WAIT_MS_MAX: u64 = 5_000;
/// The same, where whoever asks has set a limit.
const LIMIT_MS_MAX: u64 = 600_000;
/// Most that is typed in one request; a guest's port holds far less.
const TYPED_BYTES_MAX: usize = 4096;

/// What VMs of this node have said that have ended.
#[derive(Debug, Default)]
pub(crate) struct Consoles {
    /// The oldest first. Rank: a leaf.
    kept: Mutex<VecDeque<Kept>>,
}

/// All that is left of one boot.
#[derive(Debug)]
struct Kept {
    vm: String,
    /// Of the record, when the VM ended.
    epoch: u64,
    boot: u64,
    from: u64,
    data: Vec<u8>,
}

impl Kept {
    /// What follows byte `from`, all at once.
    fn after(&self, from: u64) -> pb::ConsoleChunk {
        let next = self.from + self.data.len() as u64;
        let from = from.clamp(self.from, next);
        let skip = usize::try_from(from - self.from).expect("within what is kept");
        let data = self.data[skip..].to_vec();
        pb::ConsoleChunk { data, from, next, boot: self.boot, last: true, ended: String::new() }
    }
}

impl Consoles {
    fn keep(&self, console: Kept) {
        let mut kept = self.lock();
        kept.retain(|other| other.vm != console.vm);
        if kept.len() >= KEPT_MAX {
            kept.pop_front();
        }
        kept.push_back(console);
    }

    pub(super) fn forget(&self, vm: &str) {
        self.lock().retain(|kept| kept.vm != vm);
    }

    /// What the caller is told: of another boot than the one that it follows, nothing before it has seen all of that one. A VM
    /// that was taken back to a checkpoint is in the same boot, and what it has said after the checkpoint is not its past.
    fn before(&self, now: pb::ConsoleChunk, asked: &pb::VmConsoleRequest) -> pb::ConsoleChunk {
        if asked.boot == 0 || now.boot == 0 || now.boot == asked.boot {
            return now;
        }
        let kept = self.lock();
        let kept = kept.iter().find(|kept| kept.vm == asked.name && kept.boot == asked.boot);
        kept.map(|kept| kept.after(asked.from)).filter(|rest| !rest.data.is_empty()).unwrap_or(now)
    }

    /// What a VM has said that ended in this epoch.
    fn of_ended(&self, asked: &pb::VmConsoleRequest, epoch: u64) -> Option<pb::ConsoleChunk> {
        let kept = self.lock();
        let kept = kept.iter().find(|kept| kept.vm == asked.name && kept.epoch == epoch)?;
        let other = asked.boot != 0 && kept.boot != 0 && asked.boot != kept.boot;
        Some(kept.after(if other { 0 } else { asked.from }))
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps what a process has of its guest's output; to be called before the process is told to end.
pub(super) async fn keep(core: &Core, runner: &Runner) {
    let taken = tokio::time::timeout(TAKE_WITHIN, take(runner)).await;
    match taken.unwrap_or_else(|_| Err(Error::failed("its process did not tell it in time"))) {
        Ok(console) => core.vms.consoles.keep(console),
        Err(error) => tracing::warn!(vm = runner.name, %error, "the end of a console is lost"),
    }
}

async fn take(runner: &Runner) -> Result<Kept, Error> {
    let first = runner.control().console(0, 0, false).await?;
    let (boot, from) = (first.boot, first.from);
    let mut gathered = Gathered { next: from, data: Vec::new() };
    let mut goes_on = gathered.add(&first);
    while goes_on {
        goes_on = gathered.add(&runner.control().console(boot, gathered.next, false).await?);
    }
    Ok(Kept { vm: runner.name.clone(), epoch: runner.epoch(), boot, from, data: gathered.data })
}

/// What a process has, part by part, and no more than it can have had at once: a guest that is told to stop may go on talking.
struct Gathered {
    next: u64,
    data: Vec<u8>,
}

impl Gathered {
    /// Takes the next part, and says whether one more is wanted.
    fn add(&mut self, part: &ConsoleReply) -> bool {
        // A guest that still talks may have pushed out what was to come next: then the rest is all that is kept.
        if part.data.is_empty() || part.from != self.next {
            return false;
        }
        self.next = part.next;
        self.data.extend_from_slice(&part.data);
        self.data.truncate(CONSOLE_BYTES);
        self.data.len() < CONSOLE_BYTES
    }
}

/// A piece of the console of a VM of this node.
pub(crate) async fn console(
    core: &Arc<Core>,
    request: &pb::VmConsoleRequest,
) -> Result<pb::ConsoleChunk, Error> {
    let wait_ms = match (request.follow, request.limit_ms) {
        (false, _) => 0,
        (true, 0) => WAIT_MS_MAX,
        (true, limit_ms) => limit_ms.min(LIMIT_MS_MAX),
    };
    let asked = match running_here(core, &request.name, "console") {
        Ok((_, runner)) => {
            let piece = runner.console((request.boot, request.from), Duration::from_millis(wait_ms)).await;
            piece
                .map(|piece| core.vms.consoles.before(piece, request))
                .map_err(|error| error.during(format!("vm console {}", request.name)))
        }
        Err(error) => Err(error),
    };
    // Its process may have ended in this very moment.
    asked.or_else(|error| of_ended(core, request).ok_or(error))
}

/// Types at the console of a VM of this node. The process takes what its guest has room for.
pub(crate) async fn type_in(core: &Arc<Core>, request: pb::VmTypeRequest) -> Result<pb::VmTyped, Error> {
    let during = |error: Error| error.during(format!("vm console {}", request.name));
    if request.data.len() > TYPED_BYTES_MAX {
        return Err(during(
            Error::usage(format!("{} bytes are too many at once", request.data.len()))
                .hint(format!("send at most {TYPED_BYTES_MAX}, and the next ones when these were taken")),
        ));
    }
    let (_, runner) = running_here(core, &request.name, "console")?;
    let taken = runner.control().type_in(request.data.clone()).await.map_err(during)?;
    Ok(pb::VmTyped { taken })
}

/// Of a VM that has ended here and was not started since, here or elsewhere.
fn of_ended(core: &Core, request: &pb::VmConsoleRequest) -> Option<pb::ConsoleChunk> {
    let state = core.state();
    let record = view::vm(&state, &request.name).ok()?;
    let ended = record.owner == core.me && matches!(record.state, VmState::Stopped | VmState::Failed);
    ended.then(|| core.vms.consoles.of_ended(request, record.epoch)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(vm: &str, epoch: u64, boot: u64) -> Kept {
        Kept { vm: vm.into(), epoch, boot, from: 10, data: b"last words".to_vec() }
    }

    fn asked(vm: &str, boot: u64, from: u64) -> pb::VmConsoleRequest {
        pb::VmConsoleRequest { name: vm.into(), boot, from, ..pb::VmConsoleRequest::default() }
    }

    #[test]
    fn who_follows_a_boot_is_told_its_rest_and_nobody_else() {
        let consoles = Consoles::default();
        consoles.keep(kept("web", 5, 3));
        let now = |boot| pb::ConsoleChunk { boot, data: b"now".to_vec(), ..pb::ConsoleChunk::default() };
        let rest = consoles.before(now(6), &asked("web", 3, 15));
        assert_eq!((&rest.data[..], rest.from, rest.next, rest.boot), (&b"words"[..], 15, 20, 3));
        for others in [asked("web", 3, 20), asked("web", 4, 0), asked("web", 0, 0), asked("db", 3, 0)] {
            assert_eq!(consoles.before(now(6), &others), now(6), "{others:?}");
        }
        assert_eq!(consoles.before(now(3), &asked("web", 3, 15)), now(3), "taken back to a checkpoint");
    }

    #[test]
    fn an_ended_vm_shows_its_last_boot_from_the_beginning_to_who_has_seen_another() {
        let consoles = Consoles::default();
        consoles.keep(kept("web", 5, 3));
        assert_eq!(consoles.of_ended(&asked("web", 0, 0), 5).expect("kept").from, 10);
        assert_eq!(consoles.of_ended(&asked("web", 2, 18), 5).expect("kept").from, 10);
        assert_eq!(consoles.of_ended(&asked("web", 3, 18), 5).expect("kept").data, b"ds");
        assert_eq!(consoles.of_ended(&asked("web", 0, 0), 6), None, "it was started since");
    }

    // What a guest says never takes memory without bound, nor keeps its VM from being stopped.
    #[test]
    fn a_guest_that_talks_on_and_on_is_kept_to_what_its_process_can_have() {
        let says = |from: u64| {
            let data = vec![b'x'; 100_000];
            ConsoleReply { next: from + 100_000, from, data, ..ConsoleReply::default() }
        };
        let mut gathered = Gathered { next: 7, data: Vec::new() };
        let parts = (0..100).take_while(|_| gathered.add(&says(gathered.next))).count();
        assert_eq!((parts, gathered.data.len()), (CONSOLE_BYTES / 100_000, CONSOLE_BYTES));
        let mut pushed_out = Gathered { next: 7, data: Vec::new() };
        assert!(pushed_out.add(&says(7)) && !pushed_out.add(&says(200_000)), "it is not in one piece");
        assert_eq!(pushed_out.data.len(), 100_000);
    }

    #[test]
    fn the_oldest_console_makes_room() {
        let consoles = Consoles::default();
        for number in 0..=KEPT_MAX {
            consoles.keep(kept(&format!("vm{number}"), 1, 1));
            consoles.keep(kept(&format!("vm{number}"), 2, 2));
        }
        assert_eq!(consoles.of_ended(&asked("vm0", 0, 0), 2), None);
        assert!(consoles.of_ended(&asked("vm1", 0, 0), 2).is_some(), "one for each VM, its last");
    }
}
