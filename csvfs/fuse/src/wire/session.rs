//! A connection with the kernel: handshake, readers, end.
//!
//! ```text
//!   open /dev/fuse -> mount -> [ reader 1: INIT answered, then requests ] -> end of the connection
//!                                  [ reader 2 .. n: requests on clones  ] -> the last one ends the filesystem
//! ```
//! With rings (`ring`) the readers get what the kernel says unasked, and the threads of the rings the requests.
//! Every reader reads, parses, and calls the filesystem, which must not block: it hands over what waits. One reader of several may
//! wait for the disk: with a read or write that is alone there, or for a flush.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use blockio::Here;
use zerocopy::IntoBytes;

use super::abi::{InitIn, InitOut, MAJOR, MINOR, MINOR_MIN, MINOR_PROMISES, init};
use super::channel::Channel;
use super::reply::Reply;
use super::request::{Header, Op, forgets, parse};
use super::ring::Rings;

/// Largest read or write of the kernel.
pub(crate) const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Room for a request: its data and, before that, headers and names.
const BUFFER_BYTES: usize = REQUEST_BYTES_MAX as usize + (16 << 10);
/// Asynchronous requests of one mount in flight; the kernel's default of 12 would hold deep queues back.
const BACKGROUND_MAX: u16 = 512;
const PAGE_BYTES: u32 = 4096;

/// What is asked of the kernel.
const WANTED: u64 = init::DIRECT_IO_ALLOW_MMAP
    | init::ASYNC_READ
    | init::EXPORT_SUPPORT
    | init::BIG_WRITES
    | init::MAX_PAGES
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::POSIX_LOCKS
    | init::FLOCK_LOCKS
    | init::POSIX_ACL
    | init::DONT_MASK
    | init::SETXATTR_EXT
    | init::INIT_EXT;

/// What a filesystem does with requests. Called by several readers at once; must not block.
pub(crate) trait Filesystem: Send + Sync {
    /// Does a request and answers it, now or later.
    fn request(&self, header: Header, op: Op<'_>, reply: Reply);
    /// Another request is to be given up, if it still waits. It is answered in any case.
    fn interrupt(&self, unique: u64);
    /// Whether mappings of files may be shared: somebody has the kernel give up their pages.
    fn maps(&self) -> bool;
    /// Attributes may be promised to the kernel, see [`MINOR_PROMISES`]. Before all requests.
    fn may_promise(&self);
    /// The kernel has forgotten an inode that answers had named so often.
    fn forgotten(&self, ino: u64, names: u64);
    /// The connection has ended; no request follows.
    fn end(&self);
}

/// Serves `filesystem` with `readers` threads until the connection ends.
pub(crate) fn serve<F: Filesystem + 'static>(
    channel: Channel,
    filesystem: F,
    readers: usize,
) -> io::Result<()> {
    let filesystem = Arc::new(filesystem);
    let outcome = read_all(channel, &filesystem, readers);
    filesystem.end();
    outcome
}

fn read_all<F: Filesystem + 'static>(
    channel: Channel,
    filesystem: &Arc<F>,
    readers: usize,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let Some(rings) = shake_hands(&channel, filesystem.as_ref(), &mut buffer)? else { return Ok(()) };
    let rings = rings.map(|rings| rings.start(filesystem)).unwrap_or_default();
    let mut others = Vec::new();
    // A single one has to go on.
    let one_waits = Arc::new(AtomicBool::new(readers < 2));
    for number in 1..readers {
        let (filesystem, one_waits) = (Arc::clone(filesystem), Arc::clone(&one_waits));
        others.push(start_reader(number, channel.try_clone()?, filesystem, one_waits)?);
    }
    let mut outcome = read(&Arc::new(channel), filesystem.as_ref(), &one_waits, &mut buffer);
    for reader in others {
        let ended = reader.join().unwrap_or_else(|_| Err(io::Error::other("a reader of the mount panicked")));
        outcome = outcome.and(ended);
    }
    for ring in rings {
        let ended = ring.join().map_err(|_| io::Error::other("a ring's thread of the mount panicked"));
        outcome = outcome.and(ended);
    }
    outcome
}

fn start_reader<F: Filesystem + 'static>(
    number: usize,
    channel: Channel,
    filesystem: Arc<F>,
    one_waits: Arc<AtomicBool>,
) -> io::Result<JoinHandle<io::Result<()>>> {
    let work = move || read(&Arc::new(channel), filesystem.as_ref(), &one_waits, &mut vec![0; BUFFER_BYTES]);
    Builder::new().name(format!("fuse-reader-{number}")).spawn(work)
}

/// The first request. Gives the rings, if the kernel is to use them; nothing when the connection ended before it came.
fn shake_hands<F: Filesystem + 'static>(
    channel: &Channel,
    filesystem: &F,
    buffer: &mut [u8],
) -> io::Result<Option<Option<Rings<F>>>> {
    let wanted = if filesystem.maps() { WANTED } else { WANTED & !init::DIRECT_IO_ALLOW_MMAP };
    loop {
        let Some(bytes) = channel.receive(buffer)? else { return Ok(None) };
        let Ok((header, Op::Init(offer))) = parse(bytes) else {
            return Err(io::Error::other("the kernel's first request is no handshake"));
        };
        let rings = rings(channel, &offer);
        let wanted = if rings.is_some() { wanted | init::OVER_IO_URING } else { wanted };
        let answer = negotiate(&offer, wanted);
        if (offer.major, offer.minor) >= (MAJOR, MINOR_PROMISES) {
            filesystem.may_promise();
        }
        let len = size_of::<super::abi::OutHeader>() + size_of::<InitOut>();
        let error = if answer.is_ok() { 0 } else { -libc::EPROTO };
        let len = u32::try_from(len).expect("small");
        let out = super::abi::OutHeader { len, error, unique: header.unique };
        let body = *answer.as_ref().unwrap_or(&offer_of(MINOR));
        channel.send(&[io::IoSlice::new(out.as_bytes()), io::IoSlice::new(body.as_bytes())]);
        // A kernel of a newer major version asks again, with ours.
        if offer.major <= MAJOR {
            return answer.map(|_| Some(rings)).map_err(io::Error::other);
        }
    }
}

fn offer_of(minor: u32) -> InitOut {
    InitOut {
        major: MAJOR,
        minor,
        max_readahead: REQUEST_BYTES_MAX,
        flags: 0,
        max_background: BACKGROUND_MAX,
        congestion_threshold: BACKGROUND_MAX / 4 * 3,
        max_write: REQUEST_BYTES_MAX,
        time_gran: 1,
        max_pages: u16::try_from(REQUEST_BYTES_MAX / PAGE_BYTES).expect("256 pages"),
        map_alignment: 0,
        flags2: 0,
        _unused: [0; 7],
    }
}

/// Rings, where the kernel offers them and they can be made.
fn rings<F: Filesystem + 'static>(channel: &Channel, offer: &InitIn) -> Option<Rings<F>> {
    if offered(offer) & init::OVER_IO_URING == 0 {
        return None;
    }
    let prepared = Rings::prepare(channel);
    prepared.inspect_err(|error| tracing::warn!(%error, "the mount does without io_uring")).ok()
}

fn offered(offer: &InitIn) -> u64 {
    u64::from(offer.flags) | u64::from(offer.flags2) << 32
}

fn negotiate(offer: &InitIn, wanted: u64) -> Result<InitOut, String> {
    if offer.major < MAJOR || (offer.major == MAJOR && offer.minor < MINOR_MIN) {
        let (major, minor) = (offer.major, offer.minor);
        return Err(format!(
            "the kernel speaks FUSE {major}.{minor}; a mount needs {MAJOR}.{MINOR_MIN} (Linux 6.1)"
        ));
    }
    let offered = offered(offer);
    let (agreed, missing) = (offered & wanted, wanted & !offered);
    if missing != 0 {
        tracing::info!(missing = format!("{missing:#x}"), "the kernel's FUSE does not offer this");
    }
    let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).expect("32 bits");
    let mut answer = offer_of(MINOR);
    answer.max_readahead = offer.max_readahead.min(REQUEST_BYTES_MAX);
    (answer.flags, answer.flags2) = (half(agreed), half(agreed >> 32));
    Ok(answer)
}

fn read<F: Filesystem>(
    channel: &Arc<Channel>,
    filesystem: &F,
    one_waits: &AtomicBool,
    buffer: &mut [u8],
) -> io::Result<()> {
    while let Some(bytes) = channel.receive(buffer)? {
        match parse(bytes) {
            Ok((header, op)) => {
                let _waits = Waits::begin(one_waits, &op);
                dispatch(filesystem, header, op, Reply::new(channel, &header));
            }
            Err(Some(header)) => {
                tracing::error!(?header, "a request of the kernel makes no sense");
                Reply::new(channel, &header).error(libc::EINVAL);
            }
            Err(None) => return Err(io::Error::other("the kernel sent less than a request's header")),
        }
    }
    Ok(())
}

/// A reader that waits for the disk itself: with a read or write that is alone there, or for a flush.
struct Waits<'a> {
    one_waits: &'a AtomicBool,
    _here: Here,
}

impl<'a> Waits<'a> {
    /// One of the readers at most does so, and only for data: the others go on taking requests, whatever the disk does (F9).
    fn begin(one_waits: &'a AtomicBool, op: &Op<'_>) -> Option<Self> {
        let how = match op {
            Op::Read(_) | Op::Write { .. } => blockio::here_if_alone,
            Op::Fsync(_) => blockio::here,
            _ => return None,
        };
        (!one_waits.swap(true, Ordering::Acquire)).then(|| Self { one_waits, _here: how() })
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.one_waits.store(false, Ordering::Release);
    }
}

/// Hands a request to the filesystem, unless it is about the connection.
pub(super) fn dispatch<F: Filesystem>(filesystem: &F, header: Header, op: Op<'_>, reply: Reply) {
    match op {
        Op::Forget { names } => {
            reply.none();
            filesystem.forgotten(header.ino, names);
        }
        Op::BatchForget(all) => {
            reply.none();
            forgets(all).for_each(|(ino, names)| filesystem.forgotten(ino, names));
        }
        Op::Interrupt { unique } => {
            reply.none();
            filesystem.interrupt(unique);
        }
        Op::Destroy => reply.ok(),
        op => filesystem.request(header, op, reply),
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::super::abi::{FsyncIn, ReadIn};
    use super::*;

    fn offer(minor: u32, flags: u64) -> InitIn {
        let half = |bits: u64| u32::try_from(bits & 0xffff_ffff).expect("32 bits");
        InitIn {
            major: 7,
            minor,
            max_readahead: 1 << 17,
            flags: half(flags),
            flags2: half(flags >> 32),
            _unused: [0; 11],
        }
    }

    #[test]
    fn only_what_the_kernel_offers_is_agreed_on() {
        let answer =
            negotiate(&offer(45, init::POSIX_ACL | init::ASYNC_DIO | 1 << 41), WANTED).expect("agreed");
        assert_eq!(u64::from(answer.flags), init::POSIX_ACL | init::ASYNC_DIO);
        assert_eq!((answer.flags2, answer.minor, answer.max_readahead), (0, MINOR, 1 << 17));
    }

    // Invariant F9: whatever the disk does, somebody takes requests.
    #[test]
    fn one_reader_at_most_waits_for_the_disk_and_only_with_data() {
        let one_waits = AtomicBool::new(false);
        assert!(Waits::begin(&one_waits, &Op::GetAttr).is_none());
        let read = Op::Read(ReadIn::new_zeroed());
        let first = Waits::begin(&one_waits, &read);
        assert!(first.is_some() && Waits::begin(&one_waits, &read).is_none());
        drop(first);
        assert!(Waits::begin(&one_waits, &read).is_some());
        assert!(Waits::begin(&one_waits, &Op::Fsync(FsyncIn::new_zeroed())).is_some());
        // A single reader is one that waits from the start.
        assert!(Waits::begin(&AtomicBool::new(true), &read).is_none());
    }

    #[test]
    fn a_kernel_that_is_too_old_is_told_which_is_needed() {
        assert!(negotiate(&offer(31, WANTED), WANTED).expect_err("too old").contains("Linux 6.1"));
    }
}
