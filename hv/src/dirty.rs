//! The pages that a move still has to send: those that the guest or a device has written since they were last taken.
//!
//! ```text
//!   KVM's log ------fetch--->  guest --.
//!                                       +--take a chunk--> its bits; KVM's log is cleared for those of the guest
//!   device bitmap --swap---->  device -'
//! ```
//! Pages are counted over RAM only, leaving out the hole. **Invariant (H4):** a bit leaves this set only by being taken,
//! and a page that is written after its bit was fetched is found by the next pass.

use crate::kvm::{KvmError, Machine};
use crate::memory::{GuestRam, PAGE_BYTES};

/// Pages of one chunk start and end at a multiple of this, or at the end of a piece of RAM.
pub const CHUNK_ALIGNMENT_PAGES: u64 = 64;
const WORD_BITS: u64 = 64;

/// What is written and not taken yet.
#[derive(Debug)]
pub(crate) struct WrittenPages {
    pieces: Vec<Piece>,
}

/// One piece of RAM, which is one memory slot of KVM.
#[derive(Debug)]
struct Piece {
    slot: u32,
    first_page: u64,
    pages: u64,
    /// Fetched from KVM's log, where they are still set.
    guest: Vec<u64>,
    device: Vec<u64>,
}

impl WrittenPages {
    /// Begins to track. What was written before counts for nothing: the first pass sends all of RAM.
    pub(crate) fn start(machine: &Machine, ram: &GuestRam) -> Result<Self, KvmError> {
        let mut first_page = 0;
        let mut pieces = Vec::new();
        for (slot, region) in (0..).zip(ram.regions()) {
            let pages = region.bytes / PAGE_BYTES;
            let words = usize::try_from(pages.div_ceil(WORD_BITS)).expect("fewer words than bytes of RAM");
            let (guest, device) = (vec![0; words], vec![0; words]);
            pieces.push(Piece { slot, first_page, pages, guest, device });
            first_page += pages;
        }
        machine.log_writes(true)?;
        drop(ram.take_device_writes());
        Ok(Self { pieces })
    }

    /// Begins a pass: gathers what was written. Gives the number of pages.
    pub(crate) fn fetch(&mut self, machine: &Machine, ram: &GuestRam) -> Result<u64, KvmError> {
        let mut pages = 0;
        let devices = ram.take_device_writes();
        for (piece, written) in self.pieces.iter_mut().zip(devices) {
            add(&mut piece.device, &written);
            add(&mut piece.guest, &machine.written_pages(piece.slot, piece.pages * PAGE_BYTES)?);
            let both = piece.guest.iter().zip(&piece.device).map(|(guest, device)| guest | device);
            pages += both.map(|word| u64::from(word.count_ones())).sum::<u64>();
        }
        Ok(pages)
    }

    /// Takes the bits of a chunk, right before it is read. `None` for a chunk that is not inside of one piece of RAM, or
    /// not aligned.
    pub(crate) fn take(
        &mut self,
        machine: &Machine,
        first_page: u64,
        pages: u64,
    ) -> Result<Option<Vec<u64>>, KvmError> {
        let Some((piece, first)) = self.find(first_page, pages) else { return Ok(None) };
        let from = usize::try_from(first / WORD_BITS).expect("inside of the bitmap");
        let words = from..from + usize::try_from(pages.div_ceil(WORD_BITS)).expect("inside of the bitmap");
        let guest = &mut piece.guest[words.clone()];
        if guest.iter().any(|word| *word != 0) {
            let count = u32::try_from(pages).expect("checked when it was found");
            machine.clear_written(piece.slot, first, count, guest)?;
        }
        let device = &mut piece.device[words];
        let bits = guest.iter().zip(&*device).map(|(guest, device)| guest | device).collect();
        guest.fill(0);
        device.fill(0);
        Ok(Some(bits))
    }

    /// Gathers what is left of a guest that is halted: a bit for each page of RAM. They stay in this set and in KVM's log, which
    /// takes time to clear: of a halted guest nothing has to be told apart any more.
    pub(crate) fn rest(&mut self, machine: &Machine, ram: &GuestRam) -> Result<Vec<u64>, KvmError> {
        self.fetch(machine, ram)?;
        let bits = |piece: &Piece| -> Vec<u64> {
            piece.guest.iter().zip(&piece.device).map(|(guest, device)| guest | device).collect()
        };
        Ok(self.pieces.iter().flat_map(bits).collect())
    }

    fn find(&mut self, first_page: u64, pages: u64) -> Option<(&mut Piece, u64)> {
        let end = first_page.checked_add(pages)?;
        let piece = self
            .pieces
            .iter_mut()
            .find(|piece| piece.first_page <= first_page && end <= piece.first_page + piece.pages)?;
        let first = first_page - piece.first_page;
        let ends_well = pages.is_multiple_of(CHUNK_ALIGNMENT_PAGES) || first + pages == piece.pages;
        let fits = first.is_multiple_of(CHUNK_ALIGNMENT_PAGES) && ends_well && u32::try_from(pages).is_ok();
        fits.then_some((piece, first))
    }
}

fn add(to: &mut [u64], bits: &[u64]) {
    for (word, more) in to.iter_mut().zip(bits) {
        *word |= more;
    }
}
