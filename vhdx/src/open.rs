//! The three ways to open an image.
//!
//! | call | reads | dirty log | writes |
//! |---|---|---|---|
//! | [`Builder::read_only`] | everything | replayed in memory | nothing, ever |
//! | [`Builder::inactive`] | headers, tables, BAT | not looked at | nothing, until [`Standby::activate`] |
//! | [`Builder::writable`] | everything | replayed into the file | nothing else before the first write |
//!
//! **Invariant:** which of them was chosen is in the type of what comes out.

use std::sync::Arc;

use blockio::ImageFile;
use uuid::Uuid;

use crate::chain::{Chain, Origin};
use crate::children::{self, Reach};
use crate::disk::Disk;
use crate::error::VhdxError;
use crate::image::{Image, check_granularity};
use crate::load::{Loaded, LogPolicy};
use crate::mutation::Mutation;
use crate::resolver::ParentResolver;

/// Opens images.
pub struct Builder {
    pub(crate) file: Arc<dyn ImageFile>,
    pub(crate) options: Options,
}

/// How a disk is opened and how it behaves.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    /// Clear the id of a log that has no entry.
    pub(crate) repair: bool,
    /// Bytes to grow the file by; zero for the default.
    pub(crate) growth_bytes: u64,
    /// Where to look for parents.
    pub(crate) origin: Option<Origin>,
    /// Change the image even though others need it as it is.
    pub(crate) despite_children: bool,
    /// Read states of a draft of the format as what they became.
    pub(crate) tolerate_draft_states: bool,
    /// The id that says that the guest's data changed, if it is not to be drawn when that happens.
    pub(crate) data_write_id: Option<Uuid>,
    /// The step of the protocol that a test leaves out.
    pub(crate) mutation: Option<Mutation>,
}

impl Builder {
    /// Starts opening the image in `file`.
    #[must_use]
    pub fn open(file: Arc<dyn ImageFile>) -> Self {
        Self { file, options: Options::default() }
    }

    /// The same as it was opened before.
    pub(crate) fn with(file: Arc<dyn ImageFile>, options: Options) -> Self {
        Self { file, options }
    }

    /// Says where the parents of a differencing image may be. `path` is where the image itself is, in the words of the
    /// resolver: an absolute, `/`-separated path, from which relative paths are followed.
    ///
    /// Without this only images without a parent can be opened.
    #[must_use]
    pub fn parents(mut self, resolver: ParentResolver, path: &str) -> Self {
        self.options.origin = Some(Origin { resolver, path: path.to_owned() });
        self
    }

    /// Allows a writable open to clear a log id that no log entry bears (a killed qemu leaves this).
    #[must_use]
    pub fn repair(mut self, repair: bool) -> Self {
        self.options.repair = repair;
        self
    }

    /// Changes the image even if others refer to it as their parent; they are refused from then on. Without this it is not
    /// opened for writing, resized or merged when such an image is found, see [`Builder::children`].
    #[must_use]
    pub fn despite_children(mut self, despite_children: bool) -> Self {
        self.options.despite_children = despite_children;
        self
    }

    /// Reads block state 5, by which a draft of the format said "discarded", as that. It is refused otherwise. Parents too.
    #[must_use]
    pub fn tolerate_draft_states(mut self, tolerate: bool) -> Self {
        self.options.tolerate_draft_states = tolerate;
        self
    }

    /// Grows the file in steps of this many bytes instead of the default (64 MiB or 8 blocks, doubling up to 1 GiB).
    #[must_use]
    pub fn growth_bytes(mut self, growth_bytes: u64) -> Self {
        self.options.growth_bytes = growth_bytes;
        self
    }

    /// Leaves a step of the protocol out: images written so are not safe.
    #[cfg(feature = "mutations")]
    #[doc(hidden)]
    #[must_use]
    pub fn without(mut self, step: Mutation) -> Self {
        self.options.mutation = Some(step);
        self
    }

    /// Opens for reading. A dirty log is replayed in memory only, in parents too.
    ///
    /// # Errors
    /// By [`VhdxError::kind`]; nothing was changed.
    pub fn read_only(self) -> Result<Image, VhdxError> {
        let (loaded, chain) = self.load(LogPolicy::InMemory)?;
        Ok(Image::new(Arc::new(loaded), chain))
    }

    /// Opens as the target of a migration: reads and checks what there is, parents included, to warm up and to fail early;
    /// replays and writes nothing.
    ///
    /// # Errors
    /// By [`VhdxError::kind`]; nothing was changed.
    pub fn inactive(self) -> Result<Standby, VhdxError> {
        let (loaded, chain) = self.load(LogPolicy::Ignore)?;
        children::refuse(&self.file, &self.options, Reach::Beside, &[])?;
        Ok(Standby { loaded, chain, options: self.options })
    }

    /// Opens for writing. The caller must hold the right to write the file, alone. Parents are opened for reading only. An
    /// image beside which lies one that has it as its parent is refused, unless the caller insists.
    ///
    /// A dirty log is replayed into the file, after all else was found good. Beyond that, a disk that is never written
    /// leaves the file untouched.
    ///
    /// # Errors
    /// By [`VhdxError::kind`].
    pub fn writable(self) -> Result<Disk, VhdxError> {
        children::refuse(&self.file, &self.options, Reach::Beside, &[])?;
        Disk::open(&self.file, self.options)
    }

    fn load(&self, policy: LogPolicy) -> Result<(Loaded, Chain), VhdxError> {
        let (loaded, _) = Loaded::open_as(&self.file, policy, &self.options)?;
        check_granularity(&loaded)?;
        let chain = Chain::open(&loaded, &self.options)?;
        Ok((loaded, chain))
    }
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder")
            .field("file", &self.file.identity())
            .field("options", &self.options)
            .finish()
    }
}

/// An image that another node still writes: known, but not in use here.
#[derive(Debug)]
pub struct Standby {
    loaded: Loaded,
    chain: Chain,
    options: Options,
}

impl Standby {
    /// Looks at everything again, without taking the disk over.
    ///
    /// # Errors
    /// As [`Builder::inactive`].
    pub fn reread(self) -> Result<Self, VhdxError> {
        self.builder().inactive()
    }

    /// Number of parents below each other.
    #[must_use]
    pub fn parents(&self) -> usize {
        self.chain.layers().len()
    }

    /// Size of the virtual disk when it was looked at.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.loaded.params.disk_bytes
    }

    /// Sector size of the virtual disk.
    #[must_use]
    pub fn logical_sector(&self) -> u32 {
        self.loaded.params.logical_sector
    }

    /// Takes the disk over, after the record of ownership says so. Everything is read anew; nothing read before counts.
    ///
    /// # Errors
    /// As [`Builder::writable`].
    pub fn activate(self) -> Result<Disk, VhdxError> {
        Disk::open(&self.loaded.view.file, self.options)
    }

    /// The same after a planned hand-over: the former owner closed the disk and announced its [`crate::Closed::file_write_id`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidInput`] when the file was changed since, or was not closed. Nothing was changed.
    pub fn activate_handed_over(self, file_write_id: Uuid) -> Result<Disk, VhdxError> {
        let view = crate::view::View::of(&self.loaded.view.file);
        let header = crate::header::CurrentHeader::read(&view)?;
        let found = Uuid::from_bytes_le(header.header.file_write_id);
        if found != file_write_id {
            return Err(VhdxError::InvalidInput(format!(
                "the image bears the file write id {found}, handed over was {file_write_id}: somebody else wrote it since; \
                 find the other writer before opening it"
            )));
        }
        if let Some(log_id) = header.header.log_id() {
            return Err(VhdxError::InvalidInput(format!(
                "the image was handed over with the live log {log_id}: its former owner did not close it; fence that node, \
                 then open the image for writing"
            )));
        }
        Disk::open(&self.loaded.view.file, self.options)
    }

    fn builder(self) -> Builder {
        Builder { file: self.loaded.view.file, options: self.options }
    }
}
