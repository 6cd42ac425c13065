//! The FUSE mount of a cluster volume: POSIX calls of any program, through the node library.
//!
//! ```text
//!   kernel --/dev/fuse--> 2 readers (`wire`) --+-- read, write, fsync: submitted to the node, no thread waits
//!                                            |         completion on the device's I/O thread replies
//!                                            +-- create, mkdir, rename, unlink, rmdir: sent to the coordinator, no thread
//!                                            |         waits: the thread that brings its answer replies
//!                                            +-- other names, attributes: a pool of workers, one waits per call
//! ```
//!
//! The kernel keeps nothing but pages of mappings: every file is direct I/O, attributes and names live 0 s and missing names
//! are not remembered. What is asked again and again is told by the node from memory, without a message. So what one node
//! has done is what the next call on another node sees. Pages of mappings go when the grant goes under which they were read,
//! by a thread that does nothing else (F1, F2, F3, F6, F7).
//!
//! **Invariant:** no thread that reads from `/dev/fuse` waits for the coordinator, and closing a file never waits behind
//! calls that do (F2, F9).

mod attr;
mod buffers;
mod data;
mod directory;
mod handles;
mod interrupts;
mod known;
mod lockers;
mod mount;
mod ops;
mod pool;
mod shared;
mod wire;

pub use mount::{Mount, MountError, MountOptions, mount};
