//! A live move as this process sees it: it tells which pages are written, halts, and hands out or takes its state.
//!
//! ```text
//!   source:  track -> (fetch -> take, take ...)*  while the guest runs -> halt, with the rest -> gone, or abandon
//!   target:  RAM is filled from outside -> load -> activate
//! ```
//! RAM itself is copied by the node's daemon, which holds the network and the keys, through the memfd. **Invariant:** a VM
//! that is not `loaded` is never activated.

use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use hv::RunState;
use hv::control::{HaltReply, RamReply};
use hv::state::SavedMachine;
use prost::Message;

use crate::disk::RunnerDisk;
use crate::failure::Failure;
use crate::runner::{Phase, Runner, Stopwatch, not_now};

/// The written pages of so much RAM fit into the answer to a halt: 2 MiB of bits, beside the state.
const REST_RAM_BYTES_MAX: u64 = 64 << 30;

impl Runner {
    /// Which memfd holds the RAM.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn ram(&self) -> Result<RamReply, Failure> {
        let file = self.vm().ram().file();
        let metadata = file.metadata().map_err(|error| {
            Failure::new(
                format!("the memory of the VM cannot be shared: {error}"),
                "look at the log of its hv",
            )
        })?;
        let (descriptor, inode) = (file.as_raw_fd(), metadata.ino());
        Ok(RamReply { bytes: self.vm().ram().bytes(), descriptor, inode })
    }

    /// Begins or ends to note which pages are written.
    ///
    /// # Errors
    /// When the VM is not live, or KVM refuses.
    pub fn track(&self, on: bool) -> Result<(), Failure> {
        if !on {
            self.give_up_copy();
        }
        let _work = self.work_in("followed", &[Phase::Live])?;
        let tracked = match on {
            true => self.vm().track_writes(),
            false => self.vm().hold_back(0).and_then(|()| self.vm().untrack_writes()),
        };
        tracked.map_err(|error| not_now(&error))
    }

    /// Holds the guest back for this share of its time.
    ///
    /// # Errors
    /// When the system has no thread for it.
    pub fn hold_back(&self, percent: u32) -> Result<(), Failure> {
        self.vm().hold_back(u8::try_from(percent).unwrap_or(u8::MAX)).map_err(|error| not_now(&error))
    }

    /// Begins a pass; gives the number of written pages.
    ///
    /// # Errors
    /// When nothing is tracked.
    pub fn fetch(&self) -> Result<u64, Failure> {
        self.vm().fetch_written().map_err(|error| not_now(&error))
    }

    /// The written pages of a chunk.
    ///
    /// # Errors
    /// When nothing is tracked, or it is no chunk of this VM's RAM.
    pub fn take(&self, first_page: u64, pages: u64) -> Result<Vec<u64>, Failure> {
        self.vm().take_written(first_page, pages).map_err(|error| not_now(&error))
    }

    /// Pauses, drains, closes the disks and gives the state. On any error the VM goes on as before.
    ///
    /// # Errors
    /// What failed; the VM goes on.
    pub fn halt(&self) -> Result<HaltReply, Failure> {
        let mut disks = self.work_in("halted", &[Phase::Live])?;
        let ran = self.vm().run_state() == RunState::Running;
        match self.stop_and_save(&mut disks, ran) {
            Ok(reply) => {
                *self.phase() = Phase::Saved { ran };
                Ok(reply)
            }
            Err(failure) => {
                tracing::warn!(%failure, "halting failed, the VM goes on");
                self.go_on(&mut disks, ran)?;
                Err(failure)
            }
        }
    }

    fn stop_and_save(&self, disks: &mut [RunnerDisk], ran: bool) -> Result<HaltReply, Failure> {
        let mut watch = Stopwatch::start();
        if ran {
            self.vm().pause().map_err(|error| not_now(&error))?;
        }
        self.vm().hold_back(0).map_err(|error| not_now(&error))?;
        self.close_disks(disks)?;
        let drain_ms = watch.lap_ms();
        let state = self.vm().save_state().map_err(|error| not_now(&error))?.encode_to_vec();
        // Nobody writes any more: what was not taken by now is the last there is (H3).
        let rest = if self.vm().ram().bytes() <= REST_RAM_BYTES_MAX {
            self.vm().rest_of_written().map_err(|error| not_now(&error))?
        } else {
            Vec::new()
        };
        Ok(HaltReply { drain_ms, state_ms: watch.lap_ms(), state, rest })
    }

    /// Takes over a state; RAM is complete.
    ///
    /// # Errors
    /// When the state is damaged or does not fit; this process is then of no use.
    pub fn load(&self, state: &[u8]) -> Result<(), Failure> {
        let _work = self.work_in("loaded", &[Phase::Incoming { loaded: false }])?;
        let refused = |error: &dyn std::fmt::Display| {
            Failure::new(
                format!("the state that came from the other node cannot be restored: {error}"),
                "is that node of another kind, or of a newer version?",
            )
        };
        let machine = SavedMachine::decode(state).map_err(|error| refused(&error))?;
        self.vm().restore_state(&machine).map_err(|error| refused(&error))?;
        // What the record says holds, whatever was asked for when it was saved.
        self.set_balloon(self.config().balloon_bytes)?;
        *self.phase() = Phase::Incoming { loaded: true };
        Ok(())
    }
}
