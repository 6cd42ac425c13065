//! What the kernel's file handles stand for.
//!
//! Handles are numbers that are never used twice, so a late request on a closed one is an error and not another file.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use csvfs::node::{DirEntry, Directory, File, Mapper};

/// An open file.
pub(crate) struct OpenFile {
    pub(crate) file: Arc<File>,
    /// `O_APPEND`: writes go to the end of the file as all nodes see it, whatever offset the kernel believes in.
    pub(crate) append: bool,
    /// Pages of it may be mapped and written to, as long as this lives.
    pub(crate) _mapper: Option<Mapper>,
    /// Reading it is noted in its time of access.
    pub(crate) notes_access: bool,
    /// `O_DIRECT` of the caller.
    pub(crate) direct: bool,
    /// A write through a direct handle has failed: the kernel may now cut the file to the size that it knows, which
    /// may be older than what another node has written. See `Shared::set_attributes`.
    pub(crate) may_be_cut: AtomicBool,
}

/// An open directory, with entries that were read ahead of the kernel's buffer.
pub(crate) struct OpenDirectory {
    pub(crate) directory: Directory,
    pub(crate) ahead: Mutex<Ahead>,
}

/// Entries after a cookie.
#[derive(Default)]
pub(crate) struct Ahead {
    pub(crate) after: u64,
    pub(crate) entries: std::collections::VecDeque<DirEntry>,
    pub(crate) end: bool,
    pub(crate) parent: u64,
}

/// Open files and directories by handle.
pub(crate) struct Handles<T> {
    /// Lock rank: leaf.
    open: RwLock<HashMap<u64, Arc<T>>>,
    next: AtomicU64,
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self { open: RwLock::default(), next: AtomicU64::new(1) }
    }
}

impl<T> Handles<T> {
    pub(crate) fn insert(&self, opened: T) -> u64 {
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.write().unwrap_or_else(PoisonError::into_inner).insert(handle, Arc::new(opened));
        handle
    }

    pub(crate) fn get(&self, handle: u64) -> Option<Arc<T>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).get(&handle).cloned()
    }

    pub(crate) fn remove(&self, handle: u64) -> Option<Arc<T>> {
        self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&handle)
    }

    /// Everything that is open now.
    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Forgets all, at the end of the mount.
    pub(crate) fn clear(&self) {
        let all = std::mem::take(&mut *self.open.write().unwrap_or_else(PoisonError::into_inner));
        drop(all);
    }
}
