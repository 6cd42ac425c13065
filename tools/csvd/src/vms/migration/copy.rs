//! The memory of a live move, by its source: passes over RAM while the guest runs, and the rest when it is halted.
//!
//! ```text
//!   hv: take the written pages of a part --> split by chunk --> lane 0: thread, TLS stream -->
//!                                                           --> lane 1: thread, TLS stream -->  target
//!   after a pass: Precopy decides: again, hold the guest back, halt, or give up
//! ```
//! RAM is read through the memfd of the `hv` process: it is encrypted from where it is, by this process, which has the keys.
//! **Invariant:** a page's bit is taken before the page is read (H4).

use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hv::{GuestRam, PAGE_BYTES};
use migrator::protocol::Move;
use migrator::stream::{CHUNK_PAGES, Opening, Pages, REMEMBERED_BYTES_MAX, STREAMS_MAX, Sent, stream_of};
use migrator::{Pass, Precopy, SaveFigures, Verdict};
use tokio_util::sync::CancellationToken;

use super::facts;
use super::lane::Lane;
use super::progress::Progress;
use crate::core::Core;
use crate::vms::control::Session;
use crate::vms::runner::Runner;

/// Pages whose bits are taken in one request: 64 MiB. Small, so that they are taken right before they are read.
const PART_PAGES: u64 = 16_384;
/// Of a halted guest nothing changes any more: as many as fit into one answer.
const PART_PAGES_HALTED: u64 = 16 << 20;
const WORD_BITS: u64 = 64;
/// A stream on which nothing moves for so long is broken.
const STALLED_AFTER: Duration = Duration::from_secs(10);
/// Of the memory that the node could give to programs, a move remembers at most one part in so many of what it has sent.
const REMEMBERED_PART: u64 = 8;
/// What may be added to the largest blackout before the guest goes on here instead.
const GRACE: Duration = Duration::from_secs(1);

/// The memory of one move.
pub(super) struct Copy {
    ram: GuestRam,
    session: Session,
    lanes: Vec<Lane>,
    precopy: Precopy,
    blackout_max: Duration,
    progress: Arc<Progress>,
}

impl Copy {
    /// Connects to the target and begins to note what the guest writes. `takes_deltas`: the target takes pages as differences.
    pub(super) async fn begin(
        core: &Arc<Core>,
        runner: &Runner,
        of: &Move,
        blackout_max: Duration,
        takes_deltas: bool,
        progress: Arc<Progress>,
    ) -> Result<Self, String> {
        let session = runner.control().session().await.map_err(|error| error.message)?;
        let ram = ram_of(runner.pid, &session).await?;
        let streams = streams();
        let remembered = if takes_deltas { remembered_bytes() / u64::from(streams) } else { 0 };
        let mut lanes = Vec::new();
        for stream in 0..streams {
            let opened = core.mesh.open_stream(of.to.0).await.map_err(|error| error.explain())?;
            let opening = Opening { of: of.clone(), stream, streams };
            let lane = Lane::start(opened, opening, ram.clone(), remembered);
            lanes.push(lane.map_err(|error| error.to_string())?);
        }
        session.track(true).await.map_err(|error| error.message)?;
        let blackout_us = u64::try_from(blackout_max.as_micros()).unwrap_or(u64::MAX);
        let precopy = Precopy::new(blackout_us, core.vms.moves.overhead_us());
        Ok(Self { ram, session, lanes, precopy, blackout_max, progress })
    }

    /// Passes over RAM until little is left. The guest runs all the time.
    pub(super) async fn run(&mut self, cancel: &CancellationToken) -> Result<(), String> {
        tokio::select! {
            done = self.passes() => done,
            () = cancel.cancelled() => Err("it was cancelled".to_owned()),
        }
    }

    async fn passes(&mut self) -> Result<(), String> {
        if let Some(why) = self.precopy.hopeless() {
            return Err(why);
        }
        let mut first = true;
        // Everything is sent in the first pass; the bits must have been fetched to be taken.
        self.fetch().await?;
        loop {
            let pass = self.pass(first).await?;
            first = false;
            let verdict = self.precopy.after(pass);
            self.progress.passed(&self.precopy, pass.left_bytes);
            tracing::debug!(?pass, ?verdict, "pass over the memory of a VM");
            match verdict {
                Verdict::Again { throttle } => self.hold_back(throttle).await?,
                Verdict::Halt => return Ok(()),
                Verdict::GiveUp(why) => return Err(why),
            }
        }
    }

    async fn pass(&mut self, first: bool) -> Result<Pass, String> {
        let begun = now();
        let touched = if first { Some(touched_pages(&self.ram)?) } else { None };
        let before = self.sent();
        self.send_parts(PART_PAGES, touched.as_deref()).await?;
        for lane in &self.lanes {
            lane.settle(STALLED_AFTER).await?;
        }
        let took_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        let sent = self.sent();
        Ok(Pass {
            sent_bytes: sent.bytes - before.bytes,
            page_bytes: sent.page_bytes - before.page_bytes,
            took_us,
            left_bytes: self.fetch().await? * PAGE_BYTES,
        })
    }

    /// Takes and sends all written pages, part by part; with `touched` those instead, to a target that has nothing yet.
    async fn send_parts(&self, part_pages: u64, touched: Option<&[u64]>) -> Result<(), String> {
        for (first, pages) in parts(&self.ram, part_pages) {
            let taken = self.session.take(first, pages).await.map_err(|error| error.message)?;
            let bits = match touched {
                Some(touched) => words_of(touched, first, pages).to_vec(),
                None => taken,
            };
            self.send_part(first, &bits, touched.is_some()).await?;
        }
        Ok(())
    }

    async fn send_part(&self, first: u64, bits: &[u64], fresh: bool) -> Result<(), String> {
        let words = usize::try_from(CHUNK_PAGES / WORD_BITS).expect("a chunk is small");
        for (chunk, bits) in
            (first..).step_by(usize::try_from(CHUNK_PAGES).expect("as above")).zip(bits.chunks(words))
        {
            if bits.iter().all(|word| *word == 0) {
                continue;
            }
            let lane = &self.lanes[stream_of(chunk, self.streams()) as usize];
            lane.send(Pages { first: chunk, bits: bits.to_vec(), fresh }, STALLED_AFTER).await?;
        }
        Ok(())
    }

    async fn hold_back(&self, percent: u8) -> Result<(), String> {
        self.progress.throttled(percent);
        self.session.hold_back(percent).await.map_err(|error| error.message)
    }

    async fn fetch(&self) -> Result<u64, String> {
        self.session.fetch().await.map_err(|error| error.message)
    }

    /// Halts the guest and sends the rest. When this returns well, the target has everything.
    pub(super) async fn halt(&mut self) -> Result<SaveFigures, String> {
        let pages = self.ram.bytes() / PAGE_BYTES;
        let halted = self.session.halt(pages).await.map_err(|error| error.message)?;
        let begun = now();
        tracing::debug!(drain_ms = halted.drain_ms, state_ms = halted.state_ms, "guest halted for its move");
        let limit = self.blackout_max + GRACE;
        let rest = self.send_rest(&halted.rest, halted.state);
        match tokio::time::timeout(limit, rest).await {
            Ok(sent) => sent?,
            Err(_) => {
                return Err(format!(
                    "the rest of the memory did not arrive within {} ms: the link has become slower",
                    limit.as_millis()
                ));
            }
        }
        let sent = self.sent();
        Ok(SaveFigures {
            drain_us: super::us(halted.drain_ms),
            memory_us: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
            state_us: super::us(halted.state_ms),
            rounds: self.precopy.passes(),
            memory_bytes_sent: sent.bytes,
            delta_pages: sent.delta_pages,
            delta_bytes_saved: sent.delta_bytes_saved,
        })
    }

    async fn send_rest(&mut self, rest: &[u64], state: Vec<u8>) -> Result<(), String> {
        if rest.is_empty() {
            self.fetch().await?;
            self.send_parts(PART_PAGES_HALTED, None).await?;
        } else {
            self.send_part(0, rest, false).await?;
        }
        let mut state = Some(state);
        for lane in &self.lanes {
            lane.finish(state.take()).await?;
        }
        for lane in &mut self.lanes {
            lane.answered().await?;
        }
        Ok(())
    }

    fn sent(&self) -> Sent {
        self.lanes.iter().map(Lane::sent).sum()
    }

    fn streams(&self) -> u32 {
        u32::try_from(self.lanes.len()).expect("bounded when they were opened")
    }
}

/// First page and number of pages of each part; none goes over the end of a piece of RAM.
fn parts(ram: &GuestRam, part_pages: u64) -> Vec<(u64, u64)> {
    let mut parts = Vec::new();
    let mut first = 0;
    for region in ram.regions() {
        let end = first + region.bytes / PAGE_BYTES;
        while first < end {
            let pages = part_pages.min(end - first);
            parts.push((first, pages));
            first += pages;
        }
    }
    parts
}

/// As many as there are cores: each has a thread that encrypts.
fn streams() -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u32::try_from(cores).unwrap_or(1).clamp(1, STREAMS_MAX / 2)
}

/// What all streams of a move may remember.
fn remembered_bytes() -> u64 {
    REMEMBERED_BYTES_MAX.min(facts::memory_available_bytes() / REMEMBERED_PART)
}

/// The RAM of another process: by the memfd that it names, seen through its table of descriptors.
pub(super) async fn ram_of(pid: u32, session: &Session) -> Result<GuestRam, String> {
    let named = session.ram().await.map_err(|error| error.message)?;
    let path = format!("/proc/{pid}/fd/{}", named.descriptor);
    let failed =
        |error: &dyn std::fmt::Display| format!("the memory of the VM's process cannot be reached: {error}");
    let file: File = OpenOptions::new().read(true).write(true).open(&path).map_err(|error| failed(&error))?;
    // The process has said which file it is: whatever else the number may lead to is refused.
    if file.metadata().map_err(|error| failed(&error))?.ino() != named.inode {
        return Err(failed(&"it has changed"));
    }
    GuestRam::of_file(file, named.bytes).map_err(|error| failed(&error))
}

/// The pages that were ever touched, a bit each: all others are zeros here, and at the target.
fn touched_pages(ram: &GuestRam) -> Result<Vec<u64>, String> {
    let words = (ram.bytes() / PAGE_BYTES).div_ceil(WORD_BITS);
    let mut bits = vec![0; usize::try_from(words).expect("fewer words than bytes of RAM")];
    for (start, end) in ram.touched_ranges().map_err(|error| error.to_string())? {
        for page in start / PAGE_BYTES..end.div_ceil(PAGE_BYTES) {
            bits[usize::try_from(page / WORD_BITS).expect("as above")] |= 1 << (page % WORD_BITS);
        }
    }
    Ok(bits)
}

fn words_of(bits: &[u64], first: u64, pages: u64) -> &[u64] {
    let word = |page: u64| usize::try_from(page.div_ceil(WORD_BITS)).expect("inside of the bitmap");
    &bits[word(first)..word(first + pages)]
}

#[expect(clippy::disallowed_methods, reason = "measures the passes that the next decision rests on")]
fn now() -> Instant {
    Instant::now()
}
