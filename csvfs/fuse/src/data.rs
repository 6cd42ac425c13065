//! Data of files: submitted to the node library, answered from its completion.
//!
//! A read lands in the buffer that the reply is sent from. A write that was read from the device is copied once, out of the
//! kernel's request, whose place in memory is not one that direct I/O can use; an entry of a ring is written from as it is.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockio::IoBuf;
use csvfs::node::FsError;

use crate::attr::errno;
use crate::buffers::Buffers;
use crate::handles::OpenFile;
use crate::pool::{Lane, Pool};
use crate::shared::Shared;
use crate::wire::abi::{FSYNC_FDATASYNC, READ_LOCKOWNER, ReadIn, WRITE_CACHE, WRITE_KILL_SUIDGID, WriteIn};
use crate::wire::reply::Reply;
use crate::wire::request::Data;

/// Reads up to as many bytes as are wanted and replies.
pub(crate) fn read(file: &Arc<OpenFile>, shared: &Shared, args: &ReadIn, reply: Reply) {
    let len = args.size as usize;
    let of_reply = reply.memory().filter(|memory| len <= memory.len());
    let in_place = of_reply.is_some();
    let whole = of_reply.unwrap_or_else(|| IoBuf::from(shared.buffers.take(len)));
    let wanted = whole.slice(0..len);
    let (buffers, opened) = (Arc::clone(&shared.buffers), Arc::clone(file));
    let answer = move |outcome: Result<usize, FsError>| {
        if outcome.is_ok() && opened.notes_access {
            opened.file.accessed();
        }
        match outcome {
            Ok(count) if in_place => reply.filled(count),
            Ok(count) => reply_with(whole, count, &buffers, reply),
            Err(error) => reply.error(errno(&error)),
        }
    };
    if shared.maps && args.read_flags & READ_LOCKOWNER == 0 {
        file.file.read_page(args.offset, wanted, answer);
    } else {
        file.file.read(args.offset, wanted, answer);
    }
}

fn reply_with(whole: IoBuf, count: usize, buffers: &Buffers, reply: Reply) {
    match whole.try_into_aligned() {
        Ok(buf) => {
            reply.data(&buf[..count]);
            buffers.give(buf);
        }
        // Somebody below still holds a handle to the memory, so it may only be copied from.
        Err(shared) => reply.data(&shared.slice(0..count).to_vec()),
    }
}

/// Writes `data` and replies.
///
/// The kernel's offset of an appending write comes from the size that it knows, which another node may have changed:
/// the node library finds the end itself, under EX. The descriptor's own position still follows the kernel's belief.
pub(crate) fn write(
    file: &Arc<OpenFile>,
    buffers: &Arc<Buffers>,
    pool: &Pool,
    args: &WriteIn,
    data: Data<'_>,
    reply: Reply,
) {
    let (whole, len) = writable(data, buffers);
    let part = whole.slice(0..len);
    let (buffers, opened, closing) = (Arc::clone(buffers), Arc::clone(file), pool.clone());
    let by_mapping = args.write_flags & WRITE_CACHE != 0;
    let kill_set_ids = args.write_flags & WRITE_KILL_SUIDGID != 0;
    let answer = move |outcome: Result<usize, FsError>| {
        match outcome {
            Ok(count) if kill_set_ids && opened.file.may_have_set_ids() => {
                closing.run(Lane::Names, move || without_rights(&opened, true, count, reply));
            }
            // The kernel leaves these to us where it keeps no pages, whoever writes.
            Ok(count) if !by_mapping && opened.file.may_have_capabilities() => {
                closing.run(Lane::Names, move || without_rights(&opened, false, count, reply));
            }
            Ok(count) => written(count, reply),
            Err(error) => {
                opened.may_be_cut.store(opened.direct, Ordering::Release);
                reply.error(errno(&error));
            }
        }
        buffers.give_back(whole);
    };
    if by_mapping {
        file.file.write_page(args.offset, part, answer);
    } else if file.append {
        file.file.append(part, move |outcome| answer(outcome.map(|_offset| len)));
    } else {
        file.file.write(args.offset, part, answer);
    }
}

/// The data in memory that a device can write from, and its length.
fn writable(data: Data<'_>, buffers: &Buffers) -> (IoBuf, usize) {
    match data {
        Data::Memory(memory) => {
            let len = memory.len();
            (memory, len)
        }
        Data::Bytes(bytes) => {
            let mut buf = buffers.take(bytes.len());
            buf[..bytes.len()].copy_from_slice(bytes);
            (IoBuf::from(buf), bytes.len())
        }
    }
}

fn written(count: usize, reply: Reply) {
    reply.written(u32::try_from(count).expect("at most what was written"));
}

/// Whoever writes to a program that runs as somebody else, or may do more than others, must not change what it does then.
fn without_rights(opened: &OpenFile, set_ids: bool, count: usize, reply: Reply) {
    let set_ids = if set_ids { opened.file.clear_set_ids() } else { Ok(()) };
    match set_ids.and_then(|()| opened.file.clear_capabilities()) {
        Ok(()) => written(count, reply),
        Err(error) => reply.error(errno(&error)),
    }
}

/// Makes what was written durable and replies.
pub(crate) fn fsync(file: &OpenFile, flags: u32, reply: Reply) {
    let answer = move |outcome: Result<(), FsError>| match outcome {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    };
    if flags & FSYNC_FDATASYNC != 0 {
        file.file.datasync(answer);
    } else {
        file.file.fsync(answer);
    }
}

/// What a request on a handle that does not exist gets.
pub(crate) const BAD_HANDLE: i32 = libc::EBADF;
