//! What is wrong with an image, collected while it is read.
//!
//! Opening stops at the first error; `check` wants them all. Both read through the same code and differ in what they do
//! with the list.

use crate::error::VhdxError;

/// Findings kept; a hostile image must not fill the memory with complaints.
const FINDINGS_MAX: usize = 1000;

/// Errors and warnings about one image.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// What makes the image unusable.
    pub(crate) errors: Vec<VhdxError>,
    /// What is odd but harmless for reading.
    pub(crate) warnings: Vec<String>,
    /// What is harmless for reading, but would be destroyed by writing.
    pub(crate) write_blockers: Vec<VhdxError>,
    /// Whether block states of a draft of the format are read as what they became.
    pub(crate) tolerate_draft_states: bool,
    /// How many more there were.
    pub(crate) dropped: u64,
}

impl Findings {
    /// Notes what makes the image unusable.
    pub(crate) fn error(&mut self, error: VhdxError) {
        if self.errors.len() < FINDINGS_MAX { self.errors.push(error) } else { self.dropped += 1 }
    }

    /// Notes something odd.
    pub(crate) fn warn(&mut self, text: impl Into<String>) {
        if self.warnings.len() < FINDINGS_MAX { self.warnings.push(text.into()) } else { self.dropped += 1 }
    }

    /// The same for what may occur millions of times: told only while there is room for it.
    pub(crate) fn warn_with(&mut self, text: impl FnOnce() -> String) {
        if self.warnings.len() < FINDINGS_MAX { self.warnings.push(text()) } else { self.dropped += 1 }
    }

    /// Whether no further error would be kept.
    pub(crate) fn is_full(&self) -> bool {
        self.errors.len() >= FINDINGS_MAX
    }

    /// Notes a reserved field with a value: readers may ignore it, a writer would destroy what it means.
    pub(crate) fn unknown_meaning(&mut self, error: VhdxError) {
        self.warn(error.to_string());
        self.block_writing(error);
    }

    /// Notes something that only a reader may ignore.
    pub(crate) fn block_writing(&mut self, error: VhdxError) {
        if self.write_blockers.is_empty() {
            self.write_blockers.push(error);
        }
    }

    /// The first error, for an open.
    pub(crate) fn into_result(self) -> Result<Self, VhdxError> {
        match self.errors.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(Self { errors: Vec::new(), ..self }),
        }
    }
}
