//! The metadata store: tables in a redb database that lives in chunks of the LUN.
//!
//! ```text
//!   coordinator:  Tables (typed)  ->  Transaction  ->  Store        keys and records here, redb types nowhere else
//!                                                        |
//!   redb pages  ->  LunBackend (queue, drain at sync)  ->  Region (length slot, chunk table)  ->  LUN
//!   changed rows  ->  Journal, forced, until the pages follow  -------------^
//! ```
//! **Invariant:** a transaction is either wholly on the LUN or not at all, and `commit` returns only when it is there.

mod backend;
mod changes;
mod journal;
mod keys;
mod records;
mod region;
mod store;
mod tables;

pub(crate) use records::{ClientRecord, InodeRecord, LogRow, StoredReply};
pub(crate) use store::{Snapshot, Store, guarded};
pub(crate) use tables::{Dirent, Globals, PoolRun, TableId, Tables};

pub use store::StoreError;
