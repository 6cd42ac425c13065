//! The cluster filesystem: on-LUN format, metadata store, coordinator and node library.
//!
//! ```text
//!   node (each process that uses files)                    coordinator (one per volume)
//!   caches, grants, direct I/O   <-- proto::{Request, Reply, Push} -->   namespace, allocator, grants
//!          |                                                                     |
//!          |  data, straight to the LUN                                          |  meta (redb), format
//!          v                                                                     v
//!                               blockio::BlockDevice: the LUN
//! ```
//!
//! **Invariant:** only the coordinator writes metadata; nodes write data blocks that a grant and a map gave them.

mod acl;
pub mod alloc;
pub mod check;
pub mod clock;
pub mod coordinator;
pub mod extents;
pub mod format;
pub mod local;
mod meta;
mod namespace;
pub mod node;
pub mod probe;
pub mod proto;
mod refcounts;
mod refusal;
pub mod volume;
mod xattrs;

pub use coordinator::{Coordinator, OpenParams, PushTarget};
pub use format::superblock::Superblock;
pub use meta::StoreError;
pub use proto as pb;
pub use volume::{CreateParams, Volume, VolumeError};

/// Inode number of a volume's root directory.
pub const ROOT_INO: u64 = 1;
