//! Oracle 1: a file of blocks. Each write puts a number, its writer and the writer's life into one block and waits until it
//! is stable; whoever reads the block later, on whichever node, must find that number or one attempted after it.
//!
//! **Invariant:** one write at a time is under way in a file, so after a death at most one block is in doubt; what is found
//! in it then is what it must hold from then on: a write that lands after the fence is seen.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Dice;

/// Blocks of a file.
pub(super) const BLOCKS: u64 = 256;
const BLOCK_BYTES: usize = 4096;
const PIECE_BYTES: usize = 16 * BLOCK_BYTES;
const WORDS: usize = BLOCK_BYTES / 8;

/// What one file must hold.
#[derive(Debug)]
pub(super) struct Register {
    writer: u64,
    /// The last number that was acknowledged, block by block.
    acked: Vec<AtomicU64>,
    /// The last number that was tried.
    attempted: Vec<AtomicU64>,
    next: AtomicU64,
}

impl Register {
    pub(super) fn new(writer: u64) -> Self {
        let zeros = || (0..BLOCKS).map(|_| AtomicU64::new(0)).collect();
        Self { writer, acked: zeros(), attempted: zeros(), next: AtomicU64::new(1) }
    }

    /// Writes one block and reads another back.
    pub(super) fn step(&self, file: &File, life: u64, dice: &mut Dice) -> io::Result<()> {
        let block = dice.below(BLOCKS);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.of(&self.attempted, block).store(number, Ordering::SeqCst);
        file.write_all_at(&self.bytes(block, life, number), block * BLOCK_BYTES as u64)?;
        file.sync_data()?;
        self.of(&self.acked, block).store(number, Ordering::SeqCst);
        self.check_block(file, dice.below(BLOCKS)).map(drop)
    }

    /// Reads all blocks through `path`, while they may be written.
    pub(super) fn check(&self, path: &Path) -> io::Result<()> {
        self.numbers(path).map(drop)
    }

    /// The writer has died: what is found in the block that was in doubt counts from now on.
    pub(super) fn settle(&self, path: &Path) -> io::Result<()> {
        for (block, found) in self.numbers(path)?.into_iter().enumerate() {
            self.acked[block].store(found, Ordering::SeqCst);
            self.attempted[block].store(found, Ordering::SeqCst);
        }
        Ok(())
    }

    /// The numbers of all blocks: each at least what was acknowledged before, at most what was tried since.
    fn numbers(&self, path: &Path) -> io::Result<Vec<u64>> {
        let all =
            |of: &[AtomicU64]| of.iter().map(|number| number.load(Ordering::SeqCst)).collect::<Vec<_>>();
        let at_least = all(&self.acked);
        let bytes = all_blocks(&File::open(path)?)?;
        let at_most = all(&self.attempted);
        let mut blocks = bytes.chunks(BLOCK_BYTES);
        let bounds = at_least.into_iter().zip(at_most);
        (0..BLOCKS)
            .zip(bounds)
            .map(|(block, bounds)| self.judge(block, blocks.next().unwrap_or_default(), bounds))
            .collect()
    }

    fn check_block(&self, file: &File, block: u64) -> io::Result<u64> {
        let at_least = self.of(&self.acked, block).load(Ordering::SeqCst);
        let mut bytes = vec![0; BLOCK_BYTES];
        read_or_zeros(file, &mut bytes, block * BLOCK_BYTES as u64)?;
        let at_most = self.of(&self.attempted, block).load(Ordering::SeqCst);
        self.judge(block, &bytes, (at_least, at_most))
    }

    fn judge(&self, block: u64, bytes: &[u8], (at_least, at_most): (u64, u64)) -> io::Result<u64> {
        let lost =
            |what: String| io::Error::other(format!("LOST: block {block} of writer {}: {what}", self.writer));
        let found = self.number_in(bytes, block).map_err(lost)?;
        if (at_least..=at_most).contains(&found) {
            return Ok(found);
        }
        Err(lost(format!("write {found} is there, {at_least} was acknowledged and {at_most} tried last")))
    }

    fn of<'a>(&self, numbers: &'a [AtomicU64], block: u64) -> &'a AtomicU64 {
        &numbers[usize::try_from(block).expect("a block of the file")]
    }

    fn bytes(&self, block: u64, life: u64, number: u64) -> Vec<u8> {
        let words = [self.writer, life, block, number];
        (0..WORDS).flat_map(|at| (words[at % 4] ^ ((at as u64 / 4) << 48)).to_le_bytes()).collect()
    }

    /// The number in a block whose words all belong together; 0 for one that was never written.
    fn number_in(&self, bytes: &[u8], block: u64) -> Result<u64, String> {
        let word = |at: usize| u64::from_le_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("8 bytes"));
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(0);
        }
        if bytes.len() < BLOCK_BYTES {
            return Err(format!("only {} bytes of it are there", bytes.len()));
        }
        let (life, number) = (word(1), word(3));
        if bytes == self.bytes(block, life, number) {
            return Ok(number);
        }
        Err(format!("words {:x?} at its begin, torn or of another block", [word(0), life, word(2), number]))
    }
}

/// Reads the file in pieces that the kernel asks for at once. It may cut a longer read anywhere, in the middle of a block too, and
/// a block whose halves are read one after the other may be written in between.
fn all_blocks(file: &File) -> io::Result<Vec<u8>> {
    let len = BLOCK_BYTES * usize::try_from(BLOCKS).expect("a file that fits into memory");
    let mut bytes = vec![0; len];
    for (piece, at) in bytes.chunks_mut(PIECE_BYTES).zip((0_u64..).step_by(PIECE_BYTES)) {
        read_or_zeros(file, piece, at)?;
    }
    Ok(bytes)
}

/// Reads what the file has, zeros beyond its end.
fn read_or_zeros(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], at + done as u64)? {
            0 => return Ok(()),
            read => done += read,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tempfile::NamedTempFile;

    use super::*;

    #[test]
    fn a_lost_a_torn_and_a_late_write_are_noticed() {
        let place = NamedTempFile::new().expect("a file");
        let (register, mut dice) = (Register::new(3), Dice::new(1));
        for _ in 0..500 {
            register.step(place.as_file(), 1, &mut dice).expect("good");
        }
        register.check(place.path()).expect("all there");
        let block =
            (0..BLOCKS).find(|at| register.acked[usize::try_from(*at).unwrap()].load(Ordering::SeqCst) > 0);
        let block = block.expect("one was written");
        let at = block * BLOCK_BYTES as u64;
        let mut good = vec![0; BLOCK_BYTES];
        place.as_file().read_exact_at(&mut good, at).expect("read");
        for bad in [register.bytes(block, 1, 0), register.bytes(block, 2, 10_000), vec![0; BLOCK_BYTES]] {
            place.as_file().write_all_at(&bad, at).expect("written");
            assert!(register.check(place.path()).is_err());
        }
        place.as_file().write_all_at(&good[..512], at).expect("written");
        assert!(register.check(place.path()).is_err(), "the rest of it is missing");
    }
}
