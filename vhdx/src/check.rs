//! Proving that an image is sound, or naming everything that is not.
//!
//! The same code reads the image as for an open; here it goes on after the first error. What is proved: every structure has
//! its checksum and lies inside the file, every BAT entry has a lawful state, and no byte of the file has two owners.
//!
//! **Invariant:** a check writes nothing. A dirty log is replayed in memory.

use std::sync::Arc;

use blockio::ImageFile;

use crate::defects::{self, Defect};
use crate::error::VhdxError;
use crate::findings::Findings;
use crate::info::{Info, describe};
use crate::load::{Loaded, LogPolicy};

/// What a check found.
#[derive(Clone, Debug)]
pub struct Report {
    /// What makes the image unusable. Empty: the image is sound.
    pub errors: Vec<VhdxError>,
    /// What a repair would put right; it does no harm to reading.
    pub defects: Vec<Defect>,
    /// What is odd, but does no harm to reading.
    pub warnings: Vec<String>,
    /// Findings beyond those listed.
    pub more: u64,
    /// What the image is, as far as it could be read.
    pub info: Option<Info>,
}

impl Report {
    /// Whether the image is sound.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.errors.is_empty()
    }
}

/// Checks the image in `file`. Changes nothing.
#[must_use]
pub fn check(file: &Arc<dyn ImageFile>) -> Report {
    let (mut findings, mut defects) = (Findings::default(), Vec::new());
    let info = match Loaded::read(file, LogPolicy::InMemory, &mut findings) {
        Ok(loaded) => {
            match defects::find(&loaded) {
                Ok(found) => defects = found,
                Err(error) => findings.error(error),
            }
            Some(describe(&loaded, Vec::new()))
        }
        Err(error) => {
            findings.error(error);
            None
        }
    };
    Report { errors: findings.errors, defects, warnings: findings.warnings, more: findings.dropped, info }
}
