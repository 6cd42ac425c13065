//! The checksum at the end of each record.
//!
//! **Invariant:** the last four bytes of a sealed record are the CRC-32C of all bytes before them.

use super::Damaged;

/// Writes the checksum into the last four bytes.
pub(super) fn seal(bytes: &mut [u8]) {
    let (body, sum) = bytes.split_at_mut(bytes.len() - 4);
    sum.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
}

/// Checks magic number and checksum of the record that was read from `offset`.
pub(super) fn check(bytes: &[u8], magic: [u8; 8], what: &'static str, offset: u64) -> Result<(), Damaged> {
    if bytes.first_chunk() != Some(&magic) {
        return Err(Damaged::Absent { what, offset });
    }
    let (body, sum) = bytes.split_at(bytes.len() - 4);
    if sum == crc32c::crc32c(body).to_le_bytes() { Ok(()) } else { Err(Damaged::Checksum { what, offset }) }
}
