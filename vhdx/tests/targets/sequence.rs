//! Requests to a disk, against a byte array for each image of its chain.
//!
//! **Invariant:** what is promised is compared after every step that could break it: reads at once, all images at each check.

use std::ops::ControlFlow;
use std::sync::Arc;

use blockio::{BlockDevice, IoBuf, IoOp};
use vhdx::{Disk, NewSize, Spec};

use super::feed::Feed;
use crate::common::{Folder, MIB, assert_sound, bytes_at, path};

const SIZE_MAX: u64 = 7 * MIB;
const IMAGES_MAX: usize = 6;
const STEPS_MAX: usize = 60;

/// A disk and what it must hold.
struct Player<'a> {
    folder: Folder,
    disk: Option<Disk>,
    /// Images from the base to the top: name, and the content of those below the top.
    chain: Vec<(String, Vec<u8>)>,
    model: Vec<u8>,
    sector: u64,
    fixed: bool,
    /// Images that were made so far, and those that the open disk knows a file for.
    named: usize,
    known: usize,
    why: &'a str,
}

/// Plays what the bytes say.
pub(crate) fn sequence(data: &[u8]) {
    let why = format!("sequence {data:02x?}");
    let mut feed = Feed::new(data);
    let mut player = Player::new(&mut feed, &why);
    for _ in 0..STEPS_MAX {
        if feed.is_empty() {
            break;
        }
        player.step(&mut feed);
    }
    player.check();
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("small")
}

impl<'a> Player<'a> {
    fn new(feed: &mut Feed<'_>, why: &'a str) -> Self {
        let choice = feed.byte();
        let sector = if choice & 1 == 0 { 512 } else { 4096 };
        let fixed = choice & 6 == 6;
        let size_bytes = 4 * MIB + sector * u64::from(choice >> 4);
        let spec = Spec {
            size_bytes,
            block_bytes: if choice & 8 == 0 { MIB } else { 2 * MIB },
            fixed,
            logical_sector: u32::try_from(sector).expect("small"),
            physical_sector: if choice & 2 == 0 { 512 } else { 4096 },
            disk_id: None,
        };
        let mut folder = Folder::default();
        folder.base("0.vhdx", &spec);
        let chain = vec![("0.vhdx".to_owned(), Vec::new())];
        let model = vec![0; index(size_bytes)];
        let mut player = Self { folder, disk: None, chain, model, sector, fixed, named: 0, known: 0, why };
        player.open();
        player
    }

    /// Opens the top. The disk looks for images in the folder as it is now, so files for the next ones are there already.
    fn open(&mut self) {
        while self.known < self.named + 3 {
            self.known += 1;
            self.folder.add(&format!("{}.avhdx", self.known));
        }
        self.disk = Some(self.folder.disk(self.top()));
    }

    fn disk(&self) -> &Disk {
        self.disk.as_ref().expect("it is open between two steps")
    }

    fn top(&self) -> &str {
        &self.chain.last().expect("there is a top").0
    }

    fn is_fixed(&self) -> bool {
        self.fixed && self.chain.len() == 1
    }

    fn step(&mut self, feed: &mut Feed<'_>) {
        match feed.byte() % 20 {
            0..=5 => self.write(feed),
            6 | 7 => self.zero(feed),
            8 => self.discard(feed),
            9 | 10 => self.read(feed),
            11 => self.disk().flush().unwrap_or_else(|error| panic!("{}: {error}", self.why)),
            12 => self.reopen(feed.byte().is_multiple_of(2)),
            13 | 14 => self.snapshot(),
            15 => self.merge_below(),
            16 => self.merge_top(),
            17 => self.resize(feed),
            18 => self.compact(),
            _ => self.check(),
        }
    }

    /// A range in whole sectors: mostly short, now and then over blocks.
    fn range(&self, feed: &mut Feed<'_>) -> std::ops::Range<usize> {
        let sectors = self.model.len() as u64 / self.sector;
        let first = feed.below(sectors);
        let long = feed.byte();
        let count = if long.is_multiple_of(5) { feed.below(5000) } else { u64::from(long % 40) };
        let end = (first + count + 1).min(sectors);
        index(first * self.sector)..index(end * self.sector)
    }

    fn write(&mut self, feed: &mut Feed<'_>) {
        let (range, value, fua) = (self.range(feed), feed.byte() | 1, feed.byte().is_multiple_of(4));
        let buf = IoBuf::zeroed(range.len());
        buf.copy_from(&vec![value; range.len()]);
        self.run(IoOp::Write { offset: range.start as u64, buf, fua });
        self.model[range].fill(value);
    }

    fn zero(&mut self, feed: &mut Feed<'_>) {
        let (range, may_unmap) = (self.range(feed), feed.byte().is_multiple_of(2));
        self.run(IoOp::WriteZeroes { offset: range.start as u64, len: range.len() as u64, may_unmap });
        self.model[range].fill(0);
    }

    /// Whole blocks of 2 MiB, the largest that there are: each block of the image in them is given up.
    fn discard(&mut self, feed: &mut Feed<'_>) {
        let size = self.model.len() as u64;
        let start = feed.below(size.div_ceil(2 * MIB)) * 2 * MIB;
        let range = index(start)..index((start + 2 * MIB).min(size));
        self.run(IoOp::Discard { offset: start, len: range.len() as u64 });
        if !self.is_fixed() {
            self.model[range].fill(0);
        }
    }

    fn read(&mut self, feed: &mut Feed<'_>) {
        let range = self.range(feed);
        let found = bytes_at(self.disk(), range.start as u64, range.len());
        assert!(found == self.model[range.clone()], "{}: reading {range:?}", self.why);
    }

    fn run(&self, op: IoOp) {
        self.disk().run(op).unwrap_or_else(|error| panic!("{}: {error}", self.why));
    }

    fn close(&mut self) {
        let disk = self.disk.take().expect("it is open");
        disk.close().unwrap_or_else(|error| panic!("{}: {error}", self.why));
    }

    fn reopen(&mut self, clean: bool) {
        if clean {
            self.close();
        } else {
            self.disk().flush().unwrap_or_else(|error| panic!("{}: {error}", self.why));
            self.disk = None;
        }
        let image = self.folder.image(self.top());
        assert!(bytes_at(&image, 0, self.model.len()) == self.model, "{}: read-only", self.why);
        assert_sound(&self.folder.0[&path(self.top())]);
        self.open();
    }

    fn snapshot(&mut self) {
        if self.chain.len() == IMAGES_MAX {
            return self.merge_below();
        }
        if self.named == self.known {
            self.reopen(true);
        }
        self.named += 1;
        let name = format!("{}.avhdx", self.named);
        let file = Arc::clone(&self.folder.0[&path(&name)]);
        self.disk().snapshot(&file, &path(&name)).unwrap_or_else(|error| panic!("{}: {error}", self.why));
        self.chain.last_mut().expect("there is a top").1 = self.model.clone();
        self.chain.push((name, Vec::new()));
    }

    /// The parent of the top goes into its own parent.
    fn merge_below(&mut self) {
        let [.., (below, _), (middle, _), _] = &self.chain[..] else { return };
        let (below, middle) = (below.clone(), middle.clone());
        // Images that were merged away are no children any more: the disk must not find them.
        self.close();
        self.open();
        let (child, parent) =
            (Arc::clone(&self.folder.0[&path(&middle)]), Arc::clone(&self.folder.0[&path(&below)]));
        self.disk()
            .merge_parent(&child, &parent, &mut |_| ())
            .unwrap_or_else(|error| panic!("{}: {error}", self.why));
        let at = self.chain.len() - 2;
        let (_, content) = self.chain.remove(at);
        self.chain[at - 1].1 = content;
        self.folder.0.remove(&path(&middle));
        self.check();
    }

    /// The top goes into its parent, which is the disk from then on.
    fn merge_top(&mut self) {
        let [.., (below, _), (top, _)] = &self.chain[..] else { return };
        let (below, top) = (below.clone(), top.clone());
        self.close();
        let parent = Arc::clone(&self.folder.0[&path(&below)]);
        self.folder
            .open(&top)
            .merge(&parent, &mut |_| ())
            .unwrap_or_else(|error| panic!("{}: {error}", self.why));
        self.folder.0.remove(&path(&top));
        self.chain.pop();
        self.open();
        self.check();
    }

    fn resize(&mut self, feed: &mut Feed<'_>) {
        let sectors = 1 + feed.below(SIZE_MAX / self.sector);
        let size = sectors * self.sector;
        self.disk().resize(NewSize::UnsafelyTo(size)).unwrap_or_else(|error| panic!("{}: {error}", self.why));
        assert_eq!(self.disk().geometry().size_bytes, size, "{}", self.why);
        self.model.resize(index(size), 0);
    }

    fn compact(&mut self) {
        let outcome = self.disk().compact(&mut |_| ControlFlow::Continue(()));
        assert_eq!(outcome.is_ok(), !self.is_fixed(), "{}: {outcome:?}", self.why);
    }

    /// Everything that there is, image by image.
    fn check(&mut self) {
        let found = bytes_at(self.disk(), 0, self.model.len());
        assert!(found == self.model, "{}: the disk", self.why);
        let below = &self.chain[..self.chain.len() - 1];
        for (name, content) in below {
            let image = self.folder.image(name);
            assert_eq!(image.geometry().size_bytes, content.len() as u64, "{}: {name}", self.why);
            assert!(bytes_at(&image, 0, content.len()) == *content, "{}: {name}", self.why);
        }
    }
}
