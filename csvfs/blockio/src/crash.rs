//! What a power cut leaves of writes that were not flushed.
//!
//! A disk may have written any part of them, in any order, in units of one sector. Only what a flush (or a forced
//! write) covered is certain.

use std::ops::Range;
use std::sync::Arc;

/// Smallest unit that a disk writes as a whole.
pub(crate) const SECTOR_BYTES: usize = 512;

/// A change of a device's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes written.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes.
        bytes: Arc<[u8]>,
    },
    /// A range zeroed.
    Zero {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// A range given up. Its old content may be read afterwards, so this changes nothing.
    Discard {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// A new size.
    SetLen {
        /// Bytes.
        size_bytes: u64,
    },
}

impl Change {
    /// Whether the order of the two matters.
    pub(crate) fn touches(&self, other: &Self) -> bool {
        match (self.range(), other.range()) {
            (Some(a), Some(b)) => a.start < b.end && b.start < a.end,
            _ => true,
        }
    }

    /// The bytes that it is about; none for the size.
    fn range(&self) -> Option<Range<u64>> {
        match self {
            Self::Write { offset, bytes } => Some(*offset..offset.saturating_add(bytes.len() as u64)),
            Self::Zero { offset, len } | Self::Discard { offset, len } => {
                Some(*offset..offset.saturating_add(*len))
            }
            Self::SetLen { .. } => None,
        }
    }
}

/// Which of the changes that were not flushed survive a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unflushed {
    /// All of them.
    All,
    /// None.
    None,
    /// Each as a whole, or not at all, as the seed decides.
    Subset {
        /// Same seed, same choice.
        seed: u64,
    },
    /// Each sector of each, as the seed decides.
    Torn {
        /// Same seed, same choice.
        seed: u64,
    },
}

/// Decides, change by change, what is left.
pub(crate) struct Survivors {
    choice: Unflushed,
    state: u64,
    unit_bytes: usize,
}

impl Survivors {
    /// `unit_bytes`: what the device writes as a whole.
    pub(crate) fn new(choice: Unflushed, unit_bytes: usize) -> Self {
        let state = match choice {
            Unflushed::Subset { seed } | Unflushed::Torn { seed } => seed,
            Unflushed::All | Unflushed::None => 0,
        };
        Self { choice, state, unit_bytes: unit_bytes.max(SECTOR_BYTES) }
    }

    /// The parts of an unflushed change that survive.
    pub(crate) fn of(&mut self, change: &Change) -> Vec<Change> {
        match (self.choice, change) {
            (Unflushed::All, _) => vec![change.clone()],
            (Unflushed::None, _) => Vec::new(),
            (Unflushed::Torn { .. }, Change::Write { offset, bytes }) => self.tear(*offset, bytes),
            (Unflushed::Subset { .. } | Unflushed::Torn { .. }, _) => {
                if self.toss() {
                    vec![change.clone()]
                } else {
                    Vec::new()
                }
            }
        }
    }

    fn tear(&mut self, offset: u64, bytes: &[u8]) -> Vec<Change> {
        let unit = self.unit_bytes;
        let kept = bytes.chunks(unit).enumerate().filter(|_| self.toss());
        kept.map(|(n, part)| Change::Write { offset: offset + (n * unit) as u64, bytes: part.into() })
            .collect()
    }

    /// Splitmix64: every seed, also 0, gives a good sequence.
    fn toss(&mut self) -> bool {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) & 1 == 1
    }
}
