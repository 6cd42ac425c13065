//! The moments of a record at which the power could be cut, one after the other, and the images that each could leave.
//!
//! ```text
//!   record:  W0  W1  F{W0,W1}  W2  W3  F{W3}  W4
//!                                      ^ cut 5: W0 W1 are certain; W2 and W3 are pending: any part of them may survive
//! ```
//! What is certain is put into one device once and for all, and an image shares its pages, so thousands of images cost
//! little more than their differences.
//!
//! **Invariant:** changes reach an image in the order of the record, so that an older write never covers a newer one.

use std::collections::BTreeSet;
use std::fmt;

use crate::crash::{Change, SECTOR_BYTES, Survivors, Unflushed};
use crate::{MemoryDevice, Record};

/// Walks through a record; see the module.
pub struct Cuts {
    records: Vec<Record>,
    /// The content after the first `settled` records, none of which is pending.
    certain: MemoryDevice,
    settled: usize,
    prefix: usize,
    pending: BTreeSet<usize>,
}

impl Cuts {
    pub(crate) fn new(base: MemoryDevice, records: Vec<Record>) -> Self {
        Self { records, certain: base, settled: 0, prefix: 0, pending: BTreeSet::new() }
    }

    /// Records before the cut.
    #[must_use]
    pub fn prefix(&self) -> usize {
        self.prefix
    }

    /// The last record before the cut.
    #[must_use]
    pub fn newest(&self) -> Option<&Record> {
        self.prefix.checked_sub(1).map(|newest| &self.records[newest])
    }

    /// Changes that no flush has covered, oldest first. Discards are none: they may change nothing at any time.
    #[must_use]
    pub fn pending(&self) -> Vec<&Change> {
        self.pending.iter().map(|at| self.change(*at)).collect()
    }

    /// Moves the cut behind one more record. False at the end.
    pub fn advance(&mut self) -> bool {
        let Some(record) = self.records.get(self.prefix) else { return false };
        match record {
            Record::Change(Change::Discard { .. }) => (),
            Record::Change(_) => {
                self.pending.insert(self.prefix);
            }
            Record::Flush { covers } => self.pending.retain(|at| !covers.contains(at)),
        }
        self.prefix += 1;
        let oldest_pending = self.pending.first().copied().unwrap_or(self.prefix);
        while self.settled < oldest_pending {
            if let Record::Change(change) = &self.records[self.settled] {
                self.certain.apply(change);
            }
            self.settled += 1;
        }
        true
    }

    /// The image of which `keep` says what survives: it gets the place of a change among [`Self::pending`], and the change.
    pub fn image(&self, mut keep: impl FnMut(usize, &Change) -> Vec<Change>) -> MemoryDevice {
        let image = self.certain.fork();
        let mut number = 0;
        for at in self.settled..self.prefix {
            let Record::Change(change) = &self.records[at] else { continue };
            if self.pending.contains(&at) {
                keep(number, change).iter().for_each(|change| image.apply(change));
                number += 1;
            } else {
                image.apply(change);
            }
        }
        image
    }

    /// The image after `choice`.
    #[must_use]
    pub fn image_after(&self, choice: Unflushed) -> MemoryDevice {
        let mut survivors = Survivors::new(choice, SECTOR_BYTES);
        self.image(|_, change| survivors.of(change))
    }

    fn change(&self, at: usize) -> &Change {
        match &self.records[at] {
            Record::Change(change) => change,
            Record::Flush { .. } => unreachable!("only changes are pending"),
        }
    }
}

impl fmt::Debug for Cuts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cuts")
            .field("prefix", &self.prefix)
            .field("pending", &self.pending)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockDevice, ImageFile, Recorder};

    #[test]
    fn every_cut_gives_the_image_that_replaying_its_prefix_gives() {
        let recorder = Recorder::new(MemoryDevice::with_block_bytes(4096, 1));
        recorder.write_at(0, &[1; 1024]).expect("it works");
        recorder.flush().expect("it works");
        recorder.write_at(512, &[2; 1024]).expect("it works");
        recorder.set_len(2048).expect("it works");
        recorder.write_at(0, &[3; 2048]).expect("it works");
        recorder.flush().expect("it works");
        recorder.set_len(8192).expect("it works");
        recorder.write_at(4096, &[4; 512]).expect("it works");
        let mut cuts = recorder.cuts();
        while cuts.advance() {
            for choice in
                [Unflushed::All, Unflushed::None, Unflushed::Subset { seed: 3 }, Unflushed::Torn { seed: 4 }]
            {
                let expected = recorder.replay_prefix(cuts.prefix(), choice).to_bytes();
                assert!(cuts.image_after(choice).to_bytes() == expected, "cut {}, {choice:?}", cuts.prefix());
            }
        }
    }

    #[test]
    fn an_image_shares_nothing_that_it_writes() {
        let original = MemoryDevice::new(8192);
        original.write_at(0, &[1; 8192]).expect("it works");
        let copy = original.fork();
        copy.write_at(512, &[2; 512]).expect("it works");
        assert_eq!(original.to_bytes(), [1; 8192]);
        assert_eq!(copy.to_bytes()[512..1024], [2; 512]);
    }
}
