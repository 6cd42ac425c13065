//! The files that a guest's disk is made of, all on one power supply.
//!
//! ```text
//!   /vms/0   W  W  F                    record of each file, by one clock
//!   /vms/1            W  F     W
//!   cut      ................|          hits all of them
//! ```
//! **Invariant:** an image of a lower number is never a child of one of a higher.

use std::collections::BTreeMap;
use std::sync::Arc;

use blockio::{Cuts, ImageFile, MemoryDevice, Recorder, Timeline, Unflushed};
use vhdx::ParentResolver;

use crate::slow::Slow;

/// Files by their path.
pub(crate) type Files = BTreeMap<String, Arc<dyn ImageFile>>;

/// Where the file `name` lies.
pub(crate) fn path(name: &str) -> String {
    format!("/vms/{name}")
}

/// Finds parents among `files`.
pub(crate) fn resolver(files: &Files) -> ParentResolver {
    ParentResolver::new(Arc::new(files.clone())).root("/vms")
}

/// The files of a scenario.
#[derive(Default)]
pub(crate) struct Stage {
    timeline: Timeline,
    recorders: BTreeMap<String, Arc<Recorder<MemoryDevice>>>,
}

impl Stage {
    /// A new, empty file.
    pub(crate) fn add(&mut self, name: &str) -> Arc<dyn ImageFile> {
        self.put(name, MemoryDevice::with_block_bytes(0, 1))
    }

    /// A file with what `fill` puts there before the record begins.
    pub(crate) fn make(&mut self, name: &str, fill: impl FnOnce(&Arc<dyn ImageFile>)) -> Arc<dyn ImageFile> {
        let made = Arc::new(MemoryDevice::with_block_bytes(0, 1));
        fill(&(Arc::clone(&made) as Arc<dyn ImageFile>));
        self.put(name, made.fork())
    }

    fn put(&mut self, name: &str, made: MemoryDevice) -> Arc<dyn ImageFile> {
        let base = made.fork();
        let recorder = Arc::new(Recorder::with_base(made, base).on(&self.timeline));
        self.recorders.insert(path(name), Arc::clone(&recorder));
        recorder
    }

    /// All of them.
    pub(crate) fn files(&self) -> Files {
        let file = |(path, recorder): (&String, &Arc<Recorder<MemoryDevice>>)| {
            (path.clone(), Arc::clone(recorder) as Arc<dyn ImageFile>)
        };
        self.recorders.iter().map(file).collect()
    }

    /// One of them.
    pub(crate) fn file(&self, name: &str) -> Arc<dyn ImageFile> {
        Arc::clone(&self.recorders[&path(name)]) as Arc<dyn ImageFile>
    }

    /// The moment of the newest record.
    pub(crate) fn now(&self) -> u64 {
        self.timeline.now()
    }

    /// Every moment at which the power could be cut.
    pub(crate) fn moments(&self) -> Moments {
        Moments::of(&self.recorders)
    }
}

/// The files as a power cut left them.
pub(crate) struct World(pub(crate) BTreeMap<String, MemoryDevice>);

impl World {
    /// Copies of the files.
    pub(crate) fn files(&self) -> Files {
        let copy = |(path, image): (&String, &MemoryDevice)| {
            (path.clone(), Arc::new(image.fork()) as Arc<dyn ImageFile>)
        };
        self.0.iter().map(copy).collect()
    }

    /// The same world where the file `path` is in another state.
    pub(crate) fn with(&self, path: &str, image: MemoryDevice) -> Self {
        let mut copies: BTreeMap<_, _> =
            self.0.iter().map(|(path, image)| (path.clone(), image.fork())).collect();
        copies.insert(path.to_owned(), image);
        Self(copies)
    }
}

/// The second reader's view of the image `top`: over all images of lower numbers, or over those that a merge has left.
pub(crate) fn slow(files: &Files, top: &str) -> Result<Slow, String> {
    let below: Vec<_> = files.range(..top.to_owned()).rev().map(|(_, file)| Arc::clone(file)).collect();
    let mut faults = Vec::new();
    for skipped in 0..=below.len() {
        let chain = [&[Arc::clone(&files[top])], &below[skipped..]].concat();
        match Slow::chain(&chain) {
            Ok(slow) => return Ok(slow),
            Err(fault) => faults.push(fault),
        }
    }
    Err(faults.join("; "))
}

/// A walk through the moments of a stage.
pub(crate) struct Moments {
    files: Vec<(String, Cuts)>,
    order: Vec<(u64, usize)>,
    at: usize,
    newest: usize,
}

impl Moments {
    pub(crate) fn of(recorders: &BTreeMap<String, Arc<Recorder<MemoryDevice>>>) -> Self {
        let of_file = |(number, recorder): (usize, &Arc<Recorder<MemoryDevice>>)| {
            recorder.moments().into_iter().map(move |moment| (moment, number))
        };
        let mut order: Vec<_> = recorders.values().enumerate().flat_map(of_file).collect();
        order.sort_unstable();
        let files = recorders.iter().map(|(path, recorder)| (path.clone(), recorder.cuts())).collect();
        Self { files, order, at: 0, newest: 0 }
    }

    /// The present moment.
    pub(crate) fn now(&self) -> u64 {
        self.at.checked_sub(1).map_or(0, |newest| self.order[newest].0)
    }

    /// The cuts of the file that changed last.
    pub(crate) fn cuts(&self) -> &Cuts {
        &self.files[self.newest].1
    }

    /// Goes one record on. False at the end.
    pub(crate) fn advance(&mut self) -> bool {
        let Some((_, file)) = self.order.get(self.at) else { return false };
        (self.newest, self.at) = (*file, self.at + 1);
        self.files[*file].1.advance()
    }

    /// What a cut leaves: `image` of the file that changed last, and one or another part of what the others had pending.
    pub(crate) fn world(&self, image: impl FnOnce(&Cuts) -> MemoryDevice) -> World {
        let others = match self.now() % 3 {
            0 => Unflushed::None,
            1 => Unflushed::All,
            _ => Unflushed::Subset { seed: self.now() },
        };
        let mut world: BTreeMap<_, _> =
            self.files.iter().map(|(path, cuts)| (path.clone(), cuts.image_after(others))).collect();
        world.insert(self.files[self.newest].0.clone(), image(self.cuts()));
        World(world)
    }
}
