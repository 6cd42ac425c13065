//! The io_uring engine: one thread with its own ring per device.
//!
//! ```text
//!   submitters -> Intake --(eventfd, only when the thread sleeps)--> I/O thread: push entries, enter, reap, complete
//! ```
//!
//! One `io_uring_enter` submits all that waits and sleeps for the next completion, so the calls per request fall as the
//! load grows. Requests that completions submit are found without any wake-up.
//!
//! Calls are collected and put into the ring as the last thing before the system call, after their right was asked (B3).
//!
//! **Invariant:** an entry's memory is held in its slot until its completion was reaped.
#![expect(unsafe_code, reason = "the ring takes raw pointers; the slots keep the memory behind them alive")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{Builder, JoinHandle};

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use threads::Kind;

use crate::file::Target;
use crate::job::{Call, Job};
use crate::queue::{Intake, Pushed};
use crate::{IoError, Permission};

/// User data of the poll on the eventfd; slots count from 0.
const WAKE: u64 = u64::MAX;
/// Index of the device in the ring's file table.
const DEVICE: types::Fixed = types::Fixed(0);
/// Index of the eventfd.
const BELL: types::Fixed = types::Fixed(1);
/// All that is ever put into a ring.
const OPCODES: [u8; 5] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
];

/// A running I/O thread.
pub(crate) struct Uring {
    intake: Arc<Intake<Job>>,
    bell: Arc<OwnedFd>,
    /// Jobs wait for their right: a change of it must wake the thread.
    waiting: Arc<AtomicBool>,
    target: Arc<Target>,
    thread: Option<JoinHandle<()>>,
}

impl Uring {
    /// Starts the thread with a ring for `depth` requests in flight. Fails when the system refuses the ring.
    pub(crate) fn start(name: &str, depth: u32, target: &Arc<Target>) -> io::Result<Self> {
        let intake = Intake::new();
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let bell = Arc::new(rustix::event::eventfd(0, flags)?);
        let waiting = Arc::new(AtomicBool::new(false));
        let (tell, told) = mpsc::sync_channel(1);
        let thread = {
            let (intake, bell, target) = (Arc::clone(&intake), Arc::clone(&bell), Arc::clone(target));
            let waiting = Arc::clone(&waiting);
            // The ring belongs to the thread that made it (SINGLE_ISSUER), so it is made there.
            threads::spawn_free(Builder::new().name(name.to_owned()), move || {
                let opened = open_ring(depth, &target, &bell);
                match opened.and_then(|ring| threads::confine(Kind::Ring).map(|()| ring)) {
                    Ok(ring) => {
                        drop(tell.send(Ok(())));
                        Engine::new(ring, intake, target, waiting).run();
                    }
                    Err(error) => drop(tell.send(Err(error))),
                }
            })?
        };
        let opened = told.recv().unwrap_or_else(|_| Err(io::Error::other("the I/O thread ended")));
        opened.map(|()| Self { intake, bell, waiting, target: Arc::clone(target), thread: Some(thread) })
    }

    pub(crate) fn push(&self, job: Job) {
        match self.intake.push(job) {
            Ok(Pushed::Seen) => {}
            Ok(Pushed::Wake) => self.ring_bell(),
            Err(job) => job.finish(&self.target, Err(IoError::Closed)),
        }
    }

    /// Whether the ring has failed: nothing is taken any more.
    pub(crate) fn has_failed(&self) -> bool {
        self.intake.is_closed()
    }

    /// Wakes the thread if it has jobs that wait for their right.
    pub(crate) fn rights_changed(&self) {
        if self.waiting.load(Ordering::SeqCst) {
            self.ring_bell();
        }
    }

    #[expect(clippy::host_endian_bytes, reason = "an eventfd takes a number in the machine's own order")]
    fn ring_bell(&self) {
        // The counter cannot overflow before 2^64 wake-ups, which is the only way this write can fail.
        let rung = rustix::io::write(self.bell.as_fd(), &1_u64.to_ne_bytes());
        debug_assert!(rung.is_ok(), "eventfd: {rung:?}");
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.intake.close();
        self.ring_bell();
        // The last handle may go inside a completion, on the I/O thread itself.
        if let Some(thread) = self.thread.take()
            && !self.intake.served_here()
        {
            drop(thread.join());
        }
    }
}

fn open_ring(depth: u32, target: &Target, bell: &OwnedFd) -> io::Result<IoUring> {
    let entries = depth.clamp(8, 4096).next_power_of_two();
    let mut wanted = IoUring::builder();
    wanted.setup_single_issuer().setup_defer_taskrun().setup_submit_all().setup_r_disabled().dontfork();
    let ring = match wanted.build(entries) {
        // Kernels before 6.1 do not know the flags.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().setup_r_disabled().dontfork().build(entries)?
        }
        other => other?,
    };
    ring.submitter().register_files(&[target.fd.as_raw_fd(), bell.as_raw_fd()])?;
    restrict(&ring)?;
    Ok(ring)
}

/// Lets the ring do what [`entry`] and the bell ask for, with the two files of its table, and nothing else for as long as it
/// lives: what a ring does is no system call, so a filter of those would not see it.
fn restrict(ring: &IoUring) -> io::Result<()> {
    let own_files = Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits());
    let mut allowed: Vec<_> = OPCODES.map(Restriction::sqe_op).into_iter().chain([own_files]).collect();
    ring.submitter().register_restrictions(&mut allowed)?;
    ring.submitter().register_enable_rings()
}

/// State of the I/O thread.
struct Engine {
    ring: IoUring,
    intake: Arc<Intake<Job>>,
    target: Arc<Target>,
    /// Taken from the intake, not yet in the ring.
    ready: VecDeque<Job>,
    slots: Vec<Option<Job>>,
    free: Vec<usize>,
    /// Slots whose job needs a further call.
    again: Vec<usize>,
    /// Calls to be made next, with their slots.
    staged: Vec<(usize, Call)>,
    waiting: Arc<AtomicBool>,
    reaped: Vec<(u64, i32, u32)>,
    bell_armed: bool,
}

impl Engine {
    fn new(ring: IoUring, intake: Arc<Intake<Job>>, target: Arc<Target>, waiting: Arc<AtomicBool>) -> Self {
        // One entry of the submission queue stays free for the poll on the bell.
        let slots = ring.params().sq_entries() as usize - 1;
        Self {
            ring,
            intake,
            target,
            ready: VecDeque::new(),
            slots: std::iter::repeat_with(|| None).take(slots).collect(),
            free: (0..slots).rev().collect(),
            again: Vec::new(),
            staged: Vec::new(),
            waiting,
            reaped: Vec::new(),
            bell_armed: false,
        }
    }

    fn run(mut self) {
        self.intake.serve_here();
        loop {
            self.arm_bell();
            let mut progressed = self.go_on();
            // A full ring takes nothing new and is woken by its own completions.
            let room = self.free.len();
            let closed = self.intake.take(&mut self.ready, room, room > 0 && !progressed);
            let took = !self.ready.is_empty();
            progressed |= self.issue();
            progressed |= self.submit_staged(closed);
            // Who took something has not said that it goes to sleep, because a completion will wake it. Not so when all that
            // was taken waits for its right: then it must look once more, and say so.
            progressed |= took && self.in_ring() == 0;
            let idle = self.free.len() == self.slots.len() && self.ready.is_empty();
            if closed && idle {
                return;
            }
            if let Err(error) = self.enter(!progressed) {
                return self.give_up(&error);
            }
            self.reap();
        }
    }

    /// Calls that the kernel has.
    fn in_ring(&self) -> usize {
        self.slots.len() - self.free.len() - self.staged.len()
    }

    fn arm_bell(&mut self) {
        if !self.bell_armed {
            let poll = opcode::PollAdd::new(BELL, libc::POLLIN as u32).multi(true).build().user_data(WAKE);
            self.enqueue(&poll);
            self.bell_armed = true;
        }
    }

    /// Issues the further calls of jobs that need them. Tells whether a job ended without one: then its completion may
    /// have left work to do, and waiting would be wrong.
    fn go_on(&mut self) -> bool {
        let mut ended = false;
        while let Some(slot) = self.again.pop() {
            let job = self.slots[slot].take().expect("a job that goes on has its slot");
            ended |= self.issue_one(job, slot);
        }
        ended
    }

    /// Issues the first calls of what was taken. Tells as [`Self::go_on`].
    fn issue(&mut self) -> bool {
        let mut ended = false;
        while let Some(slot) = self.free.pop() {
            let Some(job) = self.ready.pop_front() else {
                self.free.push(slot);
                break;
            };
            ended |= self.issue_one(job, slot);
        }
        ended
    }

    fn issue_one(&mut self, job: Job, slot: usize) -> bool {
        match job.call() {
            Ok(call) => {
                self.slots[slot] = Some(job);
                self.staged.push((slot, call));
                false
            }
            Err(outcome) => self.end(job, slot, outcome),
        }
    }

    fn end(&mut self, job: Job, slot: usize, outcome: Result<(), IoError>) -> bool {
        self.free.push(slot);
        job.finish(&self.target, outcome);
        true
    }

    /// Puts into the ring whose right is granted at this moment: nothing but the system call comes after it. Tells as
    /// [`Self::go_on`].
    fn submit_staged(&mut self, closed: bool) -> bool {
        let (mut ended, mut waits) = (false, false);
        let staged = std::mem::take(&mut self.staged);
        for (slot, call) in staged {
            let job = self.slots[slot].take().expect("a staged job has its slot");
            match self.permission(&job) {
                Permission::Granted => {
                    self.slots[slot] = Some(job);
                    self.enqueue(&entry(call).user_data(slot as u64));
                }
                Permission::Wait if closed => ended |= self.end(job, slot, Err(IoError::Closed)),
                Permission::Wait => {
                    self.slots[slot] = Some(job);
                    self.staged.push((slot, call));
                    waits = true;
                }
                Permission::Revoked(reason) => {
                    ended |= self.end(job, slot, Err(IoError::NotPermitted { reason }));
                }
            }
        }
        if !waits {
            self.waiting.store(false, Ordering::Relaxed);
        }
        ended
    }

    /// A job that waits is asked a second time, after whoever changes the right can see that it must wake this thread.
    fn permission(&self, job: &Job) -> Permission {
        match job.permission() {
            Permission::Wait => {
                self.waiting.store(true, Ordering::SeqCst);
                job.permission()
            }
            known => known,
        }
    }

    fn enqueue(&mut self, entry: &squeue::Entry) {
        // SAFETY: the memory an entry points to is held by the job in its slot until the completion was reaped.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("the ring has an entry for every slot and one for the bell");
    }

    fn enter(&mut self, wait: bool) -> io::Result<()> {
        match self.ring.submit_and_wait(usize::from(wait)) {
            Ok(_) => Ok(()),
            // Interrupted, or short of memory for a moment: what was reaped so far makes room.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn reap(&mut self) {
        let mut reaped = std::mem::take(&mut self.reaped);
        reaped.extend(self.ring.completion().map(|entry| (entry.user_data(), entry.result(), entry.flags())));
        for (user_data, result, flags) in reaped.drain(..) {
            match usize::try_from(user_data) {
                Ok(slot) if user_data != WAKE => self.returned(slot, result),
                _ => self.bell_armed = cqueue::more(flags),
            }
        }
        self.reaped = reaped;
    }

    fn returned(&mut self, slot: usize, result: i32) {
        let mut job = self.slots[slot].take().expect("the ring completes only what was issued");
        match job.returned(&self.target, result) {
            Some(outcome) => {
                self.free.push(slot);
                job.finish(&self.target, outcome);
            }
            None => {
                self.slots[slot] = Some(job);
                self.again.push(slot);
            }
        }
    }

    /// The ring itself failed. What is in flight may still write to its memory, so that memory is never freed.
    fn give_up(mut self, error: &io::Error) {
        tracing::error!(device = %self.target.path.display(), %error, "io_uring failed: the device is closed");
        self.intake.close();
        for job in self.slots.iter_mut().filter_map(Option::take) {
            let (done, memory) = job.abandon();
            std::mem::forget(memory);
            done(Err(IoError::Closed));
        }
        self.intake.take(&mut self.ready, usize::MAX, false);
        for job in self.ready.drain(..) {
            job.finish(&self.target, Err(IoError::Closed));
        }
    }
}

fn entry(call: Call) -> squeue::Entry {
    match call {
        Call::Read { into, len, offset } => opcode::Read::new(DEVICE, into, len).offset(offset).build(),
        Call::Write { from, len, offset, durable } => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            opcode::Write::new(DEVICE, from, len).offset(offset).rw_flags(flags).build()
        }
        Call::Sync => opcode::Fsync::new(DEVICE).flags(types::FsyncFlags::DATASYNC).build(),
        Call::Fallocate { mode, offset, len } => {
            opcode::Fallocate::new(DEVICE, len).offset(offset).mode(mode).build()
        }
        Call::DiscardBlocks { .. } => unreachable!("the device sends this to its slow lane"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel answers to `entry`.
    fn outcome(ring: &mut IoUring, entry: &squeue::Entry) -> i32 {
        // SAFETY: none of the entries below points to memory.
        unsafe { ring.submission().push(entry) }.expect("it is empty");
        ring.submit_and_wait(1).expect("the kernel takes it");
        ring.completion().next().expect("waited for").result()
    }

    #[test]
    fn a_ring_does_what_a_device_needs_on_its_own_files_and_nothing_else() {
        let (_folder, target) = crate::file::tests::target(1 << 20);
        let bell = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("an eventfd");
        let mut ring = open_ring(8, &target, &bell).expect("this system has io_uring");
        let sync = opcode::Fsync::new(DEVICE).flags(types::FsyncFlags::DATASYNC).build();
        assert_eq!(outcome(&mut ring, &sync), 0);
        let grow = opcode::Fallocate::new(DEVICE, 4096).offset(0).mode(0).build();
        assert_eq!(outcome(&mut ring, &grow), 0);

        let other_file = opcode::Fsync::new(types::Fd(bell.as_raw_fd())).build();
        let other_call = opcode::Close::new(types::Fd(bell.as_raw_fd())).build();
        let other_call_here = opcode::Fadvise::new(DEVICE, 4096, 0).build();
        for refused in [other_file, other_call, other_call_here] {
            assert_eq!(outcome(&mut ring, &refused), -libc::EACCES, "{refused:?}");
        }
        let more = ring.submitter().register_eventfd(bell.as_raw_fd()).expect_err("no more files either");
        assert_eq!(more.raw_os_error(), Some(libc::EACCES));
    }
}
