//! What a client's request leads to.
//!
//! **Invariant:** nothing of a request is believed before it is checked here; a request that must not be done is answered
//! with an error, and one after which the stream cannot be understood any more ends the connection.

use crate::nbd::format::{Command, Request, TRANSFER_BYTES_MAX, command_flag};
use crate::{Geometry, IoOp};

/// What is to be done.
#[derive(Debug)]
pub(super) enum Plan {
    /// Read into a buffer of the request's length.
    Read,
    /// Receive the request's data into a buffer, then write it.
    Write { fua: bool },
    /// Nothing but the operation, and a flush after it for FUA.
    Do { op: IoOp, fua: bool },
    /// Tell which parts are allocated; in one extent if so asked.
    Status { one: bool },
    /// Answer with an error, after the data of a write has been received and dropped.
    Refuse { errno: i32, data: usize },
    /// The client leaves.
    Leave,
    /// The client does not speak the protocol.
    Hostile(&'static str),
}

/// What the connection permits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) geometry: Geometry,
    pub(super) read_only: bool,
    pub(super) allocation: bool,
}

/// Decides about a request.
pub(super) fn plan(request: &Request, rules: &Rules) -> Plan {
    let is_transfer = matches!(request.command, Command::Read | Command::Write);
    if request.command == Command::Write && request.length > TRANSFER_BYTES_MAX {
        return Plan::Hostile("a write of more than 32 MiB");
    }
    let data = if request.command == Command::Write { request.length as usize } else { 0 };
    let refuse = |errno| Plan::Refuse { errno, data };
    let flags_known = request.flags & !command_flag::ALL == 0;
    if !flags_known || (is_transfer && request.length > TRANSFER_BYTES_MAX) {
        return refuse(libc::EINVAL);
    }
    let changes = matches!(request.command, Command::Write | Command::Trim | Command::WriteZeroes);
    if changes && rules.read_only {
        return refuse(libc::EPERM);
    }
    let (offset, len) = (request.offset, u64::from(request.length));
    if (changes || matches!(request.command, Command::Read | Command::BlockStatus))
        && let Err(errno) = fits(offset, len, changes, &rules.geometry)
    {
        return refuse(errno);
    }
    let fua = request.flags & command_flag::FUA != 0;
    match request.command {
        Command::Read => Plan::Read,
        Command::Write => Plan::Write { fua },
        Command::Disconnect => Plan::Leave,
        Command::Flush => Plan::Do { op: IoOp::Flush, fua: false },
        Command::Trim => Plan::Do { op: IoOp::Discard { offset, len }, fua },
        Command::WriteZeroes => {
            let may_unmap = request.flags & command_flag::NO_HOLE == 0;
            Plan::Do { op: IoOp::WriteZeroes { offset, len, may_unmap }, fua }
        }
        Command::BlockStatus if rules.allocation && len > 0 => {
            Plan::Status { one: request.flags & command_flag::REQ_ONE != 0 }
        }
        Command::BlockStatus | Command::Cache | Command::Other(_) => refuse(libc::EINVAL),
    }
}

fn fits(offset: u64, len: u64, changes: bool, geometry: &Geometry) -> Result<(), i32> {
    let block = u64::from(geometry.block_bytes);
    if offset.checked_add(len).is_none_or(|end| end > geometry.size_bytes) {
        return Err(if changes { libc::ENOSPC } else { libc::EINVAL });
    }
    if offset.is_multiple_of(block) && len.is_multiple_of(block) { Ok(()) } else { Err(libc::EINVAL) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::nbd::format::REQUEST_BYTES;

    const SIZE: u64 = 1 << 20;

    fn rules(read_only: bool) -> Rules {
        let geometry = Geometry { size_bytes: SIZE, block_bytes: 512, can_discard: true };
        Rules { geometry, read_only, allocation: true }
    }

    proptest! {
        #[test]
        fn what_is_done_lies_inside_the_export(
            mut bytes: [u8; REQUEST_BYTES], near: bool, command in 0_u8..9, few_flags: bool, read_only: bool,
        ) {
            bytes[6..8].copy_from_slice(&[0, command]);
            if few_flags {
                bytes[4] = 0;
                bytes[5] &= 1;
            }
            if near {
                bytes[16..22].fill(0);
                bytes[24..26].fill(0);
            }
            bytes[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
            let request = Request::decode(&bytes).expect("the magic is right");
            let end = request.offset.checked_add(u64::from(request.length));
            let inside = end.is_some_and(|end| end <= SIZE);
            match plan(&request, &rules(read_only)) {
                Plan::Read | Plan::Status { .. } => prop_assert!(inside),
                Plan::Write { .. } => prop_assert!(inside && !read_only),
                Plan::Do { op: IoOp::Flush, .. } => {}
                Plan::Do { .. } => prop_assert!(inside && !read_only),
                Plan::Refuse { data, .. } => prop_assert!(data == 0 || request.command == Command::Write),
                Plan::Leave => prop_assert_eq!(request.command, Command::Disconnect),
                Plan::Hostile(_) => prop_assert!(request.length > TRANSFER_BYTES_MAX),
            }
        }
    }

    #[test]
    fn a_read_only_export_refuses_every_change_and_swallows_its_data() {
        for (command, data) in [(Command::Write, 512), (Command::Trim, 0), (Command::WriteZeroes, 0)] {
            let request = Request { flags: 0, command, cookie: 1, offset: 0, length: 512 };
            let found = plan(&request, &rules(true));
            assert!(
                matches!(found, Plan::Refuse { errno: libc::EPERM, data: swallowed } if swallowed == data),
                "{found:?}"
            );
        }
    }
}
