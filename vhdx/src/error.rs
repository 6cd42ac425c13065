//! What can go wrong with an image, by name.
//!
//! Every message says which structure, where it lies, what was found there and what to do. Callers branch on
//! [`VhdxError::kind`], people read the message.

use blockio::IoError;

/// The family of a [`VhdxError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The file is something else.
    NotVhdx,
    /// A lawful image that uses what this version cannot handle.
    Unsupported,
    /// A structure holds a value that it must not.
    Corrupt,
    /// The file ends before something that it refers to.
    Truncated,
    /// The log bears entries, but no complete run of them.
    LogUnrecoverable,
    /// The header names a log that has no entry at all.
    OrphanLogId,
    /// Whoever made the image did not finish.
    Incomplete,
    /// No path of a parent locator leads to a file, or there is no leave to follow one.
    ParentNotFound,
    /// The file that a parent locator leads to is not the parent that the child was made from.
    ParentMismatch,
    /// The parent is there, but somebody else keeps it from being read.
    ParentLocked,
    /// An image is among its own parents.
    ChainCycle,
    /// More parents than are followed.
    ChainTooDeep,
    /// A path of a parent locator leads out of the folders that the user allows.
    PathOutsideRoot,
    /// Other images refer to this one as their parent and need it as it is.
    HasChildren,
    /// Well-formed, but beyond the bounds set here against hostile files.
    Limit,
    /// The parameters of a call make no sense.
    InvalidInput,
    /// An earlier failure made the disk unusable until it is opened anew.
    Poisoned,
    /// The file below failed.
    Io,
}

/// Why an image could not be opened, made or changed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum VhdxError {
    /// The file is something else.
    #[error("this is not a VHDX image: {found}; {hint}")]
    NotVhdx {
        /// What was found instead.
        found: String,
        /// What to do.
        hint: &'static str,
    },
    /// A lawful image that uses what this version cannot handle.
    #[error("unsupported: {what}; {hint}")]
    Unsupported {
        /// The feature and its value.
        what: String,
        /// What to do.
        hint: &'static str,
    },
    /// A structure holds a value that it must not.
    #[error("corrupt {structure} at {file_offset:#x}: {found}; {HINT_CORRUPT}")]
    Corrupt {
        /// The structure in the words of the specification.
        structure: &'static str,
        /// Where it lies in the file.
        file_offset: u64,
        /// The value and why it is wrong.
        found: String,
    },
    /// The file ends before something that it refers to.
    #[error(
        "truncated image: {structure} needs {need} bytes of file, there are {have}; copy the image again from its source"
    )]
    Truncated {
        /// What is cut.
        structure: &'static str,
        /// File size needed.
        need: u64,
        /// File size found.
        have: u64,
    },
    /// The log bears entries of the live id, but no complete run.
    #[error(
        "the log {log_id} at {file_offset:#x} holds entries but no complete run, so metadata changes are lost; \
         restore the image from a backup"
    )]
    LogUnrecoverable {
        /// The id in the header.
        log_id: uuid::Uuid,
        /// Where the ring starts.
        file_offset: u64,
    },
    /// The header names a log that has no entry at all: a writer (qemu does this) died before its first entry.
    #[error(
        "the header names the log {log_id}, but no entry in the ring at {file_offset:#x} bears it: the last writer was \
         killed between the two; open with the repair option, which clears the id"
    )]
    OrphanLogId {
        /// The id in the header.
        log_id: uuid::Uuid,
        /// Where the ring starts.
        file_offset: u64,
    },
    /// Whoever made the image did not finish.
    #[error("the image was never finished: its metadata carries the incomplete-file marker; create it again")]
    Incomplete,
    /// No path of a parent locator leads to a file, or there is no leave to follow one.
    #[error("the parent of {child} was not found: {tried}; {hint}")]
    ParentNotFound {
        /// The image that has the parent.
        child: String,
        /// The paths that were tried.
        tried: String,
        /// What to do.
        hint: &'static str,
    },
    /// The file that a parent locator leads to is not the parent that the child was made from.
    #[error(
        "{parent} is not the parent that {child} was made from: {found}; find the right file, or restore the chain from a \
         backup: reading on would mix two disks"
    )]
    ParentMismatch {
        /// The image that has the parent.
        child: String,
        /// The file that was found.
        parent: String,
        /// What differs.
        found: String,
    },
    /// The parent is there, but somebody else keeps it from being read.
    #[error("the parent {parent} of {child} is in use by somebody else ({source}); close it there first")]
    ParentLocked {
        /// The image that has the parent.
        child: String,
        /// The file that was found.
        parent: String,
        /// What the file said.
        #[source]
        source: IoError,
    },
    /// An image is among its own parents.
    #[error(
        "the chain goes round: {file} is among its own parents; its parent locator was tampered with, restore it"
    )]
    ChainCycle {
        /// The file that came twice.
        file: String,
    },
    /// More parents than are followed.
    #[error("{child} has more than {max} parents below each other; merge some of them first")]
    ChainTooDeep {
        /// The image that was opened.
        child: String,
        /// Parents that are followed.
        max: usize,
    },
    /// A path of a parent locator leads out of the folders that the user allows.
    #[error(
        "the parent path {path:?} of {child} leads out of the allowed folders ({why}); allow its folder, or map its prefix, if \
         you trust the image"
    )]
    PathOutsideRoot {
        /// The image that has the parent.
        child: String,
        /// The path as the locator has it.
        path: String,
        /// Where it leads.
        why: String,
    },
    /// Other images refer to this one as their parent and need it as it is.
    #[error(
        "{image} is the parent of {children}: changing it would make them unreadable; merge or remove them first, or insist if \
         they are of no use any more"
    )]
    HasChildren {
        /// The image that was to be changed.
        image: String,
        /// Where its children are.
        children: String,
    },
    /// Well-formed, but beyond the bounds set here.
    #[error("{what} is {found}, over the bound of {bound} that protects against hostile files")]
    Limit {
        /// The quantity.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The bound.
        bound: u64,
    },
    /// The parameters of a call make no sense.
    #[error("{0}")]
    InvalidInput(String),
    /// An earlier failure made the disk unusable.
    #[error("the disk stopped after an earlier failure: {cause}; open it anew, its log will be replayed")]
    Poisoned {
        /// The earlier failure.
        cause: String,
    },
    /// The file below failed.
    #[error("{doing}")]
    Io {
        /// What was being done.
        doing: String,
        /// What the file said.
        #[source]
        source: IoError,
    },
}

const HINT_CORRUPT: &str = "run a check for the full list, restore from a backup";

impl VhdxError {
    /// The family, for callers that branch.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotVhdx { .. } => ErrorKind::NotVhdx,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::Corrupt { .. } => ErrorKind::Corrupt,
            Self::Truncated { .. } => ErrorKind::Truncated,
            Self::LogUnrecoverable { .. } => ErrorKind::LogUnrecoverable,
            Self::OrphanLogId { .. } => ErrorKind::OrphanLogId,
            Self::Incomplete => ErrorKind::Incomplete,
            Self::ParentNotFound { .. } => ErrorKind::ParentNotFound,
            Self::ParentMismatch { .. } => ErrorKind::ParentMismatch,
            Self::ParentLocked { .. } => ErrorKind::ParentLocked,
            Self::ChainCycle { .. } => ErrorKind::ChainCycle,
            Self::ChainTooDeep { .. } => ErrorKind::ChainTooDeep,
            Self::PathOutsideRoot { .. } => ErrorKind::PathOutsideRoot,
            Self::HasChildren { .. } => ErrorKind::HasChildren,
            Self::Limit { .. } => ErrorKind::Limit,
            Self::InvalidInput(_) => ErrorKind::InvalidInput,
            Self::Poisoned { .. } => ErrorKind::Poisoned,
            Self::Io { .. } => ErrorKind::Io,
        }
    }

    /// The error as a block device reports it.
    #[must_use]
    pub fn into_io(self) -> IoError {
        match self {
            Self::Io { source, .. } => source,
            Self::Poisoned { cause } => IoError::Poisoned { cause },
            other => IoError::Corrupt(other.to_string()),
        }
    }
}

/// A `map_err` argument that adds what was being done.
pub(crate) fn doing(what: impl Into<String>) -> impl FnOnce(IoError) -> VhdxError {
    move |source| match source {
        IoError::Poisoned { cause } => VhdxError::Poisoned { cause },
        source => VhdxError::Io { doing: what.into(), source },
    }
}

pub(crate) fn corrupt(structure: &'static str, file_offset: u64, found: impl Into<String>) -> VhdxError {
    VhdxError::Corrupt { structure, file_offset, found: found.into() }
}
