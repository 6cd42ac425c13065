//! An open image at work: its core and the two threads that serve it.
//!
//! **Invariant:** the threads end only after the last request that may need them has ended.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::{Builder as ThreadBuilder, JoinHandle};

use blockio::{ImageFile, IoError};
use threads::Kind;

use crate::chain::Chain;
use crate::core::Core;
use crate::error::{VhdxError, corrupt};
use crate::flush::{Closed, FlushJob, Session};
use crate::format::MIB;
use crate::grow::{self, GrowthJob, STEP_MIN};
use crate::image::check_granularity;
use crate::load::{Loaded, LogPolicy};
use crate::log::Page;
use crate::metadata;
use crate::open::Options;
use crate::recover::recover;
use crate::region::Area;
use crate::space::{Space, gaps};

/// An open image at work.
pub(crate) struct Running {
    pub(crate) core: Arc<Core>,
    threads: Vec<JoinHandle<()>>,
}

impl Running {
    /// Reads the image with its parents, replays what there is to replay and starts serving it.
    ///
    /// All that could keep the image from being written is looked at before the replay, the first change of the file.
    pub(crate) fn open(file: &Arc<dyn ImageFile>, options: &Options) -> Result<Self, VhdxError> {
        let (mut loaded, mut findings) = Loaded::open_as(file, LogPolicy::InMemory, options)?;
        check_granularity(&loaded)?;
        if let Some(error) = findings.write_blockers.pop() {
            return Err(error);
        }
        refuse_unwritable(&loaded)?;
        let chain = Chain::open(&loaded, options)?;
        if recover(file, options)? {
            (loaded, _) = Loaded::open_as(file, LogPolicy::InMemory, options)?;
        }
        let amendments = refreshed_locator(&loaded, &chain, options)?;
        Self::start(loaded, chain, options, amendments)
    }

    fn start(
        loaded: Loaded,
        chain: Chain,
        options: &Options,
        amendments: Vec<Page>,
    ) -> Result<Self, VhdxError> {
        let (header, used_end) = (loaded.header, loaded.used_end());
        let areas_end = loaded.areas().iter().map(Area::end).fold(0, u64::max);
        let core = Arc::new(core_of(loaded, chain, options));
        let session = Session::new(Arc::clone(&core), header, (used_end, areas_end), options.data_write_id)
            .with_amendments(amendments);
        let grower = Arc::clone(&core);
        let mut running = Self { core, threads: Vec::new() };
        running.spawn("vhdx-flush", move || session.run())?;
        running.spawn("vhdx-grow", move || grow::run(&grower))?;
        Ok(running)
    }

    fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), VhdxError> {
        let thread = threads::spawn(Kind::Tasks, ThreadBuilder::new().name(name.to_owned()), body).map_err(
            |error| VhdxError::Io {
                doing: format!("starting the thread {name}"),
                source: IoError::Os { op: "spawn", offset: 0, errno: error.raw_os_error().unwrap_or(0) },
            },
        )?;
        self.threads.push(thread);
        Ok(())
    }

    /// Waits for what is in flight and leaves a clean file. Closing again gives the same answer.
    pub(crate) fn close(&self) -> Result<Closed, VhdxError> {
        self.core.drain();
        let (tell, told) = sync_channel(1);
        self.core.flushes.push(FlushJob::Close(tell));
        told.recv().unwrap_or(Err(VhdxError::Poisoned { cause: "the flush thread ended".to_owned() }))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.core.drain();
        self.core.growth.push(GrowthJob::Stop);
        self.core.flushes.push(FlushJob::Stop);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

/// Refuses images that can be read but not changed safely.
pub(crate) fn refuse_unwritable(loaded: &Loaded) -> Result<(), VhdxError> {
    if loaded.header.log_area().1 == 0 {
        return Err(VhdxError::Unsupported {
            what: "writing an image without a log (log length 0 in the header)".to_owned(),
            hint: "convert it to a new image",
        });
    }
    // Two updates for a session, and one per log generation: any number below this lasts for ever.
    let sequence = loaded.header.header.sequence.get();
    if sequence > u64::MAX - (1 << 32) {
        let found = format!("sequence number {sequence} leaves no room for newer headers");
        return Err(corrupt("header", 0, found));
    }
    Ok(())
}

/// The pages of the metadata region with paths that lead to the parent, if those in the file do not.
fn refreshed_locator(loaded: &Loaded, chain: &Chain, options: &Options) -> Result<Vec<Page>, VhdxError> {
    let (Some(origin), Some(locator), Some(parent)) =
        (&options.origin, &loaded.locator, chain.paths().first())
    else {
        return Ok(Vec::new());
    };
    match origin.resolver.refreshed(&origin.path, locator, parent) {
        Some(locator) => metadata::locator_pages(&loaded.view, loaded.regions.metadata, &locator),
        None => Ok(Vec::new()),
    }
}

fn core_of(loaded: Loaded, chain: Chain, options: &Options) -> Core {
    let block_bytes = loaded.params.block_bytes;
    let owned = loaded.owners.spans(block_bytes);
    let used = loaded.areas().iter().map(|area| (area.offset, area.length)).chain(owned).collect();
    let unplaced = loaded.bat.shape.blocks - loaded.owners.placed;
    let step = match options.growth_bytes {
        0 => STEP_MIN.max(8 * block_bytes),
        fixed => fixed.next_multiple_of(MIB).max(block_bytes),
    };
    let mut space = Space::new(block_bytes, unplaced, gaps(used, block_bytes), step);
    space.fixed_step = options.growth_bytes != 0;
    let map = (loaded.bat, loaded.bitmaps);
    let mut core = Core::new(loaded.view.file, loaded.params, map, chain, space, loaded.view.file_bytes);
    core.mutation = options.mutation;
    core
}
