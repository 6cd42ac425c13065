//! What a server offers.

use std::fmt;
use std::sync::Arc;

use crate::{BlockDevice, FileDevice};

/// A device that clients may use.
#[derive(Clone)]
pub struct NbdExport {
    /// The device.
    pub device: Arc<dyn BlockDevice>,
    /// Whether clients may only read.
    pub read_only: bool,
    /// Who knows which parts are allocated; without it clients are not told.
    pub allocation: Option<Arc<dyn Allocation>>,
}

impl NbdExport {
    /// An export without knowledge of its holes.
    #[must_use]
    pub fn new(device: Arc<dyn BlockDevice>, read_only: bool) -> Self {
        Self { device, read_only, allocation: None }
    }
}

impl fmt::Debug for NbdExport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdExport").field("read_only", &self.read_only).finish_non_exhaustive()
    }
}

/// The exports of a server, by name.
pub trait NbdExports: Send + Sync {
    /// The export that a client asks for. May block.
    ///
    /// # Errors
    /// A sentence for the client: there is none of this name, or it cannot be had now.
    fn find(&self, name: &str) -> Result<NbdExport, String>;

    /// Names for a client that asks what there is.
    fn names(&self) -> Vec<String>;
}

/// One export, under any name.
impl NbdExports for NbdExport {
    fn find(&self, _name: &str) -> Result<NbdExport, String> {
        Ok(self.clone())
    }

    fn names(&self) -> Vec<String> {
        vec![String::new()]
    }
}

/// Knows which parts of a device are allocated.
pub trait Allocation: Send + Sync {
    /// Length of the run of one kind that begins at `offset`, at most `len`, and whether it is a hole that reads zeros.
    /// May block.
    fn run_at(&self, offset: u64, len: u64) -> (u64, bool);
}

/// What the file system says of a regular file. What it does not know is data.
impl Allocation for FileDevice {
    fn run_at(&self, offset: u64, len: u64) -> (u64, bool) {
        let (data, hole) = (self.next_data(offset), self.next_hole(offset));
        match (data, hole) {
            (Some(data), _) if data > offset => (len.min(data - offset), true),
            (Some(_), Some(hole)) if hole > offset => (len.min(hole - offset), false),
            // Nothing but a hole up to the end.
            (None, Some(_)) => (len, true),
            _ => (len, false),
        }
    }
}
