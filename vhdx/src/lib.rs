//! The VHDX virtual disk format over any block device.
//!
//! ```text
//!   guest range --resolve--> file ranges --the caller's I/O--> file --complete--> mapping visible --flush--> durable
//!
//!   0        file identifier, two headers, two region tables
//!   1 MiB    log: a ring of entries; what they rewrite is BAT and metadata, never payload
//!   ...      metadata region: what the disk is      BAT: where each block lies      payload blocks, 1 MiB aligned
//! ```
//! A disk is opened in one of three ways, and the type says which: [`Image`] (reads only, a dirty log is replayed in memory),
//! [`Standby`] (the target of a migration: nothing replayed, nothing written until it is activated) and [`Disk`] (the one
//! writer). `Image` and `Disk` are [`blockio::BlockDevice`]s.
//!
//! ```
//! use std::sync::Arc;
//! use blockio::{BlockDevice, ImageFile, MemoryDevice};
//! use vhdx::{Builder, Spec};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let file: Arc<dyn ImageFile> = Arc::new(MemoryDevice::new(0));
//! vhdx::create(&file, &Spec::dynamic(10 << 30))?;
//!
//! let disk = Builder::open(Arc::clone(&file)).writable()?;
//! disk.write_at(5 << 30, b"sixteen sectors ".repeat(512).as_slice())?;
//! disk.flush()?; // durable from here on, mapping included
//! disk.close()?; // clean log, no surplus at the end of the file
//!
//! let image = Builder::open(file).read_only()?;
//! let mut sector = [0; 512];
//! image.read_at(5 << 30, &mut sector)?;
//! assert!(sector.starts_with(b"sixteen sectors "));
//! # Ok(())
//! # }
//! ```
//!
//! # What survives a crash, and why
//!
//! The promise is that of a disk: what was complete when a flush was asked for is there after any crash, what came later is
//! old or new sector by sector, and no block ever shows bytes of another.
//!
//! | event | writes | flushes |
//! |---|---|---|
//! | open for writing, nothing written | none | 0 |
//! | first write of a session | header, empty log entry, header | 2 |
//! | write to a block that has its place | payload | 0 |
//! | write to a new block | payload | 0 |
//! | guest flush, k new blocks | one log entry | 1 |
//! | guest flush, new sectors or blocks of a child | one log entry | 2 |
//! | the same, new blocks in more than 126 pages of the BAT | one log entry per 126 pages | 1, and 1 per half of the ring |
//! | guest flush, payload only | none | 1 |
//! | guest flush, nothing since the last | none | 0 |
//! | end of a log generation, every 63 entries of 8 KiB | BAT pages in place, empty entry, two headers | 2 |
//! | close | BAT pages in place, two headers | 3 |
//!
//! **One flush is enough for new blocks** because of what is handed out: space that reads as zeros, durably, below a size of
//! the file that is durable. A crash inside that flush may leave the mapping without the payload; the block then reads as
//! zeros, which is what it was before. Such space is made by cutting the file back to what is in use when a session begins
//! (a crash leaves unlogged payload behind that) and growing it, in steps that double and whose flush is mostly one that
//! the guest asked for anyway; and by zeroing what discards gave up, after the log has dropped it and the last request that
//! could know the old place has ended.
//!
//! **A child needs a second one**, because where its block or sector is new, the parent showed before: the payload is made
//! durable before the log says that it counts. A write to a block of which the parent shows the rest puts down its own
//! sectors only and sets their bits; nothing is copied up.
//!
//! **A generation is half of the ring under an id of its own.** Its first entry is empty and durable before the header names
//! the id, so a header never names a log that is not there. When the half is full, its pages are written in place and the
//! empty entry of the next generation to the *other* half, with one flush; then the header names that one. Until then the
//! old run is whole, and replaying it again changes nothing. Nothing wraps, so readers with a simple search find it too.
//!
//! **Replay** (an open for writing of a dirty image) changes the file write id first, writes the pages in place, makes them
//! durable, and only then says in the headers that there is no log. A crash in it means doing it again.
//!
//! **A failure** to write a header, the log or the BAT, or to flush, stops the disk: nothing is acknowledged any more, and
//! the next open replays. A failed payload write is the guest's error alone; so is a file that cannot grow.
//!
//! # Bounds
//!
//! An image is untrusted input. Lengths are compared with the size of the file before memory is taken for them, arithmetic
//! is checked, one interval map proves that no byte has two owners, and the work to search a log is bounded. The paths in a
//! parent locator are followed only below the folders that the caller allows, see [`ParentResolver`].
//!
//! # Parents and children
//!
//! A child names its parent by the parent's *data write id*, which changes with the first write that a guest could see. So a
//! parent that was written is refused by its children ([`ErrorKind::ParentMismatch`]), never read wrongly. To keep it from
//! coming to that, children are looked for, because the format keeps no list of them:
//!
//! | before | where | unless |
//! |---|---|---|
//! | [`Builder::writable`], [`Builder::inactive`] | in the folder of the image | [`Builder::despite_children`] |
//! | [`Builder::resize`], [`Builder::merge`], and the same of a [`Disk`] in use | in all folders of the [`ParentResolver`] and below | the same |
//!
//! What is found is refused with [`ErrorKind::HasChildren`]. Nothing is looked for without [`Builder::parents`], nor where
//! [`ParentFiles::list`] cannot tell what there is.
//!
//! The disks of a chain may differ in size and in the size of their blocks. Behind the end of a parent there are zeros; what
//! a child gains by a resize reads as zeros even if its parent is longer; after a merge the disk is as large as the child.
//!
//! # A chain, from its base to a merge
//!
//! ```
//! use std::collections::BTreeMap;
//! use std::sync::Arc;
//! use blockio::{BlockDevice, ImageFile, MemoryDevice};
//! use vhdx::{Builder, ChildSpec, ParentResolver, Spec};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let file = || -> Arc<dyn ImageFile> { Arc::new(MemoryDevice::new(0)) };
//! let (base, child, top) = (file(), file(), file());
//! // On a host this is `HostFiles`: files below the folders that are named, and no others.
//! let folder = BTreeMap::from([
//!     ("/vms/base.vhdx".to_owned(), Arc::clone(&base)),
//!     ("/vms/child.avhdx".to_owned(), Arc::clone(&child)),
//! ]);
//! let parents = ParentResolver::new(Arc::new(folder)).root("/vms");
//!
//! vhdx::create(&base, &Spec::dynamic(1 << 30))?;
//! let image = Builder::open(Arc::clone(&base)).read_only()?;
//! let spec = ChildSpec::new(parents.paths("/vms/child.avhdx", "/vms/base.vhdx")?);
//! vhdx::create_child(&child, &image, &spec)?;
//!
//! let disk = Builder::open(Arc::clone(&child)).parents(parents, "/vms/child.avhdx").writable()?;
//! disk.write_at(0, &[1; 512])?; // one sector of a block; the parent shows the others
//! disk.snapshot(&top, "/vms/top.avhdx")?; // the guest goes on in `top`
//! disk.write_at(512, &[2; 512])?;
//! disk.merge_parent(&child, &base, &mut |_| ())?; // `child` may go
//! let mut sectors = [0; 1024];
//! disk.read_at(0, &mut sectors)?;
//! assert_eq!((sectors[0], sectors[512]), (1, 2));
//! assert_eq!(disk.parent().map(|base| base.parents()), Some(0));
//! disk.close()?;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod amend;
mod bat;
mod bitmap;
mod chain;
mod check;
mod children;
mod compact;
mod convert;
mod core;
mod cover;
mod create;
mod defects;
mod difference;
mod disk;
mod error;
mod exchange;
mod findings;
mod flush;
mod format;
mod grow;
mod guard;
mod header;
mod host;
mod image;
mod info;
mod load;
mod locator;
mod log;
mod map;
mod merge;
mod metadata;
mod moves;
mod mutation;
mod open;
mod owners;
mod pieces;
mod plan;
mod recover;
mod region;
mod repair;
mod replay;
mod resize;
mod resolve;
mod resolver;
mod running;
mod safe_size;
mod snapshot;
mod space;
mod trim;
mod view;
mod words;

pub use check::{Report, check};
pub use compact::{CompactProgress, CompactWatch, Compacted};
pub use convert::{DataMap, Progress, from_raw, to_raw};
pub use create::{ChildSpec, Spec, create, create_child};
pub use defects::Defect;
pub use difference::write_difference;
pub use disk::Disk;
pub use error::{ErrorKind, VhdxError};
pub use flush::Closed;
pub use guard::{ReadGuard, WriteGuard};
pub use host::HostFiles;
pub use image::Image;
pub use info::{BlockCounts, ImageKind, Info, LogInfo, ParentInfo, info};
pub use locator::ParentPaths;
pub use map::{MapExtent, Mapped};
pub use merge::merge;
#[doc(hidden)]
pub use mutation::Mutation;
pub use open::{Builder, Standby};
pub use repair::{Repaired, repair};
pub use resize::{NewSize, Resized, resize};
pub use resolve::{ReadSegment, WriteSegment};
pub use resolver::{FolderEntry, OpenFailure, ParentFiles, ParentResolver};
pub use safe_size::minimum_safe_bytes;
