//! Heartbeats on a LUN: a thread and a queue of their own, so that no other I/O can delay them (B4).

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use api::Error;
use blockio::{BlockDevice, IoError};
use lockmgr::detector::Event;
use lockmgr::heartbeat::{Beat, LunSlots, SlotContent};
use lockmgr::{Epoch, VolumeId};

use crate::core::Core;
use crate::redirect::Road;

/// The heartbeats of this node on one volume, until it is dropped.
#[derive(Debug)]
pub(crate) struct LunBeats {
    /// Closing it ends the thread.
    end: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl LunBeats {
    /// Starts beating on a device of its own, which is opened again after a failure; `lost` is told of failures.
    pub(crate) fn start(
        core: &Arc<Core>,
        epoch: Epoch,
        area: (u64, VolumeId),
        road: Arc<Road>,
        lost: impl Fn(&IoError) + Send + 'static,
    ) -> Result<Self, Error> {
        let (end, ended) = mpsc::channel();
        let lost = Box::new(lost);
        let core = Arc::clone(core);
        let beating = Beating { core, epoch, area, road, lost, slots: None, counter: 0, failing: false };
        let thread = std::thread::Builder::new()
            .name("lun-beat".to_owned())
            .stack_size(256 << 10)
            .spawn(move || beating.run(&ended))
            .map_err(|error| Error::failed(format!("start of the LUN heartbeat: {error}")))?;
        Ok(Self { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for LunBeats {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

struct Beating {
    core: Arc<Core>,
    epoch: Epoch,
    area: (u64, VolumeId),
    road: Arc<Road>,
    lost: Box<dyn Fn(&IoError) + Send>,
    /// Nothing after a failure: a device that has failed once may go on failing although its path is whole again.
    slots: Option<(LunSlots, Arc<dyn BlockDevice>)>,
    counter: u64,
    failing: bool,
}

impl Beating {
    fn run(mut self, ended: &mpsc::Receiver<()>) {
        let interval = Duration::from_millis(self.core.timing.lun_beat_ms);
        let road = Arc::clone(&self.road);
        loop {
            let turn = road.place().take_turn();
            let outcome = self.beat();
            drop(turn);
            self.report(outcome);
            match ended.recv_timeout(interval) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn beat(&mut self) -> Result<(), IoError> {
        self.counter += 1;
        let (slots, device) = match self.slots.take() {
            Some(open) => open,
            None => {
                let device = self.road.open_held()?;
                (LunSlots::new(Arc::clone(&device), self.area.0, self.area.1), device)
            }
        };
        slots.write(Beat {
            node: self.core.me,
            epoch: self.epoch,
            counter: self.counter,
            lease_ms: self.core.timing.lease_ms,
        })?;
        self.road.place().look_again(&*device)?;
        for slot in slots.read_all()? {
            match slot.content {
                SlotContent::Beat(beat) if slot.node != self.core.me => {
                    self.core.membership.note_lease(beat.node, beat.lease_ms);
                    self.core.membership.observe(Event::LunBeat {
                        node: beat.node,
                        epoch: beat.epoch,
                        counter: beat.counter,
                    });
                }
                _ => {}
            }
        }
        self.core.membership.observe(Event::LunScanned);
        self.slots = Some((slots, device));
        Ok(())
    }

    fn report(&mut self, outcome: Result<(), IoError>) {
        if let Err(error) = &outcome {
            (self.lost)(error);
        }
        match (outcome, self.failing) {
            (Ok(()), false) | (Err(_), true) => {}
            (Ok(()), true) => {
                self.failing = false;
                tracing::info!("LUN heartbeat works again");
            }
            (Err(error), false) => {
                self.failing = true;
                tracing::error!(%error, "LUN heartbeat fails");
            }
        }
    }
}
