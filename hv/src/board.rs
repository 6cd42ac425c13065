//! The board: every device in its place, with its interrupt line and its thread.
//!
//! ```text
//!   slot 0 .. 7     disks; those without a medium are empty, and can be filled while the guest runs
//!   slot 8          network, when the VM has one          slot 9   random numbers          slot 10   balloon
//! ```
//! Slots are the same in every VM, so a saved state always finds its devices. **Invariant:** a device's place depends on its
//! slot only, never on what else there is.

use std::fs::File;
use std::sync::Arc;

use blockio::BlockDevice;

use crate::DISKS_MAX;
use crate::console::Console;
use crate::devices::bus::{Bus, Other, Place, Slot};
use crate::devices::rtc::Rtc;
use crate::devices::serial::{COM1_LINE, SerialPort};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{Disk, shape_of};
use crate::devices::virtio::mmio::{NOTIFY, Transport};
use crate::devices::virtio::net::Net;
use crate::devices::virtio::queue::DrainTimeout;
use crate::devices::virtio::request::Shape;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::worker::{Wakeup, Worker};
use crate::kvm::{KvmError, Machine, Tried};
use crate::memory::GuestRam;
use crate::state::{self, SavedMachine, StateError};
use crate::vm::{DiskConfig, VmError};

const NET_SLOT: usize = DISKS_MAX;
const RNG_SLOT: usize = DISKS_MAX + 1;
const BALLOON_SLOT: usize = DISKS_MAX + 2;
const NET: &str = "net";
const RNG: &str = "rng";
const BALLOON: &str = "balloon";

/// A network card of a VM.
#[derive(Debug)]
pub struct NetConfig {
    /// A tap that does not block, has virtio headers of 12 bytes, and is open for this process alone.
    pub tap: File,
    /// Address of the card, the same wherever the VM runs.
    pub mac: [u8; 6],
    /// Tells the tap what is taken from it, in flags of `TUNSETOFFLOAD`; nothing where the tap cannot be told. Called by the card's thread.
    pub offload: Option<fn(&File, u32) -> std::io::Result<()>>,
}

/// All devices, and the threads of those that have one.
#[derive(Debug)]
pub(crate) struct Board {
    pub(crate) bus: Arc<Bus>,
    net: Option<Arc<Net>>,
    pub(crate) balloon: Arc<Balloon>,
    ram: GuestRam,
    // Dropped with the board: a device's thread ends before its VM.
    _workers: Vec<Worker>,
}

impl Board {
    pub(crate) fn build(
        machine: &Machine,
        ram: &GuestRam,
        console: &Arc<Console>,
        disks: Vec<DiskConfig>,
        net: Option<NetConfig>,
        devices: u32,
    ) -> Result<Self, VmError> {
        let mut maker = Maker { machine, ram, devices, workers: Vec::new(), others: Vec::new() };
        let slots = maker.disks(disks)?;
        let net = net.map(|config| maker.net(config)).transpose()?;
        maker.rng()?;
        let balloon = maker.balloon()?;
        let serial = SerialPort::new(Arc::clone(console), machine.line(COM1_LINE)?);
        let bus = Arc::new(Bus { serial, rtc: Rtc::default(), slots, others: maker.others });
        Ok(Self { bus, net, balloon, ram: ram.clone(), _workers: maker.workers })
    }

    /// Where its devices are, for the tables of a kernel.
    pub(crate) fn places(&self) -> Vec<Place> {
        let others = self.bus.others.iter().map(|other| other.slot);
        (0..self.bus.slots.len()).chain(others).map(Place::of_slot).collect()
    }

    /// Stops taking requests, and waits for those in flight.
    pub(crate) fn drain(&self) -> Result<(), DrainTimeout> {
        self.devices().try_for_each(|device| device.hold_and_drain())
    }

    /// Lets all devices work, with a look at every queue.
    pub(crate) fn release(&self) {
        self.devices().for_each(|device| device.release());
    }

    /// The guest has arrived from elsewhere: the network is told.
    pub(crate) fn announce(&self) {
        if let Some(net) = &self.net {
            net.announce();
        }
    }

    fn devices(&self) -> impl Iterator<Item = &dyn VirtioDevice> {
        let disks = self.bus.slots.iter().map(|slot| &*slot.disk as &dyn VirtioDevice);
        disks.chain(self.bus.others.iter().map(|other| &*other.device))
    }

    /// Adds the devices to a saved state. They must be drained.
    pub(crate) fn save(&self, machine: &mut SavedMachine) {
        machine.serial = Some(self.bus.serial.save());
        machine.rtc_register = self.bus.rtc.selected().into();
        machine.disks = self.bus.slots.iter().map(save_disk).collect();
        let known = self.bus.others.iter().filter(|other| other.name != BALLOON || self.balloon.is_known());
        machine.devices = known.map(save_other).collect();
    }

    /// Takes over all devices.
    pub(crate) fn restore(&self, saved: &SavedMachine) -> Result<(), VmError> {
        self.bus.serial.restore(state::part(saved.serial.as_ref(), "serial port")?)?;
        self.bus.rtc.select(state::byte(saved.rtc_register)?);
        self.restore_disks(&saved.disks)?;
        for device in &saved.devices {
            let other = self.bus.others.iter().find(|other| other.name == device.name);
            let other = other.ok_or(StateError::Invalid("it has a device that this VM does not have"))?;
            restore_other(other, device, &self.ram)?;
        }
        Ok(())
    }

    /// Empty slots may be missing in a state of an older build; a disk may not.
    fn restore_disks(&self, saved: &[state::Disk]) -> Result<(), VmError> {
        for slot in &self.bus.slots {
            let listed = saved.iter().filter(|disk| disk.slot == slot.disk.slot()).count();
            if listed > 1 || (listed == 0 && slot.disk.lacks_content()) {
                let what = format!("the number of disks in slot {}", slot.disk.slot());
                return Err(StateError::mismatch(what, listed, 1).into());
            }
        }
        saved.iter().try_for_each(|disk| Ok(restore_disk(self.slot(disk.slot)?, disk)?))
    }

    pub(crate) fn slot(&self, slot: u32) -> Result<&Slot, VmError> {
        let index = usize::try_from(slot).unwrap_or(usize::MAX);
        self.bus.slots.get(index).ok_or(VmError::NoDisk(slot))
    }
}

/// What devices are made with.
struct Maker<'a> {
    machine: &'a Machine,
    ram: &'a GuestRam,
    /// Version of the devices.
    devices: u32,
    workers: Vec<Worker>,
    others: Vec<Other>,
}

impl Maker<'_> {
    fn disks(&mut self, configs: Vec<DiskConfig>) -> Result<Vec<Slot>, VmError> {
        let mut by_slot: Vec<Option<DiskConfig>> = (0..DISKS_MAX).map(|_| None).collect();
        for config in configs {
            let slot = config.slot;
            let index = usize::try_from(slot).unwrap_or(usize::MAX);
            let place = by_slot.get_mut(index).ok_or(VmError::NoDisk(slot))?;
            if place.replace(config).is_some() {
                return Err(VmError::SlotTwice(slot));
            }
        }
        (0..).zip(by_slot).map(|(slot, config)| self.disk(slot, config)).collect()
    }

    fn disk(&mut self, slot: u32, config: Option<DiskConfig>) -> Result<Slot, VmError> {
        let place = Place::of_slot(usize::try_from(slot).expect("one of few"));
        let line = self.machine.line(place.line)?;
        let disk = match config {
            None => Disk::empty(slot, self.ram.clone(), line).tried("making a disk slot")?,
            Some(config) => {
                let shape = shape_at_start(config.device.as_ref(), config.read_only);
                let disk =
                    Disk::new(slot, config.serial, shape, self.ram.clone(), line).tried("making a disk")?;
                config.device.map_or(Ok(()), |device| disk.attach(device))?;
                disk
            }
        };
        let disk = Arc::new(disk);
        self.machine.notify_on_write(place.start + NOTIFY, disk.wakeup().event())?;
        let served = Arc::clone(&disk);
        self.start(format!("disk{slot}"), disk.wakeup(), move || served.take_requests())?;
        Ok(Slot { transport: Transport::new(disk.clone(), self.ram.clone(), self.devices), disk })
    }

    fn net(&mut self, config: NetConfig) -> Result<Arc<Net>, VmError> {
        let place = Place::of_slot(NET_SLOT);
        let line = self.machine.line(place.line)?;
        let net = Arc::new(Net::new(config, self.ram.clone(), line).tried("making a network card")?);
        let served = Arc::clone(&net);
        self.other(NET, NET_SLOT, net.clone(), net.wakeup(), move || served.serve())?;
        Ok(net)
    }

    fn rng(&mut self) -> Result<(), VmError> {
        let line = self.machine.line(Place::of_slot(RNG_SLOT).line)?;
        let rng = Arc::new(Rng::new(self.ram.clone(), line).tried("making a source of random numbers")?);
        let served = Arc::clone(&rng);
        self.other(RNG, RNG_SLOT, rng.clone(), rng.wakeup(), move || served.serve())
    }

    fn balloon(&mut self) -> Result<Arc<Balloon>, VmError> {
        let line = self.machine.line(Place::of_slot(BALLOON_SLOT).line)?;
        let balloon = Arc::new(Balloon::new(self.ram.clone(), line).tried("making a balloon")?);
        let served = Arc::clone(&balloon);
        self.other(BALLOON, BALLOON_SLOT, balloon.clone(), balloon.wakeup(), move || served.serve())?;
        Ok(balloon)
    }

    fn other(
        &mut self,
        name: &'static str,
        slot: usize,
        device: Arc<dyn VirtioDevice>,
        wakeup: Arc<Wakeup>,
        work: impl FnMut() -> Option<std::time::Duration> + Send + 'static,
    ) -> Result<(), VmError> {
        self.machine.notify_on_write(Place::of_slot(slot).start + NOTIFY, wakeup.event())?;
        let transport = Transport::new(Arc::clone(&device), self.ram.clone(), self.devices);
        self.others.push(Other { name, slot, device, transport });
        self.start(name.to_owned(), wakeup, work)
    }

    fn start(
        &mut self,
        name: String,
        wakeup: Arc<Wakeup>,
        work: impl FnMut() -> Option<std::time::Duration> + Send + 'static,
    ) -> Result<(), VmError> {
        let worker: Result<Worker, KvmError> =
            Worker::spawn(name, wakeup, work).tried("starting a device's thread");
        self.workers.push(worker?);
        Ok(())
    }
}

fn shape_at_start(device: Option<&Arc<dyn BlockDevice>>, read_only: bool) -> Shape {
    match device {
        Some(device) => shape_of(&device.geometry(), read_only),
        None => Shape { size_bytes: 0, block_bytes: 512, read_only, can_discard: false },
    }
}

fn save_disk(slot: &Slot) -> state::Disk {
    state::Disk { transport: Some(slot.transport.save()), ..slot.disk.save() }
}

fn restore_disk(slot: &Slot, saved: &state::Disk) -> Result<(), StateError> {
    slot.disk.restore(saved)?;
    slot.transport.restore(state::part(saved.transport.as_ref(), "registers of a disk")?)
}

fn save_other(other: &Other) -> state::Device {
    let mut saved = state::Device {
        name: other.name.to_owned(),
        transport: Some(other.transport.save()),
        queues: other.device.queues().iter().map(|queue| queue.save()).collect(),
        identity: other.device.identity(),
        ..state::Device::default()
    };
    other.device.save(&mut saved);
    saved
}

fn restore_other(other: &Other, saved: &state::Device, ram: &GuestRam) -> Result<(), StateError> {
    if saved.identity != other.device.identity() {
        let what = format!("the identity of the device {}", other.name);
        let shown = |bytes: &[u8]| format!("{bytes:02x?}");
        return Err(StateError::mismatch(what, shown(&saved.identity), shown(&other.device.identity())));
    }
    other.device.restore(saved)?;
    let queues = other.device.queues();
    if saved.queues.len() != queues.len() {
        return Err(StateError::mismatch("the number of queues", saved.queues.len(), queues.len()));
    }
    for (queue, saved) in queues.iter().zip(&saved.queues) {
        queue.restore(saved, ram)?;
    }
    other.transport.restore(state::part(saved.transport.as_ref(), "registers of a device")?)
}
