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

pub mod node;
pub mod proto;
pub use proto as pb;
