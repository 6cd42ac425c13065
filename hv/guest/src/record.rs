//! The records on the scratch disk: what they look like, and which of them an acknowledgement promises.
//!
//! ```text
//!  0      8     16         24           28     32        40         48 ................... 511
//!  magic  lba   sequence   generation   seed   pattern   checksum   pattern, 58 times          all little-endian
//! ```
//! `pattern = mix(lba + mix(sequence + mix(generation << 32 | seed)))`, `checksum = mix(pattern ^ magic)`.
//! Sequence n (from 1) writes record `n * STRIDE mod range`, all sectors of it.
//!
//! **Invariant:** after `ack gen=G seq=N` each record that sequences 1 to N reached holds the last of them or a later one.

use std::io::{self, Read};

/// First eight bytes of a sector: `CSVREC01`.
pub const RECORD_MAGIC: u64 = u64::from_le_bytes(*b"CSVREC01");
/// Step of the walk in records; a prime above every range, so all records are visited before one comes again.
pub const STRIDE: u64 = 1_000_003;
/// Bytes of a sector.
pub const SECTOR_BYTES: usize = 512;
/// Largest range in records.
const RANGE_MAX: u64 = 1_000_000;
/// How many problems a report lists; the rest is only counted.
const PROBLEMS_MAX: usize = 16;

/// How the guest was told to lay out its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Records on the disk (`range=`).
    pub range: u64,
    /// Sectors in a record (`sectors=`).
    pub sectors: u64,
    /// Which VM (`seed=`).
    pub seed: u32,
}

/// An acknowledgement line of the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ack {
    /// Boot of the VM (`gen=`).
    pub generation: u32,
    /// Every record up to this sequence is on stable media.
    pub sequence: u64,
}

/// What the first 48 bytes of a sector say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sector {
    /// Its own address in sectors.
    pub lba: u64,
    /// The write that made it.
    pub sequence: u64,
    /// Boot of the VM.
    pub generation: u32,
    /// Which VM.
    pub seed: u32,
}

/// What is wrong with a sector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Address of the sector.
    pub lba: u64,
    /// What was found and what was expected.
    pub what: String,
}

/// Outcome of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Records that the acknowledgement promises.
    pub records_promised: u64,
    /// Records with valid content, promised or not.
    pub records_found: u64,
    /// Highest sequence of the acknowledged generation that is on the disk.
    pub sequence_max: u64,
    /// Number of problems.
    pub problem_count: u64,
    /// The first of them.
    pub problems: Vec<Problem>,
}

/// Why a disk could not be checked at all.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The layout is none that the guest accepts.
    #[error("a layout of {range} records of {sectors} sectors is out of bounds")]
    Layout {
        /// Records.
        range: u64,
        /// Sectors of each.
        sectors: u64,
    },
    /// The image ended or could not be read.
    #[error("reading record {record} of the image failed")]
    Read {
        /// Number of the record.
        record: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Report {
    /// Whether everything that was promised is there, and nothing is torn.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.problem_count == 0
    }

    fn add(&mut self, lba: u64, what: String) {
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(Problem { lba, what });
        }
    }
}

/// The finaliser of splitmix64.
const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Sector {
    fn pattern(&self) -> u64 {
        let key = u64::from(self.generation) << 32 | u64::from(self.seed);
        mix(self.lba.wrapping_add(mix(self.sequence.wrapping_add(mix(key)))))
    }

    /// The bytes that the guest writes for this sector.
    #[must_use]
    pub fn encode(&self) -> [u8; SECTOR_BYTES] {
        let mut bytes = [0; SECTOR_BYTES];
        let pattern = self.pattern();
        let head = [
            RECORD_MAGIC,
            self.lba,
            self.sequence,
            u64::from(self.seed) << 32 | u64::from(self.generation),
            pattern,
            mix(pattern ^ RECORD_MAGIC),
        ];
        for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&head.get(at).unwrap_or(&pattern).to_le_bytes());
        }
        bytes
    }

    /// Reads a sector: `Ok(None)` when nothing was ever written there (all zeros).
    ///
    /// # Errors
    /// What is wrong with its content.
    pub fn decode(bytes: &[u8; SECTOR_BYTES]) -> Result<Option<Self>, String> {
        let word = |at: usize| {
            u64::from_le_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("eight bytes were cut out"))
        };
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        if word(0) != RECORD_MAGIC {
            return Err(format!("no record: it starts with {:#018x}", word(0)));
        }
        let (generation, seed) = (low_half(word(3)), low_half(word(3) >> 32));
        let sector = Self { lba: word(1), sequence: word(2), generation, seed };
        if sector.encode() != *bytes {
            return Err(format!("torn or damaged content of sequence {}", sector.sequence));
        }
        Ok(Some(sector))
    }
}

fn low_half(word: u64) -> u32 {
    u32::try_from(word & 0xffff_ffff).expect("the upper half was masked out")
}

/// The last sequence up to `acked` that wrote each record, 0 where none did.
#[must_use]
pub fn expected_after_ack(acked: u64, range: u64) -> Vec<u64> {
    let mut last = vec![0; usize::try_from(range.min(RANGE_MAX)).unwrap_or(0)];
    // The walk repeats after `range` steps, so older sequences were all written over.
    for sequence in acked.saturating_sub(range) + 1..=acked {
        let record = u128::from(sequence) * u128::from(STRIDE) % u128::from(range.max(1));
        if let Some(slot) = usize::try_from(record).ok().and_then(|record| last.get_mut(record)) {
            *slot = sequence;
        }
    }
    last
}

/// The last complete acknowledgement in a console's text.
#[must_use]
pub fn last_ack(console: &[u8]) -> Option<Ack> {
    let complete = &console[..console.iter().rposition(|byte| *byte == b'\n')?];
    complete.rsplit(|byte| *byte == b'\n').find_map(|line| parse_ack(std::str::from_utf8(line).ok()?))
}

fn parse_ack(line: &str) -> Option<Ack> {
    let (generation, sequence) = line.trim_end().strip_prefix("ack gen=")?.split_once(" seq=")?;
    Some(Ack { generation: generation.parse().ok()?, sequence: sequence.parse().ok()? })
}

/// The sum that the guest prints for the first `bytes` of its read-only disk (`verify ... bytes=N sum=S`).
#[must_use]
pub fn span_sum(bytes: &[u8]) -> u64 {
    const CHUNK_BYTES: usize = 16384;
    bytes.chunks_exact(CHUNK_BYTES).zip(0_u64..).fold(0, |total, (chunk, index)| {
        let sum = chunk.chunks_exact(8).fold(index, |sum, word| {
            let word = u64::from_le_bytes(word.try_into().expect("chunks of eight bytes"));
            sum.rotate_left(5).wrapping_add(word)
        });
        mix(total.wrapping_add(sum))
    })
}

/// Checks a raw image of the scratch disk, from its first byte, against what was acknowledged.
///
/// # Errors
/// When the image cannot be read or the layout is impossible; what is wrong on the disk is in the report.
pub fn verify_image(mut image: impl Read, layout: Layout, acked: Ack) -> Result<Report, ImageError> {
    let Layout { range, sectors, .. } = layout;
    if !(1..=RANGE_MAX).contains(&range) || !(1..=8).contains(&sectors) {
        return Err(ImageError::Layout { range, sectors });
    }
    let mut report = Report::default();
    let mut bytes = [[0; SECTOR_BYTES]; 8];
    for (record, promised) in (0..).zip(expected_after_ack(acked.sequence, range)) {
        let parts = &mut bytes[..usize::try_from(sectors).expect("at most 8")];
        for part in parts.iter_mut() {
            image.read_exact(part).map_err(|source| ImageError::Read { record, source })?;
        }
        check_record(&mut report, layout, acked, record, promised, parts);
    }
    Ok(report)
}

fn check_record(
    report: &mut Report,
    layout: Layout,
    acked: Ack,
    record: u64,
    promised: u64,
    parts: &[[u8; SECTOR_BYTES]],
) {
    report.records_promised += u64::from(promised > 0);
    let mut valid = 0;
    for (lba, part) in (record * layout.sectors..).zip(parts) {
        match Sector::decode(part) {
            Err(what) => report.add(lba, what),
            Ok(None) if promised > 0 => {
                report.add(lba, format!("empty, sequence {promised} was acknowledged"));
            }
            Ok(None) => {}
            Ok(Some(found)) => match misplaced(layout, acked, lba, promised, found) {
                Some(what) => report.add(lba, what),
                None => {
                    valid += 1;
                    if found.generation == acked.generation {
                        report.sequence_max = report.sequence_max.max(found.sequence);
                    }
                }
            },
        }
    }
    report.records_found += u64::from(valid == layout.sectors);
}

/// Why a sector with sound content must not be where it is.
fn misplaced(layout: Layout, acked: Ack, lba: u64, promised: u64, found: Sector) -> Option<String> {
    let record = lba / layout.sectors;
    if found.lba != lba {
        return Some(format!("holds the sector of lba {}", found.lba));
    }
    if found.seed != layout.seed {
        return Some(format!("written by the VM with seed {}, not {}", found.seed, layout.seed));
    }
    let walked = u128::from(found.sequence) * u128::from(STRIDE) % u128::from(layout.range);
    if found.sequence == 0 || walked != u128::from(record) {
        return Some(format!("sequence {} does not belong to record {record}", found.sequence));
    }
    let reached = (found.generation, found.sequence);
    if promised > 0 && reached < (acked.generation, promised) {
        return Some(format!(
            "holds generation {} sequence {}, but {} {promised} was acknowledged",
            reached.0, reached.1, acked.generation
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout { range: 64, sectors: 2, seed: 7 };

    /// The disk of a guest that wrote sequences 1 to `last` in one generation.
    fn disk_after(last: u64) -> Vec<u8> {
        let mut disk = vec![0; usize::try_from(LAYOUT.range * LAYOUT.sectors).unwrap() * SECTOR_BYTES];
        for sequence in 1..=last {
            let record = sequence * STRIDE % LAYOUT.range;
            for lba in record * LAYOUT.sectors..(record + 1) * LAYOUT.sectors {
                let at = usize::try_from(lba).unwrap() * SECTOR_BYTES;
                let sector = Sector { lba, sequence, generation: 1, seed: LAYOUT.seed };
                disk[at..at + SECTOR_BYTES].copy_from_slice(&sector.encode());
            }
        }
        disk
    }

    fn check(disk: &[u8], acked: u64) -> Report {
        verify_image(disk, LAYOUT, Ack { generation: 1, sequence: acked }).unwrap()
    }

    #[test]
    fn a_disk_that_holds_what_was_acknowledged_is_clean() {
        for last in [0, 1, 30, 64, 65, 1000] {
            let report = check(&disk_after(last), last);
            assert!(report.is_clean(), "{report:?}");
            assert_eq!(report.records_promised, last.min(64));
            assert_eq!(report.records_found, last.min(64));
            assert_eq!(report.sequence_max, last);
        }
    }

    #[test]
    fn writes_beyond_the_acknowledgement_are_no_problem() {
        assert!(check(&disk_after(200), 170).is_clean());
    }

    #[test]
    fn each_lost_write_is_found() {
        for acked in [1, 63, 64, 65, 129] {
            let report = check(&disk_after(acked - 1), acked);
            assert_eq!(report.problem_count, LAYOUT.sectors, "lost sequence {acked}");
        }
    }

    #[test]
    fn a_torn_record_is_found_at_any_byte() {
        for at in 0..SECTOR_BYTES {
            let mut disk = disk_after(64);
            disk[at] ^= 1;
            assert_eq!(check(&disk, 64).problem_count, 1, "byte {at}");
        }
    }

    #[test]
    fn a_sector_in_the_wrong_place_is_found() {
        let mut disk = disk_after(64);
        disk.copy_within(0..SECTOR_BYTES, SECTOR_BYTES);
        assert_eq!(check(&disk, 64).problem_count, 1);
    }

    #[test]
    fn a_newer_generation_may_replace_an_acknowledged_record_and_an_older_may_not() {
        let disk = disk_after(64);
        let acked = |generation| Ack { generation, sequence: 1 };
        assert!(verify_image(&disk[..], LAYOUT, acked(0)).unwrap().is_clean());
        assert_eq!(verify_image(&disk[..], LAYOUT, acked(2)).unwrap().problem_count, LAYOUT.sectors);
    }

    #[test]
    fn a_short_image_and_an_impossible_layout_are_refused() {
        let acked = Ack { generation: 1, sequence: 1 };
        assert!(matches!(
            verify_image(&[0; 700][..], LAYOUT, acked),
            Err(ImageError::Read { record: 0, .. })
        ));
        for layout in [
            Layout { range: 0, ..LAYOUT },
            Layout { range: u64::MAX, ..LAYOUT },
            Layout { sectors: 9, ..LAYOUT },
        ] {
            assert!(matches!(verify_image(&[][..], layout, acked), Err(ImageError::Layout { .. })));
        }
    }

    #[test]
    fn only_complete_lines_acknowledge() {
        let console = b"tick 1\nack gen=2 seq=32\ntick 2\nack gen=2 seq=6";
        assert_eq!(last_ack(console), Some(Ack { generation: 2, sequence: 32 }));
        assert_eq!(last_ack(b"ack gen=1 seq=5"), None);
        assert_eq!(last_ack(b"FAIL ack gen=1 seq=5\n"), None);
    }

    #[test]
    fn expectations_cover_exactly_the_last_round_of_the_walk() {
        let last = expected_after_ack(100, 64);
        assert_eq!(last.iter().copied().min(), Some(37));
        assert_eq!(last.iter().copied().max(), Some(100));
    }
}
