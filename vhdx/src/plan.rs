//! A read that may touch the files of a whole chain.
//!
//! ```text
//!   disk range:  [ top  | zeros | parent 3 | parent 3 | top ]
//!   requests:    [ read |  fill |       read          | read]     neighbours in one file are one request
//! ```
//! **Invariant:** the pieces are added in the order of the disk and fill the buffer exactly.

use std::sync::Arc;

use blockio::{Completion, ImageFile, IoBuf, IoOp};

use crate::format::{bytes, index};
use crate::load::Loaded;
use crate::pieces::submit_all;

/// Whose bytes are read.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// A file that is as it must be.
    File(&'a Arc<dyn ImageFile>),
    /// An image whose log may be replayed in memory only.
    Image(&'a Arc<Loaded>),
}

impl Source<'_> {
    fn file(&self) -> &Arc<dyn ImageFile> {
        match self {
            Self::File(file) => file,
            Self::Image(image) => &image.view.file,
        }
    }
}

struct Piece<'a> {
    source: Source<'a>,
    file_offset: u64,
    start: usize,
    len: usize,
}

/// What a read comes to.
pub(crate) struct Plan<'a> {
    buf: &'a IoBuf,
    filled: usize,
    pieces: Vec<Piece<'a>>,
}

impl<'a> Plan<'a> {
    /// A plan to fill `buf`.
    pub(crate) fn new(buf: &'a IoBuf) -> Self {
        Self { buf, filled: 0, pieces: Vec::new() }
    }

    /// The next bytes are zeros.
    pub(crate) fn zero(&mut self, len: u64) {
        let end = self.filled + index(len);
        self.buf.slice(self.filled..end).fill_zero();
        self.filled = end;
    }

    /// The next bytes lie there.
    pub(crate) fn data(&mut self, source: Source<'a>, file_offset: u64, len: u64) {
        let (start, len) = (self.filled, index(len));
        self.filled += len;
        match self.pieces.last_mut() {
            Some(last)
                if last.start + last.len == start
                    && last.file_offset + bytes(last.len) == file_offset
                    && Arc::ptr_eq(last.source.file(), source.file()) =>
            {
                last.len += len;
            }
            _ => self.pieces.push(Piece { source, file_offset, start, len }),
        }
    }

    /// Starts the requests.
    pub(crate) fn submit(self, done: Completion) {
        debug_assert_eq!(self.filled, self.buf.len(), "every byte has its source");
        let (mut ops, mut patched) = (Vec::with_capacity(self.pieces.len()), Vec::new());
        for piece in &self.pieces {
            let part = self.buf.slice(piece.start..piece.start + piece.len);
            if let Source::Image(image) = piece.source {
                let view = &image.view;
                if view.patches.touches(piece.file_offset..piece.file_offset + bytes(piece.len)) {
                    patched.push((Arc::clone(image), piece.file_offset, part.clone()));
                }
                if piece.file_offset >= view.file_bytes {
                    part.fill_zero();
                    continue;
                }
            }
            ops.push((&**piece.source.file(), IoOp::Read { offset: piece.file_offset, buf: part }));
        }
        submit_all(ops, if patched.is_empty() { done } else { patch_then(patched, done) });
    }
}

/// What only the log has goes over what was read.
fn patch_then(patched: Vec<(Arc<Loaded>, u64, IoBuf)>, done: Completion) -> Completion {
    Box::new(move |outcome| {
        for (image, file_offset, part) in patched {
            image.view.patches.apply(file_offset, &part);
        }
        done(outcome);
    })
}
