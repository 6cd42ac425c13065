//! The VHDX virtual disk format over any block device.
#![forbid(unsafe_code)]

mod bat;
mod check;
mod convert;
mod core;
mod create;
mod disk;
mod error;
mod findings;
mod flush;
mod format;
mod grow;
mod guard;
mod header;
mod image;
mod info;
mod load;
mod log;
mod metadata;
mod open;
mod pieces;
mod recover;
mod region;
mod replay;
mod resolve;
mod space;
mod view;

pub use check::{Report, check};
pub use convert::{DataMap, Progress, from_raw, to_raw};
pub use create::{Spec, create};
pub use disk::Disk;
pub use error::{ErrorKind, VhdxError};
pub use flush::Closed;
pub use guard::{ReadGuard, WriteGuard};
pub use image::Image;
pub use info::{BlockCounts, ImageKind, Info, LogInfo, info};
pub use open::{Builder, Standby};
pub use resolve::{ReadSegment, WriteSegment};
