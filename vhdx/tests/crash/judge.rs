//! Builds the images that a power cut could leave, and holds each to the guest's promises.
//!
//! ```text
//! cut -> images: none | all | each small subset, or sampled ones | newest write torn at each sector
//! image -> check -> content -> second reader agrees -> replay into the file -> same -> replay again: nothing to do
//!       -> now and then: its own replay is cut too | its later life shows no leftovers | qemu agrees
//! ```
//! **Invariant:** a verdict names the cut and the choice, which reproduce the image.

use std::sync::Arc;

use blockio::{BlockDevice, Change, Cuts, ImageFile, MemoryDevice, Record, Recorder, Unflushed};
use vhdx::{Defect, LogInfo};

use crate::common::bytes_at;
use crate::foreign::qemu_agrees;
use crate::guest::{Guest, SECTOR, USED, sector_of, stamped};
use crate::stage::{Files, Moments, World, slow};

/// A broken promise, in words.
pub(crate) type Verdict = Result<(), String>;

/// How much is tried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// With so many other changes pending, the newest is tried with every combination of them.
    exhaustive_max: usize,
    /// So many combinations are sampled where there are more.
    samples: u64,
    /// So many places where the newest write may be torn.
    tears_max: usize,
    /// Of every so many images: the replay is cut too.
    replay_every: usize,
    /// Of every so many images: the disk is used further.
    afterlife_every: usize,
    /// Of every so many images: qemu is asked.
    qemu_every: usize,
}

impl Effort {
    /// As much as a CI run has time for, times the environment variable `VHDX_CRASH_EFFORT`.
    pub(crate) fn from_environment() -> Self {
        let factor = std::env::var("VHDX_CRASH_EFFORT").ok().and_then(|text| text.parse().ok());
        Self::times(factor.unwrap_or(1).max(1))
    }

    /// So many times as much as usual.
    pub(crate) fn times(factor: usize) -> Self {
        let every = |count: usize| (count / factor).max(1);
        Self {
            exhaustive_max: (2 + factor).min(8),
            samples: 3 * factor as u64,
            tears_max: 8 * factor,
            replay_every: every(151),
            afterlife_every: every(5),
            qemu_every: every(397),
        }
    }
}

/// What survives of the pending changes.
#[derive(Clone, Copy, Debug)]
enum Choice {
    Of(Unflushed),
    /// Bit n: the nth pending change survives.
    Mask(u64),
    /// Of the newest the first, or all but the first, so many sectors; the others all or not at all.
    TornNewest {
        sectors: usize,
        first: bool,
        others: bool,
    },
    /// Of the first sector of every pending header the first eight bytes, so that each of them is damaged.
    TornHeaders,
}

fn choices(cuts: &Cuts, effort: Effort) -> Vec<Choice> {
    let pending = cuts.pending();
    let mut choices = vec![Choice::Of(Unflushed::None)];
    let Some((newest, others)) = pending.split_last() else { return choices };
    choices.push(Choice::Of(Unflushed::All));
    let seeds = (0..effort.samples).map(|number| cuts.prefix() as u64 * 1_000_003 + number);
    if !matches!(cuts.newest(), Some(Record::Change(_))) {
        choices.extend(seeds.take(1).map(|seed| Choice::Of(Unflushed::Subset { seed })));
        return choices;
    }
    if others.len() <= effort.exhaustive_max {
        // Without the newest they were tried at the cut before.
        let with_newest = 1 << others.len();
        choices.extend((0..with_newest - 1).map(|mask| Choice::Mask(mask | with_newest)));
    } else {
        choices.extend(seeds.clone().map(|seed| Choice::Of(Unflushed::Subset { seed })));
    }
    choices.extend(seeds.take(1).map(|seed| Choice::Of(Unflushed::Torn { seed })));
    if is_header(newest) {
        choices.push(Choice::TornHeaders);
    }
    if let Change::Write { bytes, .. } = newest {
        choices.extend(tears(bytes.len().div_ceil(512), effort.tears_max, cuts.prefix()));
    }
    choices
}

/// Places where a write of so many sectors is torn: all of them, or as many as allowed, the first and the last among them.
fn tears(sectors: usize, most: usize, salt: usize) -> Vec<Choice> {
    let step = sectors.div_ceil(most).max(1);
    let places = (1..sectors).step_by(step).chain((sectors > 2).then(|| sectors - 1));
    let torn = |sectors| {
        let parity = sectors + salt;
        Choice::TornNewest { sectors, first: parity.is_multiple_of(2), others: parity % 4 < 2 }
    };
    places.map(torn).collect()
}

fn image_of(cuts: &Cuts, choice: Choice) -> MemoryDevice {
    let newest = cuts.pending().len().wrapping_sub(1);
    match choice {
        Choice::Of(choice) => cuts.image_after(choice),
        Choice::Mask(mask) => cuts.image(|number, change| kept(change, mask >> number & 1 == 1)),
        Choice::TornHeaders => cuts.image(|_, change| match change {
            Change::Write { offset, bytes } if is_header(change) => {
                let part = &bytes[..bytes.len().min(8)];
                vec![Change::Write { offset: *offset, bytes: part.into() }]
            }
            _ => kept(change, true),
        }),
        Choice::TornNewest { sectors, first, others } => cuts.image(|number, change| match change {
            Change::Write { offset, bytes } if number == newest => {
                let (head, tail) = bytes.split_at((sectors * 512).min(bytes.len()));
                let (offset, part) =
                    if first { (*offset, head) } else { (*offset + head.len() as u64, tail) };
                vec![Change::Write { offset, bytes: part.into() }]
            }
            _ => kept(change, others),
        }),
    }
}

/// A write to one of the two headers.
fn is_header(change: &Change) -> bool {
    matches!(change, Change::Write { offset, .. } if *offset < 192 << 10)
}

fn kept(change: &Change, keep: bool) -> Vec<Change> {
    if keep { vec![change.clone()] } else { Vec::new() }
}

/// Gives what every cut leaves to `judge`, until one fails. The number of worlds.
fn for_each_world(
    mut moments: Moments,
    worth: impl Fn(&Moments) -> bool,
    effort: Effort,
    mut judge: impl FnMut(usize, World, u64) -> Verdict,
) -> Result<usize, String> {
    let mut count = 0;
    loop {
        let judged = if worth(&moments) { choices(moments.cuts(), effort) } else { Vec::new() };
        for choice in judged {
            count += 1;
            judge(count, moments.world(|cuts| image_of(cuts, choice)), moments.now())
                .map_err(|fault| format!("cut {}, {choice:?}: {fault}", moments.now()))?;
        }
        if !moments.advance() {
            return Ok(count);
        }
    }
}

fn behind_a_header(cuts: &Cuts) -> bool {
    matches!(cuts.newest(), Some(Record::Change(change)) if is_header(change))
}

/// Judges every cut of what the guest did. The number of worlds, or the first broken promise.
pub(crate) fn judge(guest: &Guest, effort: Effort) -> Result<usize, String> {
    // Wherever a header was just written, every combination of it with the rest must be harmless.
    let worth = |moments: &Moments| {
        let turn = behind_a_header(moments.cuts()) || moments.now().is_multiple_of(guest.judged_every);
        turn && moments.now() >= guest.judged_from
    };
    for_each_world(guest.stage.moments(), worth, effort, |count, world, moment| {
        let top = guest.top_at(moment);
        let before = judge_world(guest, &world, moment)?;
        if count % effort.afterlife_every == 0 {
            judge_afterlife(guest, &world, top, &before)?;
        }
        if count % effort.replay_every == 0 {
            judge_replay(guest, &world, top, &before)?;
        }
        if count % effort.qemu_every == 0 && world.0.len() == 1 {
            qemu_agrees(&world.0[top], &guest.sectors(), &before)?;
        }
        Ok(())
    })
}

fn judge_world(guest: &Guest, world: &World, moment: u64) -> Result<Vec<u64>, String> {
    let (files, top) = (world.files(), guest.top_at(moment));
    let before = sound_content(guest, &files, top)?;
    for (sector, stamp) in guest.sectors().into_iter().zip(&before) {
        let allowed = guest.allowed(sector, moment);
        if !allowed.contains(stamp) {
            return Err(format!("sector {sector} holds {stamp:#x}, not one of {allowed:x?}"));
        }
    }
    let slow = slow(&files, top).map_err(|fault| format!("the second reader: {fault}"))?;
    for (sector, stamp) in guest.sectors().into_iter().zip(&before) {
        if slow.read(sector * SECTOR, SECTOR)? != stamped(*stamp) {
            return Err(format!("the second reader does not find {stamp:#x} in sector {sector}"));
        }
    }
    replay(guest, &files, top)?;
    if sound_content(guest, &files, top)? != before {
        return Err("the replay into the file gives other content than the one in memory".to_owned());
    }
    let again = Arc::new(Recorder::new(Arc::clone(&files[top])));
    replay(guest, &with(&files, top, Arc::clone(&again) as Arc<dyn ImageFile>), top)?;
    if again.position() > 0 {
        return Err("a second replay finds something to do".to_owned());
    }
    Ok(before)
}

fn with(files: &Files, path: &str, file: Arc<dyn ImageFile>) -> Files {
    let mut files = files.clone();
    files.insert(path.to_owned(), file);
    files
}

/// Opens for writing and ends without having written.
fn replay(guest: &Guest, files: &Files, top: &str) -> Verdict {
    let disk = guest.builder(files, top).writable().map_err(|error| format!("it does not open: {error}"))?;
    drop(disk);
    match vhdx::info(&files[top]).map(|info| info.log) {
        Ok(LogInfo::Clean) => Ok(()),
        other => Err(format!("after its replay the log is {other:?}")),
    }
}

/// A cut in the middle of the replay changes nothing that is read afterwards.
fn judge_replay(guest: &Guest, world: &World, top: &str, before: &[u64]) -> Verdict {
    let image = &world.0[top];
    let recorder = Arc::new(Recorder::with_base(image.fork(), image.fork()));
    replay(guest, &with(&world.files(), top, Arc::clone(&recorder) as Arc<dyn ImageFile>), top)?;
    let every = recorder.position().div_ceil(16) as u64;
    let worth =
        |moments: &Moments| behind_a_header(moments.cuts()) || moments.now().is_multiple_of(every.max(1));
    let moments = Moments::of(&[(top.to_owned(), recorder)].into());
    for_each_world(moments, worth, Effort::times(1), |_, mut cut, _| {
        let image = cut.0.remove(top).expect("it was recorded");
        let files = world.with(top, image).files();
        for _ in 0..2 {
            if sound_content(guest, &files, top)? != before {
                return Err("a cut replay changed the content".to_owned());
            }
            replay(guest, &files, top)?;
        }
        Ok(())
    })
    .map(drop)
    .map_err(|fault| format!("during its replay, {fault}"))
}

/// The disk goes on: blocks that had no place get one, and what they show besides what is written now is what they showed.
fn judge_afterlife(guest: &Guest, world: &World, top: &str, before: &[u64]) -> Verdict {
    const LATER: u64 = u64::MAX;
    let files = world.files();
    let disk = guest.builder(&files, top).writable().map_err(|error| error.to_string())?;
    let written = |sector: u64| guest.blocks.iter().any(|block| sector_of(*block, USED[4]) == sector);
    let disk_bytes = disk.geometry().size_bytes;
    let on_disk = |at: u64| at + SECTOR <= disk_bytes;
    for block in &guest.blocks {
        let at = sector_of(*block, USED[4]) * SECTOR;
        if !on_disk(at) {
            continue;
        }
        disk.write_at(at, &stamped(LATER)).map_err(|error| error.to_string())?;
    }
    disk.close().map_err(|error| error.to_string())?;
    drop(disk);
    let sectors = guest.sectors();
    for ((sector, old), now) in sectors.iter().zip(before).zip(sound_content(guest, &files, top)?) {
        let expected = if written(*sector) && on_disk(sector * SECTOR) { LATER } else { *old };
        if now != expected {
            return Err(format!("later, sector {sector} holds {now:#x}, not {expected:#x}"));
        }
    }
    Ok(())
}

/// Proves the image sound and gives the stamps of all sectors that are looked at.
fn sound_content(guest: &Guest, files: &Files, top: &str) -> Result<Vec<u64>, String> {
    let report = vhdx::check(&files[top]);
    if !report.is_sound() {
        return Err(format!("it is not sound: {:?}", report.errors));
    }
    // A cut tears one header at most, and leaves a log and space at the end; nothing else is ever out of order.
    if let Some(defect) = report.defects.iter().find(|defect| !is_lawful(defect)) {
        return Err(format!("it has a defect: {defect}"));
    }
    let image =
        guest.builder(files, top).read_only().map_err(|error| format!("it does not open: {error}"))?;
    let stamp = |sector: u64| {
        // A cut before or after a resize: what is not on the disk is nothing.
        if (sector + 1) * SECTOR > image.geometry().size_bytes {
            return Ok(0);
        }
        let bytes = bytes_at(&image, sector * SECTOR, 512);
        let stamp = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        if bytes == stamped(stamp) { Ok(stamp) } else { Err(format!("sector {sector} is torn")) }
    };
    guest.sectors().into_iter().map(stamp).collect()
}

fn is_lawful(defect: &Defect) -> bool {
    matches!(defect, Defect::HeaderCopy { .. } | Defect::DirtyLog { .. } | Defect::LeakedSpace { .. })
}
