//! virtio-rng: the host's random numbers.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};

use super::queue::{Chain, Popped, RequestQueue};
use super::worker::Wakeup;
use super::{DeviceInterrupt, FEATURES_OF_ALL, VirtioDevice};
use crate::devices::Interrupt;
use crate::memory::GuestRam;

const KIND: u32 = 4;
/// Given for one request; a guest asks for a few dozen bytes.
const BYTES_MAX: usize = 64 << 10;

/// The device.
#[derive(Debug)]
pub(crate) struct Rng {
    queue: RequestQueue,
    interrupt: DeviceInterrupt,
    wakeup: Arc<Wakeup>,
    ram: GuestRam,
}

impl Rng {
    pub(crate) fn new(ram: GuestRam, line: Arc<dyn Interrupt>) -> io::Result<Self> {
        Ok(Self {
            queue: RequestQueue::new(),
            interrupt: DeviceInterrupt::new(line),
            wakeup: Arc::new(Wakeup::new()?),
            ram,
        })
    }

    pub(crate) fn wakeup(&self) -> Arc<Wakeup> {
        Arc::clone(&self.wakeup)
    }

    /// Fills everything that the driver has posted.
    pub(crate) fn serve(&self) -> Option<Duration> {
        loop {
            match self.queue.pop(&self.ram) {
                Popped::Empty => return None,
                Popped::Broken => {
                    self.interrupt.config_changed();
                    return None;
                }
                Popped::Chain(chain) => {
                    let written = self.fill(&chain);
                    self.queue.complete(&self.ram, chain.head, written, &self.interrupt);
                }
            }
        }
    }

    fn fill(&self, chain: &Chain) -> u32 {
        let mut written = 0;
        let mut bytes = vec![0; 4096];
        for part in chain.parts.iter().filter(|part| part.writable) {
            let (mut at, mut left) = (part.address, part.len as usize);
            while left > 0 && written < BYTES_MAX {
                let now = &mut bytes[..left.min(4096).min(BYTES_MAX - written)];
                // By a call and not from a file: the process may have no files. It gives all of so few bytes, or nothing.
                let given = getrandom(&mut *now, GetRandomFlags::empty());
                // A part outside of RAM ends it; the driver sees how far it got.
                if given != Ok(now.len()) || self.ram.write(at, now).is_err() {
                    return u32::try_from(written).expect("bounded above");
                }
                (at, left, written) = (at + now.len() as u64, left - now.len(), written + now.len());
            }
        }
        u32::try_from(written).expect("bounded above")
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> u32 {
        KIND
    }
    fn features(&self) -> u64 {
        FEATURES_OF_ALL
    }
    fn queues(&self) -> &[RequestQueue] {
        std::slice::from_ref(&self.queue)
    }
    fn ram(&self) -> &GuestRam {
        &self.ram
    }
    fn interrupt(&self) -> &DeviceInterrupt {
        &self.interrupt
    }
    fn read_config(&self, _offset: u64, into: &mut [u8]) {
        into.fill(0);
    }
    fn activate(&self, _features: u64) {
        self.wakeup.wake();
    }
    fn notify(&self) {
        self.wakeup.wake();
    }
}
