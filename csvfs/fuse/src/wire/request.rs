//! Requests of the kernel: bytes to types.
//!
//! ```text
//!   read from the device:   header | fixed arguments | name, NUL | second name, NUL, or data | extensions (unread)
//!   of a ring (`ring`):     header, fixed arguments, and the rest each at its place
//! ```
//! **Invariant:** bytes that are no request are an error number, never a panic: the kernel is trusted, but a mount must not
//! end by a request of a kind that did not exist when this was written.

use blockio::IoBuf;
use zerocopy::FromBytes;

use super::abi::{
    BatchForgetIn, CopyFileRangeIn, CreateIn, FallocateIn, FlushIn, ForgetIn, ForgetOne, FsyncIn, GetxattrIn,
    InHeader, InitIn, InterruptIn, LinkIn, LkIn, LseekIn, MkdirIn, MknodIn, OpenIn, ReadIn, ReleaseIn,
    Rename2In, RenameIn, SetattrIn, SetxattrIn, StatxIn, WriteIn, opcode,
};

/// Bytes of one inode in a [`Op::BatchForget`].
#[expect(clippy::cast_possible_truncation, reason = "a small constant")]
const FORGET_ONE_BYTES: u32 = size_of::<ForgetOne>() as u32;

/// Who asks, about which inode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    /// Names the request in its reply.
    pub(crate) unique: u64,
    pub(crate) ino: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The thread that asks; 0 if it cannot be seen from where the volume was mounted.
    pub(crate) thread: u32,
}

/// What is to be written.
#[derive(Clone, Debug)]
pub(crate) enum Data<'a> {
    /// Bytes behind the request's header, used until the request was taken.
    Bytes(&'a [u8]),
    /// Memory that stays as it is until the request is answered, and from which a device can write.
    Memory(IoBuf),
}

/// A request and its arguments. Names are without their NUL.
#[derive(Clone, Debug)]
pub(crate) enum Op<'a> {
    Init(InitIn),
    Lookup {
        name: &'a [u8],
    },
    /// Without a reply: the inode was named so often before it was forgotten.
    Forget {
        names: u64,
    },
    /// The same of several inodes, one [`ForgetOne`] after the other.
    BatchForget(&'a [u8]),
    GetAttr,
    Statx,
    SetAttr(SetattrIn),
    ReadLink,
    Symlink {
        name: &'a [u8],
        target: &'a [u8],
    },
    MkNod {
        args: MknodIn,
        name: &'a [u8],
    },
    MkDir {
        args: MkdirIn,
        name: &'a [u8],
    },
    Unlink {
        name: &'a [u8],
    },
    RmDir {
        name: &'a [u8],
    },
    Rename {
        name: &'a [u8],
        new_dir: u64,
        new_name: &'a [u8],
        flags: u32,
    },
    Link {
        old: u64,
        name: &'a [u8],
    },
    Open(OpenIn),
    Create {
        args: CreateIn,
        name: &'a [u8],
    },
    TmpFile(CreateIn),
    Read(ReadIn),
    Write {
        args: WriteIn,
        data: Data<'a>,
    },
    Flush(FlushIn),
    Release(ReleaseIn),
    Fsync(FsyncIn),
    Fallocate(FallocateIn),
    Lseek(LseekIn),
    CopyFileRange(CopyFileRangeIn),
    OpenDir,
    ReadDir(ReadIn),
    ReadDirPlus(ReadIn),
    ReleaseDir(ReleaseIn),
    FsyncDir,
    StatFs,
    SyncFs,
    SetXattr {
        args: SetxattrIn,
        name: &'a [u8],
        value: &'a [u8],
    },
    GetXattr {
        size: u32,
        name: &'a [u8],
    },
    ListXattr {
        size: u32,
    },
    RemoveXattr {
        name: &'a [u8],
    },
    GetLock(LkIn),
    SetLock {
        args: LkIn,
        wait: bool,
    },
    /// Of another request, which is named.
    Interrupt {
        unique: u64,
    },
    Ioctl,
    Destroy,
    /// Not offered.
    Other,
}

/// What is left of the arguments.
struct Args<'a> {
    /// The fixed arguments, where they do not stand before the rest.
    fixed: Option<&'a [u8]>,
    rest: &'a [u8],
}

impl<'a> Args<'a> {
    /// The fixed arguments.
    fn take<T: FromBytes>(&mut self) -> Option<T> {
        if let Some(fixed) = self.fixed {
            return T::read_from_prefix(fixed).ok().map(|(value, _)| value);
        }
        let (value, rest) = T::read_from_prefix(self.rest).ok()?;
        self.rest = rest;
        Some(value)
    }

    fn name(&mut self) -> Option<&'a [u8]> {
        let end = self.rest.iter().position(|byte| *byte == 0)?;
        let (name, rest) = self.rest.split_at(end);
        self.rest = &rest[1..];
        Some(name)
    }

    fn data(&mut self, len: u32) -> Option<&'a [u8]> {
        self.rest.get(..usize::try_from(len).ok()?)
    }
}

/// What a [`Op::BatchForget`] is about: inodes, and how often each was named.
pub(crate) fn forgets(bytes: &[u8]) -> impl Iterator<Item = (u64, u64)> {
    let one = |bytes| ForgetOne::read_from_bytes(bytes).ok();
    bytes.chunks_exact(size_of::<ForgetOne>()).filter_map(one).map(|one| (one.node, one.names))
}

/// The request in `bytes`. Of one that is damaged, only whom to tell is known, if that.
pub(crate) fn parse(bytes: &[u8]) -> Result<(Header, Op<'_>), Option<Header>> {
    let (raw, rest) = InHeader::read_from_prefix(bytes).map_err(|_| None)?;
    let header = Header::of(&raw);
    let whole = usize::try_from(raw.len).is_ok_and(|len| len == bytes.len());
    let op = without_extensions(&raw, rest).filter(|_| whole);
    let op = op.and_then(|rest| arguments(raw.opcode, Args { fixed: None, rest }));
    op.map(|op| (header, op)).ok_or(Some(header))
}

/// The request of a ring: its fixed arguments, or more than those, and what follows them.
pub(crate) fn parse_parts<'a>(raw: &InHeader, fixed: &'a [u8], rest: &'a [u8]) -> Option<Op<'a>> {
    arguments(raw.opcode, Args { fixed: Some(fixed), rest: without_extensions(raw, rest)? })
}

/// A write of a ring, whose data is `payload`.
pub(crate) fn parse_write(fixed: &[u8], payload: &IoBuf) -> Option<Op<'static>> {
    let (args, _) = WriteIn::read_from_prefix(fixed).ok()?;
    let len = usize::try_from(args.size).ok().filter(|len| *len <= payload.len())?;
    Some(Op::Write { args, data: Data::Memory(payload.slice(0..len)) })
}

fn without_extensions<'a>(raw: &InHeader, rest: &'a [u8]) -> Option<&'a [u8]> {
    rest.len().checked_sub(usize::from(raw.extensions) * 8).map(|len| &rest[..len])
}

impl Header {
    pub(crate) fn of(raw: &InHeader) -> Self {
        Self { unique: raw.unique, ino: raw.node, uid: raw.uid, gid: raw.gid, thread: raw.pid }
    }
}

fn arguments(code: u32, mut args: Args<'_>) -> Option<Op<'_>> {
    Some(match code {
        opcode::INIT => Op::Init(args.take()?),
        opcode::DESTROY => Op::Destroy,
        opcode::INTERRUPT => Op::Interrupt { unique: args.take::<InterruptIn>()?.unique },
        opcode::STATFS => Op::StatFs,
        opcode::SYNCFS => Op::SyncFs,
        opcode::IOCTL => Op::Ioctl,
        opcode::GETLK => Op::GetLock(args.take()?),
        opcode::SETLK => Op::SetLock { args: args.take()?, wait: false },
        opcode::SETLKW => Op::SetLock { args: args.take()?, wait: true },
        _ => return names(code, args),
    })
}

/// Requests about names and attributes.
fn names(code: u32, mut args: Args<'_>) -> Option<Op<'_>> {
    Some(match code {
        opcode::LOOKUP => Op::Lookup { name: args.name()? },
        opcode::FORGET => Op::Forget { names: args.take::<ForgetIn>()?.names },
        opcode::BATCH_FORGET => {
            let bytes = args.take::<BatchForgetIn>()?.count.checked_mul(FORGET_ONE_BYTES)?;
            Op::BatchForget(args.data(bytes)?)
        }
        opcode::GETATTR => Op::GetAttr,
        opcode::STATX => args.take::<StatxIn>().map(|_| Op::Statx)?,
        opcode::SETATTR => Op::SetAttr(args.take()?),
        opcode::READLINK => Op::ReadLink,
        opcode::SYMLINK => Op::Symlink { name: args.name()?, target: args.name()? },
        opcode::MKNOD => Op::MkNod { args: args.take()?, name: args.name()? },
        opcode::MKDIR => Op::MkDir { args: args.take()?, name: args.name()? },
        opcode::UNLINK => Op::Unlink { name: args.name()? },
        opcode::RMDIR => Op::RmDir { name: args.name()? },
        opcode::RENAME => {
            let new_dir = args.take::<RenameIn>()?.new_dir;
            Op::Rename { name: args.name()?, new_dir, new_name: args.name()?, flags: 0 }
        }
        opcode::RENAME2 => {
            let Rename2In { new_dir, flags, .. } = args.take()?;
            Op::Rename { name: args.name()?, new_dir, new_name: args.name()?, flags }
        }
        opcode::LINK => Op::Link { old: args.take::<LinkIn>()?.old_node, name: args.name()? },
        opcode::SETXATTR => {
            let args_in: SetxattrIn = args.take()?;
            Op::SetXattr { args: args_in, name: args.name()?, value: args.data(args_in.size)? }
        }
        opcode::GETXATTR => Op::GetXattr { size: args.take::<GetxattrIn>()?.size, name: args.name()? },
        opcode::LISTXATTR => Op::ListXattr { size: args.take::<GetxattrIn>()?.size },
        opcode::REMOVEXATTR => Op::RemoveXattr { name: args.name()? },
        _ => return opened(code, args),
    })
}

/// Requests about open files and directories.
fn opened(code: u32, mut args: Args<'_>) -> Option<Op<'_>> {
    Some(match code {
        opcode::OPEN => Op::Open(args.take()?),
        opcode::CREATE => Op::Create { args: args.take()?, name: args.name()? },
        opcode::TMPFILE => Op::TmpFile(args.take()?),
        opcode::READ => Op::Read(args.take()?),
        opcode::WRITE => {
            let args_in: WriteIn = args.take()?;
            Op::Write { args: args_in, data: Data::Bytes(args.data(args_in.size)?) }
        }
        opcode::FLUSH => Op::Flush(args.take()?),
        opcode::RELEASE => Op::Release(args.take()?),
        opcode::FSYNC => Op::Fsync(args.take()?),
        opcode::FALLOCATE => Op::Fallocate(args.take()?),
        opcode::LSEEK => Op::Lseek(args.take()?),
        opcode::COPY_FILE_RANGE => Op::CopyFileRange(args.take()?),
        opcode::OPENDIR => Op::OpenDir,
        opcode::READDIR => Op::ReadDir(args.take()?),
        opcode::READDIRPLUS => Op::ReadDirPlus(args.take()?),
        opcode::RELEASEDIR => Op::ReleaseDir(args.take()?),
        opcode::FSYNCDIR => Op::FsyncDir,
        _ => Op::Other,
    })
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    fn request(code: u32, args: &[u8]) -> Vec<u8> {
        let len = u32::try_from(size_of::<InHeader>() + args.len()).expect("small");
        let (unique, node, uid, gid, pid) = (7, 1, 10, 20, 30);
        let header = InHeader { len, opcode: code, unique, node, uid, gid, pid, extensions: 0, _pad: 0 };
        [header.as_bytes(), args].concat()
    }

    #[test]
    fn names_and_arguments_are_found() {
        let bytes = request(
            opcode::RENAME2,
            &[Rename2In { new_dir: 9, flags: 1, _pad: 0 }.as_bytes(), b"a\0bc\0"].concat(),
        );
        let (header, op) = parse(&bytes).expect("a request");
        assert_eq!((header.unique, header.ino, header.uid, header.gid), (7, 1, 10, 20));
        assert_eq!(header.thread, 30);
        let Op::Rename { name, new_dir, new_name, flags } = op else { panic!("{op:?}") };
        assert_eq!((name, new_dir, new_name, flags), (&b"a"[..], 9, &b"bc"[..], 1));
    }

    #[test]
    fn a_request_that_is_cut_short_anywhere_is_refused_and_names_whom_to_tell() {
        let args = WriteIn { fh: 1, offset: 2, size: 3, write_flags: 0, lock_owner: 0, flags: 0, _pad: 0 };
        let bytes = request(opcode::WRITE, &[args.as_bytes(), b"xyz"].concat());
        assert!(matches!(parse(&bytes), Ok((_, Op::Write { data: Data::Bytes(b"xyz"), .. }))));
        for len in 0..bytes.len() {
            let header = parse(&bytes[..len]).expect_err("not whole");
            assert_eq!(
                header.map(|header| header.unique),
                (len >= size_of::<InHeader>()).then_some(7),
                "{len}"
            );
        }
        // Also when its length agrees.
        for (code, args) in
            [(opcode::LOOKUP, &b"no end"[..]), (opcode::SETATTR, b"short"), (opcode::SYMLINK, b"one\0")]
        {
            assert!(parse(&request(code, args)).is_err());
        }
    }

    #[test]
    fn a_request_in_parts_is_the_same_request() {
        let args = Rename2In { new_dir: 9, flags: 1, _pad: 0 };
        let raw = InHeader::read_from_prefix(&request(opcode::RENAME2, &[])).expect("a header").0;
        let fixed = [args.as_bytes(), &[0xff; 100]].concat();
        let op = parse_parts(&raw, &fixed, b"a\0bc\0");
        assert!(
            matches!(op, Some(Op::Rename { name: b"a", new_dir: 9, new_name: b"bc", flags: 1 })),
            "{op:?}"
        );
        assert!(parse_parts(&raw, &fixed[..8], b"a\0bc\0").is_none(), "too little");
        assert!(parse_parts(&raw, &fixed, b"a\0bc").is_none(), "no end");
        let raw = InHeader { opcode: opcode::LOOKUP, extensions: 1, ..raw };
        assert!(matches!(parse_parts(&raw, &fixed, b"n\0xxxxxxxx"), Some(Op::Lookup { name: b"n" })));
        assert!(parse_parts(&raw, &fixed, b"n\0").is_none(), "extensions longer than the request");
    }

    #[test]
    fn a_write_of_a_ring_keeps_to_its_memory() {
        let args = WriteIn { fh: 1, offset: 2, size: 3, write_flags: 0, lock_owner: 0, flags: 0, _pad: 0 };
        let payload = IoBuf::from(blockio::AlignedBuf::copy_of(b"xyz and more"));
        let Some(Op::Write { data: Data::Memory(data), .. }) = parse_write(args.as_bytes(), &payload) else {
            panic!("a write")
        };
        assert_eq!(data.to_vec(), b"xyz");
        let beyond = WriteIn { size: 100, ..args };
        assert!(parse_write(beyond.as_bytes(), &payload).is_none());
    }

    #[test]
    fn extensions_after_the_arguments_are_skipped() {
        let mut bytes = request(opcode::LOOKUP, b"name\0xxxxxxxx");
        bytes[36] = 1;
        assert!(matches!(parse(&bytes), Ok((_, Op::Lookup { name: b"name" }))));
        bytes[36] = 200;
        assert!(parse(&bytes).is_err(), "longer than the request");
    }

    #[test]
    fn a_request_that_nobody_knew_yet_is_no_error_of_the_connection() {
        assert!(matches!(parse(&request(4000, b"whatever")), Ok((_, Op::Other))));
    }
}
