//! Work on the image of a disk while the guest uses it: snapshot, merge, compact, resize; info, check, map.
//!
//! ```text
//!   begin --> running (a thread, with progress) ------------------------------> done | failed     kept until the next begins
//!                 '--> asking: is the new image the disk now? -- decide --'
//! ```
//! Only a snapshot asks: its child is whole, durable and open, and the guest's requests wait until the supervisor has written
//! the child into the VM's record. A crash before that leaves the old image as the disk, and a file that nobody refers to;
//! a crash after it leaves the child, over a parent that was closed cleanly.
//!
//! **Invariant (E6):** the child serves its first request only after the supervisor has said that the record names it. A
//! snapshot holds the runner's work, so that nobody else opens, closes or moves the disk meanwhile; longer work holds the
//! disk alone and ends with an error when the disk is closed.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use hv::control::image_work::Work as Wanted;
use hv::control::{ImageProgress, ImageWork, Refused};
use threads::Kind;
use vhdx::VhdxError;

use crate::failure::Failure;
use crate::image_work;
use crate::runner::Runner;

/// How long an answer waits for news.
const NEWS_WITHIN: Duration = Duration::from_secs(1);

/// The work on images of this process.
#[derive(Default)]
pub(crate) struct Works {
    /// The last one begun. A leaf.
    last: Mutex<Option<Arc<Work>>>,
}

/// One piece of work.
pub(crate) struct Work {
    /// A leaf.
    state: Mutex<State>,
    news: Condvar,
}

struct State {
    version: u64,
    stage: Stage,
    done: u64,
    total: u64,
}

#[derive(Clone, Debug)]
enum Stage {
    Running,
    Asking,
    Answered(bool),
    Done(String),
    Failed(Failure),
}

impl Stage {
    fn has_ended(&self) -> bool {
        matches!(self, Self::Done(_) | Self::Failed(_))
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Running | Self::Answered(_) => "running",
            Self::Asking => "asking",
            Self::Done(_) => "done",
            Self::Failed(_) => "failed",
        }
    }
}

impl Works {
    fn last(&self) -> MutexGuard<'_, Option<Arc<Work>>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self) -> Result<Arc<Work>, Failure> {
        let mut last = self.last();
        if last.as_ref().is_some_and(|work| !work.lock().stage.has_ended()) {
            return Err(Failure::new(
                "another image of this VM is being worked on",
                "wait until that is done",
            ));
        }
        let state = State { version: 1, stage: Stage::Running, done: 0, total: 0 };
        let work = Arc::new(Work { state: Mutex::new(state), news: Condvar::new() });
        Ok(Arc::clone(last.insert(work)))
    }

    fn current(&self) -> Result<Arc<Work>, Failure> {
        let none = || Failure::new("no image of this VM is being worked on", "begin the work first");
        self.last().clone().ok_or_else(none)
    }
}

impl Work {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        state.version += 1;
        self.news.notify_all();
    }

    /// So much of `total` is done.
    pub(crate) fn progress(&self, done: u64, total: u64) {
        self.change(|state| (state.done, state.total) = (done, total));
    }

    /// Asks the supervisor whether the new image is the disk from now on, and waits for the answer as long as it takes: only
    /// it knows what the record says.
    pub(crate) fn ask(&self) -> Result<(), VhdxError> {
        self.change(|state| state.stage = Stage::Asking);
        let asking = self.lock();
        let mut asking = self
            .news
            .wait_while(asking, |state| matches!(state.stage, Stage::Asking))
            .unwrap_or_else(PoisonError::into_inner);
        let go = matches!(asking.stage, Stage::Answered(true));
        asking.stage = Stage::Running;
        if go {
            return Ok(());
        }
        Err(VhdxError::InvalidInput("the record of the VM could not be changed".to_owned()))
    }

    fn answer(&self, go: bool) -> Result<(), Failure> {
        let mut state = self.lock();
        if !matches!(state.stage, Stage::Asking) {
            return Err(Failure::new("nothing was asked", "look at how far the work is"));
        }
        state.stage = Stage::Answered(go);
        state.version += 1;
        self.news.notify_all();
        Ok(())
    }

    /// How far it is, as soon as that is something else than version `seen`.
    fn watch(&self, seen: u64) -> ImageProgress {
        let (state, _) = self
            .news
            .wait_timeout_while(self.lock(), NEWS_WITHIN, |state| state.version == seen)
            .unwrap_or_else(PoisonError::into_inner);
        let mut shown = ImageProgress {
            version: state.version,
            phase: state.stage.name().to_owned(),
            done: state.done,
            total: state.total,
            ..ImageProgress::default()
        };
        match &state.stage {
            Stage::Done(result) => shown.result.clone_from(result),
            Stage::Failed(failure) => {
                let Failure { error, hint } = failure.clone();
                shown.failure = Some(Refused { message: error, hint });
            }
            _ => {}
        }
        shown
    }
}

impl Runner {
    /// Begins work on the image of a disk.
    ///
    /// # Errors
    /// When other work is not done yet, or the system has no thread for it.
    pub fn begin_image_work(self: &Arc<Self>, asked: ImageWork) -> Result<(), Failure> {
        let wanted = asked
            .work
            .ok_or_else(|| Failure::new("work on an image of an unknown kind", "is csvd newer than hv?"))?;
        let work = self.works().begin()?;
        let (runner, given) = (Arc::clone(self), Arc::clone(&work));
        let builder = Builder::new().name("image-work".into());
        let begun =
            threads::spawn(Kind::Images, builder, move || carry_out(&runner, &given, asked.slot, wanted));
        begun.map(drop).map_err(|error| {
            let failure = Failure::new(format!("cannot start a thread: {error}"), "check the limits");
            work.change(|state| state.stage = Stage::Failed(failure.clone()));
            failure
        })
    }

    /// How far the work is, as soon as there is something newer than version `seen`, or after a moment.
    ///
    /// # Errors
    /// When none was begun.
    pub fn watch_image_work(&self, seen: u64) -> Result<ImageProgress, Failure> {
        Ok(self.works().current()?.watch(seen))
    }

    /// Answers a snapshot that asks.
    ///
    /// # Errors
    /// When none does.
    pub fn decide_image_work(&self, go: bool) -> Result<(), Failure> {
        self.works().current()?.answer(go)
    }
}

fn carry_out(runner: &Runner, work: &Work, slot: u32, wanted: Wanted) {
    let outcome = match wanted {
        Wanted::Snapshot(asked) => image_work::snapshot(runner, work, slot, &asked.path),
        Wanted::Merge(asked) => image_work::merge(runner, work, slot, &asked),
        Wanted::Compact(_) => image_work::compact(runner, work, slot),
        Wanted::Resize(asked) => image_work::resize(runner, slot, &asked),
        Wanted::Look(asked) => image_work::look(runner, slot, &asked),
    };
    work.change(|state| {
        state.stage = match outcome {
            Ok(result) => Stage::Done(result),
            Err(failure) => Stage::Failed(failure),
        };
    });
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn work_on_images_is_done_one_at_a_time_and_its_outcome_stays() {
        let works = Works::default();
        assert!(works.current().is_err());
        let work = works.begin().expect("the first one");
        assert!(works.begin().is_err(), "it is not done yet");
        work.progress(3, 10);
        let seen = works.current().expect("it runs").watch(0);
        assert_eq!((seen.phase.as_str(), seen.done, seen.total), ("running", 3, 10));
        work.change(|state| state.stage = Stage::Done("{}".into()));
        assert_eq!(works.current().expect("it is kept").watch(seen.version).result, "{}");
        works.begin().expect("the first one is done");
    }

    // Invariant E6
    #[test]
    fn a_snapshot_goes_on_only_with_the_answer_that_it_waits_for() {
        for go in [true, false] {
            let works = Works::default();
            let work = works.begin().expect("the first one");
            work.answer(go).expect_err("nothing was asked");
            let asking = Arc::clone(&work);
            let asked = thread::spawn(move || asking.ask());
            let mut seen = 0;
            while work.watch(seen).phase != "asking" {
                seen = work.lock().version;
            }
            work.answer(go).expect("it was asked");
            assert_eq!(asked.join().expect("it ends").is_ok(), go);
            work.answer(go).expect_err("it was answered");
        }
    }
}
