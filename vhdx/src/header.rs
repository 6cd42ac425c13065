//! The two headers: which is current, and how the next one is written.
//!
//! ```text
//! slot 0: sequence 7        update: take the current one, sequence + 1, write the *other* slot, flush
//! slot 1: sequence 8 <- current
//! ```
//! **Invariant:** a header write never touches the current slot, so one torn sector never hurts both.

use blockio::ImageFile;
use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use crate::error::{VhdxError, corrupt, doing};
use crate::format::{HEADER_OFFSETS, Header, LOG_BYTES_MAX, MIB, checksum_without};
use crate::view::View;

/// The current header and where it lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CurrentHeader {
    /// Index of the slot that holds it.
    pub(crate) slot: usize,
    /// Its fields.
    pub(crate) header: Header,
    /// Whether the other slot holds a valid header too.
    pub(crate) both_valid: bool,
}

impl Header {
    /// A header for a new file.
    pub(crate) fn new(log_offset: u64, log_length: u32) -> Self {
        Self {
            signature: *b"head",
            checksum: 0.into(),
            sequence: 0.into(),
            file_write_id: Uuid::new_v4().to_bytes_le(),
            data_write_id: Uuid::new_v4().to_bytes_le(),
            log_id: [0; 16],
            log_version: 0.into(),
            version: 1.into(),
            log_length: log_length.into(),
            log_offset: log_offset.into(),
            reserved: [0; 4016],
        }
    }

    /// The same with a sequence number and a checksum that fits.
    pub(crate) fn sealed(mut self, sequence: u64) -> Self {
        self.sequence = sequence.into();
        self.reserved = [0; 4016];
        self.checksum = checksum_without(self.as_bytes(), 4).into();
        self
    }

    fn is_valid(&self) -> bool {
        self.signature == *b"head" && self.checksum.get() == checksum_without(self.as_bytes(), 4)
    }

    /// The id of the live log, if there is one.
    pub(crate) fn log_id(&self) -> Option<Uuid> {
        let id = Uuid::from_bytes_le(self.log_id);
        (!id.is_nil()).then_some(id)
    }
}

impl CurrentHeader {
    /// Reads both slots and picks the current one.
    pub(crate) fn read(view: &View) -> Result<Self, VhdxError> {
        let [first, second] = [read_slot(view, 0)?, read_slot(view, 1)?];
        let current = select(&first, &second)?;
        current.check_version()?;
        current.check_log_area(view.file_bytes)?;
        Ok(current)
    }

    /// Whether somebody wrote a newer header since this one was read.
    pub(crate) fn is_outdated(&self, view: &View) -> Result<bool, VhdxError> {
        Ok(Self::read(view)?.header.sequence != self.header.sequence)
    }

    /// The ring's place in the file: offset and length.
    pub(crate) fn log_area(&self) -> (u64, u64) {
        (self.header.log_offset.get(), u64::from(self.header.log_length.get()))
    }

    fn offset(&self) -> u64 {
        HEADER_OFFSETS[self.slot]
    }

    fn check_version(&self) -> Result<(), VhdxError> {
        let (version, log_version) = (self.header.version.get(), self.header.log_version.get());
        if version != 1 {
            return Err(VhdxError::Unsupported {
                what: format!("VHDX version {version} in the header at {:#x}", self.offset()),
                hint: "only version 1 is known; convert the image with the tool that made it",
            });
        }
        if log_version != 0 && self.header.log_id().is_some() {
            return Err(VhdxError::Unsupported {
                what: format!("log version {log_version} in the header at {:#x}", self.offset()),
                hint: "open the image once with the tool that wrote it, so that its log is replayed",
            });
        }
        Ok(())
    }

    fn check_log_area(&self, file_bytes: u64) -> Result<(), VhdxError> {
        let (offset, length) = self.log_area();
        let bad = |found: String| Err(corrupt("log location in the header", self.offset(), found));
        if length == 0 {
            return match self.header.log_id() {
                None => Ok(()),
                Some(id) => bad(format!("log id {id} is set, but the log has no length")),
            };
        }
        if !length.is_multiple_of(MIB) || !offset.is_multiple_of(MIB) || offset < MIB {
            return bad(format!(
                "log of {length:#x} bytes at {offset:#x}; both must be multiples of 1 MiB, from 1 MiB on"
            ));
        }
        if length > LOG_BYTES_MAX {
            return Err(VhdxError::Limit { what: "the log length", found: length, bound: LOG_BYTES_MAX });
        }
        if offset.checked_add(length).is_none_or(|end| end > file_bytes) {
            return bad(format!(
                "log of {length:#x} bytes at {offset:#x} ends past the end of the file at {file_bytes:#x}"
            ));
        }
        Ok(())
    }

    /// Writes `change`d fields into the other slot, which then is the current one. Not flushed.
    ///
    /// Both slots are valid afterwards only if both were written once in the session; see [`Self::catch_up`].
    pub(crate) fn update(
        &mut self,
        file: &dyn ImageFile,
        change: impl FnOnce(&mut Header),
    ) -> Result<(), VhdxError> {
        let next = self.header.sequence.get().checked_add(1).ok_or_else(|| {
            corrupt(
                "sequence number of the header",
                self.offset(),
                "it is 2^64 - 1, so no newer header can exist",
            )
        })?;
        let mut header = self.header;
        change(&mut header);
        let header = header.sealed(next);
        let slot = 1 - self.slot;
        file.write_at(HEADER_OFFSETS[slot], header.as_bytes())
            .map_err(doing(format!("writing the header at {:#x}", HEADER_OFFSETS[slot])))?;
        (self.slot, self.header) = (slot, header);
        Ok(())
    }

    /// Writes the current content into the other slot too, so that either serves alone. Not flushed.
    pub(crate) fn catch_up(&mut self, file: &dyn ImageFile) -> Result<(), VhdxError> {
        self.update(file, |_| ())
    }
}

fn read_slot(view: &View, slot: usize) -> Result<Option<Header>, VhdxError> {
    let bytes = view.read(HEADER_OFFSETS[slot], 4096, "header")?;
    let header = Header::read_from_bytes(&bytes).expect("4096 bytes were read");
    Ok(header.is_valid().then_some(header))
}

fn select(first: &Option<Header>, second: &Option<Header>) -> Result<CurrentHeader, VhdxError> {
    let at = |slot, header: &Header, both_valid| CurrentHeader { slot, header: *header, both_valid };
    match (first, second) {
        (None, None) => {
            Err(corrupt("header", HEADER_OFFSETS[0], "neither copy has a valid signature and checksum"))
        }
        (Some(header), None) => Ok(at(0, header, false)),
        (None, Some(header)) => Ok(at(1, header, false)),
        (Some(a), Some(b)) if a.sequence.get() > b.sequence.get() => Ok(at(0, a, true)),
        (Some(a), Some(b)) if a.sequence.get() < b.sequence.get() => Ok(at(1, b, true)),
        // Disk2VHD writes two identical copies.
        (Some(a), Some(b)) if a == b => Ok(at(0, a, true)),
        (Some(a), Some(_)) => Err(corrupt(
            "header",
            HEADER_OFFSETS[0],
            format!(
                "both copies have sequence number {} but differ, so neither is current",
                a.sequence.get()
            ),
        )),
    }
}
