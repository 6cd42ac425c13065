//! Requests through io_uring, where the kernel offers it (its module's parameter `enable_uring`).
//!
//! ```text
//!   a program's call on processor n --> queue n: an entry's memory --> its thread --> Filesystem
//!   answer, by any thread: written into the entry's memory --> Finished --> the thread: commit, and fetch the next
//! ```
//! A queue's thread stays on the queue's processor: it and the program whose call it answers take turns there, and neither has
//! to wake another processor for the other. One system call hands over all answers that wait and takes all requests that came.
//! Data of writes lies in memory that a device can write from, and what is read is sent from where the device has put it: nothing is copied here. What the kernel
//! says without a request, and interrupts, still come through `/dev/fuse`.
//!
//! **Invariant:** entries are free for further requests, however many wait to be answered: a call that waits must not stand in
//! the way of the one that it waits for (F2, F9). The kernel gives a waiting request to an entry that was free before; so there
//! are always many.
#![expect(unsafe_code, reason = "the ring takes raw pointers; entries keep the memory behind them alive")]

mod finished;
mod memory;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};

use io_uring::squeue::{Entry as Sqe, Entry128};
use io_uring::{IoUring, cqueue, opcode, types};
use rustix::thread::CpuSet;
use zerocopy::{FromBytes, IntoBytes};

use self::finished::{Answered, Finished};
use self::memory::EntryMemory;
use super::abi::{InHeader, RingCommand, RingHeaders, opcode::WRITE, ring};
use super::channel::Channel;
use super::reply::Reply;
use super::request::{Header, parse_parts, parse_write};
use super::session::{Filesystem, dispatch};

pub(super) use self::finished::Entry;

/// User data of the poll on the bell; entries count from 0.
const WAKE: u64 = u64::MAX;
/// Indexes in the ring's file table.
const DEVICE: types::Fixed = types::Fixed(0);
const BELL: types::Fixed = types::Fixed(1);
/// Calls that one system call can hand over.
const CALLS: u32 = 256;
/// Entries of a queue that are free, at least: more are made when there are fewer.
const FREE_MIN: usize = 64;
/// So many more are made at once.
const STEP: usize = 64;
/// A queue has at most so many: each is a program that waits.
const ENTRIES_MAX: usize = 16 << 10;

/// Queues that are ready to be opened, one for each processor that there may be.
pub(super) struct Rings<F> {
    queues: Vec<(Sender<Arc<F>>, JoinHandle<()>)>,
}

impl<F: Filesystem + 'static> Rings<F> {
    /// Makes everything that can fail: once the kernel was told, it waits for every queue.
    pub(super) fn prepare(device: &Channel) -> io::Result<Self> {
        let processors = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
        let count = count_listed(&processors).ok_or(io::ErrorKind::InvalidData)?;
        // What the queues' threads start does not stay where they do. A second mount of the process finds it so.
        drop(threads::start_apart());
        let queues = (0..count).map(|number| prepare_queue(device, number)).collect::<io::Result<_>>()?;
        Ok(Self { queues })
    }

    /// Requests come from now on. Gives the threads, which end with the connection.
    pub(super) fn start(self, filesystem: &Arc<F>) -> Vec<JoinHandle<()>> {
        let start = |(start, thread): (Sender<Arc<F>>, JoinHandle<()>)| {
            start.send(Arc::clone(filesystem)).expect("the thread waits for it");
            thread
        };
        self.queues.into_iter().map(start).collect()
    }
}

/// Keeps the calling thread on a processor, if the program may use that one.
fn stay_on(processor: usize) {
    let usable = |all: &CpuSet| processor < CpuSet::MAX_CPU && all.is_set(processor);
    if rustix::thread::sched_getaffinity(None).is_ok_and(|all| usable(&all)) {
        let mut this = CpuSet::new();
        this.set(processor);
        if let Err(error) = rustix::thread::sched_setaffinity(None, &this) {
            tracing::debug!(processor, %error, "a queue's thread goes where the system puts it");
        }
    }
}

/// The numbers in a list such as `0-3,6`.
fn count_listed(list: &str) -> Option<u16> {
    let part = |part: &str| -> Option<u16> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    list.trim().split(',').map(part).sum()
}

fn prepare_queue<F: Filesystem + 'static>(
    device: &Channel,
    number: u16,
) -> io::Result<(Sender<Arc<F>>, JoinHandle<()>)> {
    let device = device.as_fd().try_clone_to_owned()?;
    let (start, started) = channel();
    let (tell, told) = sync_channel(1);
    // The ring belongs to the thread that made it (SINGLE_ISSUER), so it is made there.
    let thread = Builder::new().name(format!("fuse-ring-{number}")).spawn(move || {
        match Queue::new(device, number) {
            Ok(queue) => {
                drop(tell.send(Ok(())));
                queue.wait_and_run(&started);
            }
            Err(error) => drop(tell.send(Err(error))),
        }
    })?;
    told.recv().unwrap_or_else(|_| Err(io::Error::other("the thread ended")))?;
    Ok((start, thread))
}

/// The state of a queue's thread.
struct Queue {
    ring: IoUring<Entry128>,
    number: u16,
    _device: OwnedFd,
    finished: Arc<Finished>,
    entries: Vec<Arc<EntryMemory>>,
    /// Entries that the kernel has.
    free: usize,
    bell_armed: bool,
    /// The kernel takes no more entries.
    full: bool,
    /// The connection has ended.
    ended: bool,
    answered: Vec<Answered>,
    /// What came with a request, while that is looked at.
    scratch: Vec<u8>,
}

impl Queue {
    fn new(device: OwnedFd, number: u16) -> io::Result<Self> {
        let mut wanted = IoUring::<Entry128>::builder();
        wanted.setup_single_issuer().setup_defer_taskrun().setup_submit_all().dontfork();
        let ring = wanted.build(CALLS)?;
        let finished = Arc::new(Finished::new()?);
        ring.submitter().register_files(&[device.as_raw_fd(), finished.bell().as_raw_fd()])?;
        let entries = (0..FREE_MIN + STEP).map(|_| EntryMemory::new().map(Arc::new));
        Ok(Self {
            ring,
            number,
            _device: device,
            finished,
            entries: entries.collect::<io::Result<_>>()?,
            free: 0,
            bell_armed: false,
            full: false,
            ended: false,
            answered: Vec::new(),
            scratch: Vec::new(),
        })
    }

    fn wait_and_run<F: Filesystem>(mut self, started: &Receiver<Arc<F>>) {
        // Without a start the handshake has failed.
        let Ok(filesystem) = started.recv() else { return };
        stay_on(self.number.into());
        (0..self.entries.len()).for_each(|number| self.register(number));
        while !self.is_over() {
            self.grow();
            self.arm_bell();
            self.commit();
            if let Err(error) = self.enter() {
                return tracing::error!(queue = self.number, %error, "a queue of the mount failed: its calls hang");
            }
            self.finished.awake();
            self.reap(&*filesystem);
        }
    }

    /// Nothing can come any more. What is still being answered is of no interest to anybody then.
    fn is_over(&self) -> bool {
        self.ended && self.free == 0
    }

    fn register(&mut self, number: usize) {
        let (address, len) = self.entries[number].parts();
        let call = self.call(ring::REGISTER, 0).addr(Some(address)).build();
        self.push(with_length(call, len), number as u64);
        self.free += 1;
    }

    /// Makes entries when few are free.
    fn grow(&mut self) {
        if self.free >= FREE_MIN || self.full || self.ended || self.entries.len() >= ENTRIES_MAX {
            return;
        }
        for _ in 0..STEP {
            match EntryMemory::new() {
                Ok(memory) => {
                    self.entries.push(Arc::new(memory));
                    self.register(self.entries.len() - 1);
                }
                Err(error) => {
                    self.full = true;
                    return tracing::warn!(%error, "no memory for further calls of the mount at once");
                }
            }
        }
    }

    fn arm_bell(&mut self) {
        if !self.bell_armed {
            let poll = opcode::PollAdd::new(BELL, libc::POLLIN as u32).multi(true).build();
            self.push(poll.into(), WAKE);
            self.bell_armed = true;
        }
    }

    /// Tells the kernel all answers, and makes their entries free.
    fn commit(&mut self) {
        let mut answered = std::mem::take(&mut self.answered);
        self.finished.take(&mut answered);
        if self.ended {
            // The kernel wants no answers any more, and has taken the entries away.
            answered.clear();
        }
        for Answered { number, unique } in answered.drain(..) {
            let call = self.call(ring::COMMIT_AND_FETCH, unique).build();
            self.push(call, u64::from(number));
            self.free += 1;
        }
        self.answered = answered;
    }

    fn call(&self, command: u32, commit_id: u64) -> opcode::UringCmd80 {
        let what = RingCommand { flags: 0, commit_id, queue: self.number, _pad: [0; 6] };
        let mut bytes = [0; 80];
        bytes[..size_of::<RingCommand>()].copy_from_slice(what.as_bytes());
        opcode::UringCmd80::new(DEVICE, command).cmd(bytes)
    }

    fn push(&mut self, call: Entry128, user_data: u64) {
        let call = call.user_data(user_data);
        // SAFETY: the memory that an entry points to is held in `entries` until the kernel has given all of them back.
        while unsafe { self.ring.submission().push(&call) }.is_err() {
            // The queue of calls is full. If this fails, the next one to wait for something tells.
            drop(self.ring.submit());
        }
    }

    /// Hands over all calls and waits until something has come.
    fn enter(&mut self) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            // Interrupted, or short of memory for a moment.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn reap<F: Filesystem>(&mut self, filesystem: &F) {
        let came: Vec<_> =
            self.ring.completion().map(|entry| (entry.user_data(), entry.result(), entry.flags())).collect();
        for (user_data, result, flags) in came {
            match u32::try_from(user_data) {
                Ok(number) => {
                    self.free -= 1;
                    self.returned(filesystem, number, result);
                }
                Err(_) => self.bell_armed = cqueue::more(flags),
            }
        }
    }

    /// The kernel has given an entry back.
    fn returned<F: Filesystem>(&mut self, filesystem: &F, number: u32, result: i32) {
        match -result {
            errno if errno <= 0 => self.arrived(filesystem, number),
            libc::ENOTCONN | libc::ECONNABORTED | libc::ECANCELED | libc::ENODEV => self.ended = true,
            errno => {
                let error = io::Error::from_raw_os_error(errno);
                tracing::error!(queue = self.number, %error, "the kernel does not take an entry of a mount's ring");
                self.full = true;
                // A ring that it refused from the start is no ring: it sends requests through the device then.
                self.ended |= self.free == 0;
            }
        }
    }

    fn arrived<F: Filesystem>(&mut self, filesystem: &F, number: u32) {
        let memory = Arc::clone(&self.entries[number as usize]);
        let headers = memory.headers();
        let raw = InHeader::read_from_prefix(&headers.in_out).expect("larger than the header").0;
        let header = Header::of(&raw);
        let payload = memory.payload();
        let entry = Entry { memory, number, finished: Arc::clone(&self.finished) };
        let reply = Reply::of_entry(entry, &header);
        let mut scratch = std::mem::take(&mut self.scratch);
        let op = if raw.opcode == WRITE {
            parse_write(&headers.fixed, &payload)
        } else {
            // An answer may take the payload's place while the request is still looked at.
            scratch.resize(payload_bytes(&headers, payload.len()), 0);
            payload.copy_to(&mut scratch);
            parse_parts(&raw, &headers.fixed, &scratch)
        };
        match op {
            Some(op) => dispatch(filesystem, header, op, reply),
            None => {
                tracing::error!(?header, "a request of the kernel makes no sense");
                reply.error(libc::EINVAL);
            }
        }
        self.scratch = scratch;
    }
}

fn payload_bytes(headers: &RingHeaders, most: usize) -> usize {
    usize::try_from(headers.entry.payload_bytes).map_or(most, |len| len.min(most))
}

/// The call with its length, for which the library has no setter.
fn with_length(call: Entry128, len: u32) -> Entry128 {
    /// Of `len` in `struct io_uring_sqe`.
    const LEN_AT: usize = 24;
    const _: () = assert!(size_of::<Sqe>() == 64 && size_of::<Entry128>() == 128);
    let mut call = call;
    // SAFETY: the entry is the kernel's structure of 128 bytes, in which `len` lies at this place.
    unsafe { std::ptr::from_mut(&mut call).cast::<u8>().add(LEN_AT).cast::<u32>().write_unaligned(len) };
    call
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_counted_as_the_kernel_lists_them() {
        assert_eq!(count_listed("0-1\n"), Some(2));
        assert_eq!(count_listed("0"), Some(1));
        assert_eq!(count_listed("0-3,8,10-11\n"), Some(7));
        assert_eq!(count_listed("3-1"), None);
        assert_eq!(count_listed("none"), None);
    }

    #[test]
    fn a_thread_stays_on_its_processor_and_what_it_starts_does_not() {
        let processors = || rustix::thread::sched_getaffinity(None).expect("a thread has processors");
        let all = processors();
        let first = (0..CpuSet::MAX_CPU).find(|processor| all.is_set(*processor)).expect("at least one");
        drop(threads::start_apart());
        let queue = Builder::new().spawn(move || {
            // One that there is not changes nothing.
            stay_on(CpuSet::MAX_CPU);
            assert_eq!(processors().count(), all.count());
            stay_on(first);
            let own = processors();
            assert!(own.count() == 1 && own.is_set(first));
            let (tell, told) = channel();
            let started = move || tell.send(processors()).expect("it is heard");
            drop(threads::spawn(threads::Kind::Tasks, Builder::new(), started).expect("a thread"));
            assert_eq!(told.recv().expect("it runs").count(), all.count());
        });
        queue.expect("a thread").join().expect("no panic");
    }
}
