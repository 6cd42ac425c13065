//! The place of a volume's coordinator on this node: opened when the record appoints this node, closed when it does not.
//!
//! ```text
//!   record says (me, my epoch, term T)  and  nothing open, or an older term open   -->  open T, report Online or Failed
//!   record says another node                  and  something open                    -->  close
//! ```
//! Opening, closing and planned moves of one volume never overlap: they hold `work`.
//!
//! A term that this node has offered to another, or reported as failed, is renounced: the change of the record may take
//! effect at any later moment, and a coordinator that was opened again meanwhile would write beside its successor. To serve
//! again the node appoints itself with the next term, which that change cannot pass any more.
//!
//! **Invariants:** at most one coordinator of a volume is open here, and only of the term in the record; while an
//! incarnation lives, only it ends its terms, and none that it has ended is opened again (D5).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use api::Error;
use csvfs::coordinator::{CloseReport, Coordinator, OpenParams};
use lockmgr::cluster::{Command, VolumeRecord, VolumeState};
use lockmgr::{Epoch, Term};
use tokio::sync::{Mutex, MutexGuard, Notify, watch};

use super::local::LocalVolume;
use super::phases::Phases;
use crate::core::Core;
use crate::router::Pushes;
use crate::{redirect, view};

/// Pause before another attempt to open a coordinator.
const AGAIN_AFTER: Duration = Duration::from_millis(500);
/// Longest pause before the coordinator is told again of clients that are over and stay, because their logs cannot be read.
const TELL_AGAIN_AFTER_MAX: Duration = Duration::from_secs(8);

/// An open coordinator.
#[derive(Clone)]
struct Serving {
    term: Term,
    coordinator: Arc<Coordinator>,
}

/// See the module.
pub(crate) struct Host {
    serving: watch::Sender<Option<Serving>>,
    /// Held while the coordinator is opened, closed or handed over.
    work: Mutex<()>,
    nudge: Notify,
    /// Requests of applications that came while there was no coordinator here.
    held: AtomicU64,
    /// Terms up to this one are never opened here again. Changed under `work`.
    renounced: AtomicU64,
    phases: Phases,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("term", &self.term()).finish_non_exhaustive()
    }
}

impl Host {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            serving: watch::Sender::new(None),
            work: Mutex::new(()),
            nudge: Notify::new(),
            held: AtomicU64::new(0),
            renounced: AtomicU64::new(0),
            phases: Phases::default(),
        })
    }

    /// Never opens `term` or an earlier one again. The caller holds the work lock and has closed what was open.
    pub(super) fn renounce(&self, term: Term) {
        self.renounced.fetch_max(term.0, Ordering::Relaxed);
    }

    /// The offer of `term` has certainly come to nothing, so it may be opened again. The caller holds the work lock.
    pub(super) fn keep(&self, term: Term) {
        self.renounced.store(term.0.saturating_sub(1), Ordering::Relaxed);
    }

    fn is_renounced(&self, term: Term) -> bool {
        term.0 <= self.renounced.load(Ordering::Relaxed)
    }

    /// The coordinator, when it is open here.
    pub(crate) fn serving(&self) -> Option<Arc<Coordinator>> {
        self.serving.borrow().as_ref().map(|serving| Arc::clone(&serving.coordinator))
    }

    /// The coordinator, as soon as it is open here.
    pub(crate) async fn serving_soon(&self) -> Option<Arc<Coordinator>> {
        let mut watch = self.serving.subscribe();
        let serving = watch.wait_for(Option::is_some).await.ok()?;
        serving.as_ref().map(|serving| Arc::clone(&serving.coordinator))
    }

    /// The term that is open here.
    pub(crate) fn term(&self) -> Option<Term> {
        self.serving.borrow().as_ref().map(|serving| serving.term)
    }

    /// Returns when a coordinator of `term` or a later one is open here.
    pub(crate) async fn serves(&self, term: Term) {
        let mut watch = self.serving.subscribe();
        let open = |serving: &Option<Serving>| serving.as_ref().is_some_and(|serving| serving.term >= term);
        drop(watch.wait_for(open).await);
    }

    /// A request came and found no coordinator.
    pub(crate) fn hold(&self) {
        self.held.fetch_add(1, Ordering::Relaxed);
    }

    /// The requests that have found no coordinator since this was asked last.
    pub(crate) fn take_held(&self) -> u64 {
        self.held.swap(0, Ordering::Relaxed)
    }

    /// Every client of the former term has attached or is gone.
    pub(crate) fn reclaimed(&self) {
        self.phases.reclaimed();
    }

    /// The coordinator here has answered an application's call; after the first one, how long all took.
    pub(crate) fn answered(&self) -> Option<String> {
        self.phases.answered()
    }

    /// Makes the host look at the record again.
    pub(crate) fn settle_soon(&self) {
        self.nudge.notify_one();
    }

    /// Keeps others from opening or closing.
    pub(super) async fn begin_work(&self) -> MutexGuard<'_, ()> {
        self.work.lock().await
    }

    /// Closes what is open here, because the daemon ends.
    pub(crate) async fn close(&self, why: &str) {
        let _work = self.work.lock().await;
        drop(self.shut(why).await);
    }

    /// Closes what is open here. The caller holds the work lock.
    pub(super) async fn shut(&self, why: &str) -> Option<Result<CloseReport, Error>> {
        let serving = self.serving.send_replace(None)?;
        let term = serving.term;
        let coordinator = serving.coordinator;
        let stats = coordinator.stats();
        let (requests, commits, recalls) = (stats.requests, stats.commits, stats.recalls);
        tracing::info!(%term, why, requests, commits, recalls, "coordinator closes");
        let report = tokio::task::spawn_blocking(move || coordinator.close()).await;
        Some(match report {
            Ok(Ok(report)) => Ok(report),
            Ok(Err(error)) => {
                tracing::error!(%term, %error, "coordinator did not close in order");
                Err(Error::failed(error))
            }
            Err(error) => Err(Error::failed(error)),
        })
    }

    /// The coordinator of `term` has stopped by itself: it is put away, and the volume looked at again.
    pub(crate) fn stopped(&self, term: Term) {
        self.serving.send_if_modified(|serving| {
            let it = serving.as_ref().is_some_and(|serving| serving.term == term);
            if it {
                *serving = None;
            }
            it
        });
        self.settle_soon();
    }

    /// Opens the coordinator of the record's term. The caller holds the work lock and has closed what was open.
    pub(super) async fn open(
        &self,
        core: &Arc<Core>,
        volume: &Arc<LocalVolume>,
        record: &VolumeRecord,
        epoch: Epoch,
    ) -> Result<(), Error> {
        self.phases.appointed();
        let device = volume.device().await?;
        // What the former coordinator wrote through a peer must not come after what this one writes.
        redirect::cut_off_the_dead(core).await;
        let pushes = Arc::new(Pushes::new(core, record.id, record.term));
        let mut params = OpenParams::new(device, record.id, (core.me, epoch, record.term), pushes);
        params.timing.grace_ms = core.timing.grace_ms;
        params.timing.locks.recall_ms = core.timing.recall_ms;
        params.timing.locks.hold_min_ms = core.timing.hold_min_ms;
        let opened =
            tokio::task::spawn_blocking(move || Coordinator::open(params)).await.map_err(Error::failed)?;
        let coordinator = opened.map_err(|error| {
            Error::failed(error).during(format!("opening the coordinator of {}", record.name))
        })?;
        self.phases.opened();
        let _later = report_gone(core, &coordinator).await;
        self.serving.send_replace(Some(Serving { term: record.term, coordinator }));
        tracing::info!(volume = %record.name, term = %record.term, "coordinator serves");
        core.pulse.beat();
        Ok(())
    }
}

/// Follows the record until the volume or the daemon is gone.
pub(super) async fn run(core: Arc<Core>, volume: Arc<LocalVolume>) {
    let host = Arc::clone(&volume.host);
    let weak: Weak<LocalVolume> = Arc::downgrade(&volume);
    drop(volume);
    let mut pauses = Pauses::default();
    loop {
        let Some(volume) = weak.upgrade().filter(|volume| !volume.is_leaving()) else {
            host.close("the volume was removed").await;
            return;
        };
        let pause = pauses.after(settle(&core, &volume).await);
        drop(volume);
        tokio::select! {
            () = core.done.cancelled() => return,
            () = host.nudge.notified() => {}
            () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => {}
        }
    }
}

/// What is left to do when the record was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Nothing,
    /// An attempt has failed, or is to be looked at once more.
    Attempt,
    /// Clients that are over were listed by the coordinator: told again, until none is.
    ClientsOver,
}

/// When the record is looked at again without an event.
#[derive(Debug, Default)]
struct Pauses {
    /// The last pause before clients that are over were told again.
    told_after: Option<Duration>,
}

impl Pauses {
    /// A client whose log cannot be read stays as long as the LUN's fault does, so the pauses grow.
    fn after(&mut self, left: Left) -> Option<Duration> {
        let last = self.told_after.take();
        match left {
            Left::Nothing => None,
            Left::Attempt => Some(AGAIN_AFTER),
            Left::ClientsOver => {
                let next = last.map_or(AGAIN_AFTER, |last| (last * 2).min(TELL_AGAIN_AFTER_MAX));
                self.told_after = Some(next);
                self.told_after
            }
        }
    }
}

/// Makes what is open here fit the record.
async fn settle(core: &Arc<Core>, volume: &Arc<LocalVolume>) -> Left {
    let host = &volume.host;
    let _work = host.begin_work().await;
    // Read under the lock: a move that has just ended has changed it.
    let state = core.state();
    let (Some(record), Some(epoch)) = (view::volume_by_id(&state, volume.id), core.epoch()) else {
        return Left::Nothing;
    };
    let mine = record.owner == core.me && record.owner_epoch == epoch;
    if mine && host.term() == Some(record.term) {
        return match host.serving() {
            Some(coordinator) => report_gone(core, &coordinator).await,
            None => Left::Nothing,
        };
    }
    if host.term().is_some() {
        drop(host.shut("the record names another coordinator").await);
    }
    if !mine {
        return Left::Nothing;
    }
    if host.is_renounced(record.term) {
        return reappoint(core, record, epoch).await;
    }
    let opened = host.open(core, volume, record, epoch).await;
    if opened.is_err() {
        // The leader may appoint another node as soon as it reads the report.
        host.renounce(record.term);
    }
    report(core, record, opened).await;
    // Either it is tried again, or the clients that are over are looked at again.
    Left::Attempt
}

/// The record names a term that this node has renounced: it needs the next one.
async fn reappoint(core: &Arc<Core>, record: &VolumeRecord, epoch: Epoch) -> Left {
    if record.state == VolumeState::Failed {
        // The leader reads it, and appoints the next node, or this one again.
        return Left::Nothing;
    }
    let command = Command::MoveVolume {
        name: record.name.clone(),
        expect_term: record.term,
        to: core.me,
        to_epoch: epoch,
    };
    match core.propose(command).await {
        Ok(_) => Left::Nothing,
        Err(error) => {
            tracing::warn!(volume = %record.name, term = %record.term, %error, "no new term yet");
            Left::Attempt
        }
    }
}

/// Writes the outcome of an attempt into the record.
pub(super) async fn report(core: &Arc<Core>, record: &VolumeRecord, opened: Result<(), Error>) {
    let (state, reason) = match opened {
        Ok(()) => (VolumeState::Online, String::new()),
        Err(error) => {
            tracing::error!(volume = %record.name, term = %record.term, %error, "no coordinator");
            (VolumeState::Failed, error.message)
        }
    };
    if record.state == state && record.reason == reason {
        return;
    }
    let command =
        Command::SetVolumeState { name: record.name.clone(), expect_term: record.term, state, reason };
    if let Err(error) = core.propose(command).await {
        tracing::warn!(volume = %record.name, %error, "state of the volume not recorded");
    }
}

/// Tells the coordinator which of its clients are certainly over (A1). One whose log cannot be read now stays.
async fn report_gone(core: &Arc<Core>, coordinator: &Arc<Coordinator>) -> Left {
    let state = core.state();
    let asked = Arc::clone(coordinator);
    let clients = tokio::task::spawn_blocking(move || asked.clients()).await.unwrap_or_default();
    let mut gone: Vec<_> = clients
        .into_iter()
        .map(|client| (client.id.node, client.id.epoch))
        .filter(|(node, epoch)| view::is_over(&state, *node, *epoch))
        .collect();
    gone.sort_unstable();
    gone.dedup();
    if !gone.is_empty() {
        redirect::cut_off_the_dead(core).await;
    }
    for (node, epoch) in &gone {
        // Again and again while a log cannot be read, of which an event tells once.
        tracing::debug!(%node, %epoch, "clients of this incarnation are over");
        coordinator.node_gone(*node, *epoch);
    }
    if gone.is_empty() { Left::Nothing } else { Left::ClientsOver }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_is_over_and_stays_is_told_again_for_ever_and_less_and_less_often() {
        let mut pauses = Pauses::default();
        let mut asked = |left, times| -> Vec<u128> {
            (0..times).map(|_| pauses.after(left).expect("again").as_millis()).collect()
        };
        assert_eq!(asked(Left::ClientsOver, 7), [500, 1000, 2000, 4000, 8000, 8000, 8000]);
        assert_eq!(asked(Left::Attempt, 2), [500, 500]);
        assert_eq!(asked(Left::ClientsOver, 2), [500, 1000], "another one that is over");
        assert_eq!(pauses.after(Left::Nothing), None);
        assert_eq!(pauses.after(Left::ClientsOver), Some(AGAIN_AFTER));
    }

    // Invariant D5: what the cluster may have given to another is not opened again.
    #[test]
    fn a_renounced_term_stays_so_unless_its_offer_came_to_nothing() {
        let host = Host::new();
        assert!(!host.is_renounced(Term(4)));
        host.renounce(Term(4));
        assert!(host.is_renounced(Term(3)) && host.is_renounced(Term(4)) && !host.is_renounced(Term(5)));
        host.keep(Term(4));
        assert!(host.is_renounced(Term(3)) && !host.is_renounced(Term(4)));
        host.renounce(Term(5));
        host.renounce(Term(4));
        assert!(host.is_renounced(Term(5)), "it never goes back by renouncing less");
    }
}
