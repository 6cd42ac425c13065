//! A chain of descriptors becomes a disk request. Pure: reads guest RAM, writes nothing.
//!
//! ```text
//!   readable: header (16) [data to write | ranges]      writable: [data to read | id] status (1)
//! ```
//! The parts may be cut anywhere. **Invariant:** a request that leaves here lies inside the disk and inside guest RAM.

use super::queue::{Chain, Part};
use crate::memory::GuestRam;

/// Unit of a disk address, whatever the block size.
pub(crate) const SECTOR_BYTES: u64 = 512;
/// Bytes of the answer to `GET_ID`.
pub(crate) const ID_BYTES: usize = 20;
/// Most bytes of one request; a driver uses at most a few MiB.
const REQUEST_BYTES_MAX: u64 = 64 << 20;
/// Most ranges in one discard or write-zeroes.
pub(crate) const RANGES_MAX: u32 = 16;
const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;

const KIND_IN: u32 = 0;
const KIND_OUT: u32 = 1;
const KIND_FLUSH: u32 = 4;
const KIND_GET_ID: u32 = 8;
const KIND_DISCARD: u32 = 11;
const KIND_WRITE_ZEROES: u32 = 13;

/// What a request ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// The disk as requests are checked against it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) size_bytes: u64,
    pub(crate) block_bytes: u32,
    pub(crate) read_only: bool,
    pub(crate) can_discard: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) may_unmap: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Read {
        offset: u64,
        parts: Vec<Part>,
    },
    Write {
        offset: u64,
        parts: Vec<Part>,
    },
    Flush,
    Identify {
        parts: Vec<Part>,
    },
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
    /// Nothing to do but to say so.
    Refuse(Status),
}

impl Op {
    /// Bytes that it moves between the disk and the guest.
    pub(crate) fn transfer_bytes(&self) -> u64 {
        match self {
            Self::Read { parts, .. } | Self::Write { parts, .. } => {
                parts.iter().map(|part| u64::from(part.len)).sum()
            }
            _ => 0,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// Guest address of the status byte.
    pub(crate) status_at: u64,
    pub(crate) op: Op,
}

/// Reads a request; `None` when there is not even a place for its status.
pub(crate) fn parse(ram: &GuestRam, chain: &Chain, shape: &Shape) -> Option<Request> {
    let first_writable = chain.parts.iter().position(|part| part.writable)?;
    let (readable, writable) = chain.parts.split_at(first_writable);
    if writable.iter().any(|part| !part.writable) {
        return None;
    }
    let (mut readable, mut writable) = (readable.to_vec(), writable.to_vec());
    let status_at = take_last_byte(&mut writable)?;
    ram.io_buf(status_at, 1).ok()?;
    let header = take_front::<HEADER_BYTES>(ram, &mut readable)?;
    let op = parse_op(ram, &header, readable, writable, shape).unwrap_or_else(Op::Refuse);
    Some(Request { status_at, op })
}

fn parse_op(
    ram: &GuestRam,
    header: &[u8; HEADER_BYTES],
    readable: Vec<Part>,
    writable: Vec<Part>,
    shape: &Shape,
) -> Result<Op, Status> {
    let kind = u32::from_le_bytes(header[0..4].try_into().expect("four bytes"));
    let sector = u64::from_le_bytes(header[8..16].try_into().expect("eight bytes"));
    match kind {
        KIND_IN => data(ram, writable, sector, shape).map(|(offset, parts)| Op::Read { offset, parts }),
        KIND_FLUSH => Ok(Op::Flush),
        KIND_GET_ID => Ok(Op::Identify { parts: in_ram(ram, writable)? }),
        KIND_OUT | KIND_DISCARD | KIND_WRITE_ZEROES if shape.read_only => Err(Status::IoError),
        KIND_OUT => data(ram, readable, sector, shape).map(|(offset, parts)| Op::Write { offset, parts }),
        KIND_DISCARD if shape.can_discard => ranges(ram, readable, shape).map(Op::Discard),
        KIND_WRITE_ZEROES => ranges(ram, readable, shape).map(Op::WriteZeroes),
        _ => Err(Status::Unsupported),
    }
}

/// Offset and merged parts of a transfer, all of it inside the disk and inside RAM.
fn data(ram: &GuestRam, parts: Vec<Part>, sector: u64, shape: &Shape) -> Result<(u64, Vec<Part>), Status> {
    let parts = in_ram(ram, parts)?;
    let len = parts.iter().map(|part| u64::from(part.len)).sum();
    if len > REQUEST_BYTES_MAX {
        return Err(Status::IoError);
    }
    Ok((check_range(sector, len, shape)?, parts))
}

fn check_range(sector: u64, len: u64, shape: &Shape) -> Result<u64, Status> {
    let block = u64::from(shape.block_bytes).max(SECTOR_BYTES);
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
    let end = offset.checked_add(len).ok_or(Status::IoError)?;
    if end > shape.size_bytes || !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
        return Err(Status::IoError);
    }
    Ok(offset)
}

/// Drops empty parts, merges neighbours, checks each against the memory map.
fn in_ram(ram: &GuestRam, parts: Vec<Part>) -> Result<Vec<Part>, Status> {
    let mut merged: Vec<Part> = Vec::with_capacity(parts.len());
    for part in parts.into_iter().filter(|part| part.len > 0) {
        match merged.last_mut() {
            Some(last) if last.address.checked_add(last.len.into()) == Some(part.address) => {
                last.len = last.len.checked_add(part.len).ok_or(Status::IoError)?;
            }
            _ => merged.push(part),
        }
    }
    let reachable =
        |part: &Part| usize::try_from(part.len).is_ok_and(|len| ram.io_buf(part.address, len).is_ok());
    if merged.iter().all(reachable) { Ok(merged) } else { Err(Status::IoError) }
}

fn ranges(ram: &GuestRam, mut parts: Vec<Part>, shape: &Shape) -> Result<Vec<Range>, Status> {
    let total: u64 = parts.iter().map(|part| u64::from(part.len)).sum();
    if !total.is_multiple_of(RANGE_BYTES as u64) || total / RANGE_BYTES as u64 > u64::from(RANGES_MAX) {
        return Err(Status::IoError);
    }
    let mut ranges = Vec::new();
    for _ in 0..total / RANGE_BYTES as u64 {
        let bytes = take_front::<RANGE_BYTES>(ram, &mut parts).ok_or(Status::IoError)?;
        let sector = u64::from_le_bytes(bytes[0..8].try_into().expect("eight bytes"));
        let sectors = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
        let flags = u32::from_le_bytes(bytes[12..16].try_into().expect("four bytes"));
        if flags > 1 {
            return Err(Status::Unsupported);
        }
        let len = u64::from(sectors) * SECTOR_BYTES;
        let offset = check_range(sector, len, shape)?;
        ranges.push(Range { offset, len, may_unmap: flags == 1 });
    }
    Ok(ranges)
}

/// Cuts the first `N` bytes off the parts and reads them.
fn take_front<const N: usize>(ram: &GuestRam, parts: &mut Vec<Part>) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        let part = parts.first_mut()?;
        let len = (N - filled).min(usize::try_from(part.len).ok()?);
        ram.read(part.address, &mut bytes[filled..filled + len]).ok()?;
        filled += len;
        part.address = part.address.checked_add(len as u64)?;
        part.len -= u32::try_from(len).ok()?;
        if part.len == 0 {
            parts.remove(0);
        }
    }
    Some(bytes)
}

fn take_last_byte(parts: &mut Vec<Part>) -> Option<u64> {
    while parts.last()?.len == 0 {
        parts.pop();
    }
    let part = parts.last_mut()?;
    part.len -= 1;
    let at = part.address.checked_add(part.len.into())?;
    if part.len == 0 {
        parts.pop();
    }
    Some(at)
}
