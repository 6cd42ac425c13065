//! Holding a guest back, so that a move can follow its writes.
//!
//! ```text
//!   |- runs 10 ms -|----- naps -----|- runs 10 ms -|----- naps -----|      each vCPU, told by one thread
//! ```
//! **Invariant:** a vCPU that naps wakes for every command: a pause never waits for the end of a nap.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use threads::Kind;

use crate::kvm::{KvmError, Tried};
use crate::vcpu::{Command, Remote};

/// How long a vCPU runs between two naps.
const SLICE: Duration = Duration::from_millis(10);
/// Held back more than this, a guest would not notice that it runs.
pub(crate) const PERCENT_MAX: u8 = 99;
const STACK_BYTES: usize = 64 << 10;

/// Sends vCPUs to sleep for a share of their time.
#[derive(Debug)]
pub(crate) struct Throttle {
    percent: Sender<u8>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// Starts; the guest is not held back yet.
    pub(crate) fn start(vcpus: Vec<Remote>) -> Result<Self, KvmError> {
        let (percent, told) = channel();
        let work = move || {
            let mut held = 0;
            loop {
                let next = if held == 0 {
                    told.recv().map_err(|_| RecvTimeoutError::Disconnected)
                } else {
                    told.recv_timeout(SLICE + nap(held))
                };
                match next {
                    Ok(percent) => held = percent,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                if held > 0 {
                    for vcpu in &vcpus {
                        // One that has ended needs no rest.
                        drop(vcpu.tell(Command::Nap(nap(held))));
                    }
                }
            }
        };
        let builder = Builder::new().name("throttle".into()).stack_size(STACK_BYTES);
        let thread = threads::spawn(Kind::Watch, builder, work)
            .tried("starting the thread that holds a guest back")?;
        Ok(Self { percent, thread: Some(thread) })
    }

    /// Holds the guest back for this share of its time.
    pub(crate) fn set(&self, percent: u8) {
        // The thread ends only with this value.
        let _ = self.percent.send(percent.min(PERCENT_MAX));
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.percent = channel().0;
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// The nap after a slice, so that the guest is held back for `percent` of the time.
fn nap(percent: u8) -> Duration {
    let percent = u32::from(percent.min(PERCENT_MAX));
    SLICE * percent / (100 - percent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nap_takes_its_share_of_the_time() {
        assert_eq!(nap(50), SLICE);
        assert_eq!(nap(90), SLICE * 9);
        assert_eq!(nap(255), SLICE * 99, "bounded, whatever was asked for");
    }
}
