//! What a node remembers of files that it does not use: attributes, names, targets, extended attributes, under grants.
//!
//! ```text
//!   answer with grants --> kept in the table, unused --> asked about again: told without a message
//!                                |                  \--> looked through in a circle, the bound reached: given back
//!                                +-- recalled: forgotten, then answered
//! ```
//! **Invariants:** what is told from memory was true when the grant came, or later, and stays so while it is held: an answer
//! that is older than the grant, or than this node's own last change, is not remembered. While a change of this node is under
//! way, which others may see already, nothing that it concerns is told from memory. That a name is not there is told only of
//! a directory all of whose names are remembered.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use lockmgr::Mode;
use pb::request::Op;

use super::core::{Core, Pin};
use super::grants::Seq;
use super::inode::{Inode, State};
use super::rank::{self, Ranked};
use super::session::Answered;
use super::{Attr, DirEntry, DirPage, FsError};
use crate::proto as pb;

/// Inodes that are remembered, unless [`super::Node::set_memory`] says otherwise.
const INODES_DEFAULT: usize = 100_000;
/// Names for each inode that may be remembered.
const NAMES_PER_INODE: usize = 2;
/// Extended attributes of one inode that are remembered.
const XATTRS_MAX: usize = 16;
/// Floors of what was forgotten. Inodes that share one only forget a grant too much.
const FLOORS: usize = 1024;
/// Looks at candidates for one that comes new.
const LOOKS_MAX: usize = 8;

/// See the module.
pub(super) struct Memory {
    bound: AtomicUsize,
    /// Names, over all directories.
    names: Arc<AtomicUsize>,
    /// Inodes that may be forgotten, longest there first. Rank 3.
    list: Mutex<VecDeque<u64>>,
    /// Up to where recalls and answers say nothing of grants any more. Rank 3: taken under the table and a file.
    floors: Mutex<Vec<(Seq, Seq)>>,
    /// The answers to releases of EX: older ones do not know what this node had changed. Rank 3, as the floors.
    written: Mutex<Vec<Seq>>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            bound: AtomicUsize::new(INODES_DEFAULT),
            names: Arc::default(),
            list: Mutex::default(),
            floors: Mutex::new(vec![Default::default(); FLOORS]),
            written: Mutex::new(vec![Default::default(); FLOORS]),
        }
    }
}

impl Memory {
    fn slot(ino: u64) -> usize {
        usize::try_from(ino % FLOORS as u64).unwrap_or_default()
    }

    /// What came before, of an inode that is new in the table.
    pub(super) fn floor(&self, ino: u64) -> (Seq, Seq) {
        let _rank = rank::Held::enter(rank::MEMORY);
        self.floors.lock().unwrap_or_else(PoisonError::into_inner)[Self::slot(ino)]
    }

    /// An inode leaves the table, or was never there and was recalled.
    pub(super) fn raise_floor(&self, ino: u64, (recall, answer): (Seq, Seq)) {
        let _rank = rank::Held::enter(rank::MEMORY);
        let mut floors = self.floors.lock().unwrap_or_else(PoisonError::into_inner);
        let floor = &mut floors[Self::slot(ino)];
        *floor = (floor.0.max(recall), floor.1.max(answer));
    }

    /// Up to where answers do not know what this node has changed in an inode, or in another one that shares its slot.
    pub(super) fn written_up_to(&self, ino: u64) -> Seq {
        let _rank = rank::Held::enter(rank::MEMORY);
        self.written.lock().unwrap_or_else(PoisonError::into_inner)[Self::slot(ino)]
    }

    /// A release of EX was answered at `stamp`.
    pub(super) fn raise_written(&self, ino: u64, stamp: Seq) {
        let _rank = rank::Held::enter(rank::MEMORY);
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let last = &mut written[Self::slot(ino)];
        *last = (*last).max(stamp);
    }

    fn list(&self) -> Ranked<std::sync::MutexGuard<'_, VecDeque<u64>>> {
        Ranked::take(rank::MEMORY, || self.list.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn bound(&self) -> usize {
        self.bound.load(Ordering::Relaxed)
    }

    fn has_room_for_names(&self) -> bool {
        self.names.load(Ordering::Relaxed) < self.bound().saturating_mul(NAMES_PER_INODE)
    }
}

/// What memory says of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remembered {
    /// It is this inode's.
    Inode(u64),
    /// It is not there.
    Absent,
    /// The coordinator must be asked.
    Unknown,
}

impl Remembered {
    pub(super) fn ino(self) -> Option<u64> {
        match self {
            Self::Inode(ino) => Some(ino),
            Self::Absent | Self::Unknown => None,
        }
    }

    /// Whether a change of the name may concern an inode that is not known.
    pub(super) fn hides_another(self) -> bool {
        self == Self::Unknown
    }
}

/// What is remembered of one inode beside its attributes.
#[derive(Debug, Default)]
pub(super) struct Names {
    by_name: HashMap<Arc<[u8]>, u64>,
    /// Nothing is missing in `by_name`: a name that is not in it is not in the directory.
    whole: bool,
    /// All entries, in order.
    listing: Option<Arc<Listing>>,
    /// The listing as far as it was read.
    reading: Option<Listing>,
    target: Option<Bytes>,
    xattrs: Vec<(Bytes, Bytes)>,
    xattr_names: Option<Vec<Bytes>>,
    /// The answer to this node's last own change: what older ones say does not count.
    changed_at: Seq,
    /// The sum over all directories.
    total: Arc<AtomicUsize>,
}

#[derive(Debug, Default)]
struct Listing {
    parent: u64,
    entries: Vec<(u64, Arc<[u8]>, u64)>,
}

impl Drop for Names {
    fn drop(&mut self) {
        self.total.fetch_sub(self.by_name.len(), Ordering::Relaxed);
    }
}

impl Names {
    fn insert(&mut self, name: &Arc<[u8]>, ino: u64) {
        if self.by_name.insert(name.clone(), ino).is_none() {
            self.total.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn remove(&mut self, name: &[u8]) {
        if self.by_name.remove(name).is_some() {
            self.total.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn find(&self, name: &[u8]) -> Remembered {
        match self.by_name.get(name) {
            Some(ino) => Remembered::Inode(*ino),
            None if self.whole && !matches!(name, b"." | b"..") => Remembered::Absent,
            None => Remembered::Unknown,
        }
    }

    /// This node has changed something here. Of answers that come out of order the last one did not see what the others did.
    fn changed(&mut self, at: Seq) {
        self.whole &= at >= self.changed_at;
        self.changed_at = self.changed_at.max(at);
        (self.listing, self.reading) = (None, None);
        self.xattrs.clear();
        self.xattr_names = None;
    }

    /// Takes a page of the listing that begins after `cookie`.
    fn read(&mut self, cookie: u64, page: &DirPage) {
        if cookie == 0 {
            self.reading = Some(Listing { parent: page.parent, entries: Vec::new() });
        }
        let Some(reading) = &mut self.reading else { return };
        if reading.entries.last().map_or(0, |(cookie, ..)| *cookie) != cookie {
            self.reading = None;
            return;
        }
        for entry in &page.entries {
            let known = self.by_name.get_key_value(&entry.name[..]).map(|(name, _)| name.clone());
            let name = known.unwrap_or_else(|| entry.name.clone().into());
            reading.entries.push((entry.cookie, name, entry.attr.ino));
        }
        if page.end {
            self.listing = self.reading.take().map(Arc::new);
        }
    }
}

impl State {
    /// What may be told from memory, if anything may.
    fn told(&self) -> Option<&Names> {
        let valid = self.grant.permits(Mode::ProtectedRead) && self.changing == 0;
        self.names.as_deref().filter(|_| valid)
    }

    /// Where to remember what an answer at `stamp` says; none when it may be outdated.
    fn memory_for(&mut self, stamp: Seq, total: &Arc<AtomicUsize>) -> Option<&mut Names> {
        if !self.grant.permits(Mode::ProtectedRead) || stamp.1 == 0 || stamp < self.since {
            return None;
        }
        let names = self.names.get_or_insert_with(|| {
            let mut names = Box::<Names>::default();
            names.total = total.clone();
            names
        });
        (stamp >= names.changed_at).then_some(names)
    }

    fn names_missing(&mut self) {
        if let Some(names) = &mut self.names {
            names.whole = false;
        }
    }

    pub(super) fn is_unused(&self) -> bool {
        self.users == 0 && self.waiting.is_empty() && self.sync.waiters.is_empty()
    }

    /// Whether something is known that may be asked for again.
    pub(super) fn worth_keeping(&self) -> bool {
        self.attr.is_some_and(|attr| attr.nlink > 0)
    }

    /// Whether something is buffered, or allocated ahead, that is not to stay so without a user.
    pub(super) fn is_unsaved(&mut self, core: &Core) -> bool {
        self.give_up_ahead(core);
        self.grant.mode == Mode::Exclusive && (!self.is_clean() || self.pages.must_go())
    }

    /// Nothing is buffered or allocated ahead.
    pub(super) fn is_clean(&self) -> bool {
        let ahead = self.growth.trim_from(self.size(), self.map.end()).is_some();
        !ahead && self.own.is_empty() && self.pending.is_empty()
    }

    /// Whether nothing is under way or to be done, whoever uses the inode.
    fn is_quiet(&self) -> bool {
        let busy =
            self.in_flight > 0 || self.mapping || self.is_releasing_or_acquiring() || self.sync.running;
        let waited_for = !self.waiting.is_empty() || !self.sync.waiters.is_empty();
        !(busy || waited_for || self.leaving || self.unwanted || self.accessed || self.pages.must_go())
    }

    /// What is to be done with an inode that nobody uses any more.
    fn rest(&self) -> Rest {
        if self.users > 0 || !self.is_quiet() {
            return Rest::Work;
        }
        match self.grant.mode {
            Mode::Null if self.registered == 0 => Rest::Nothing,
            Mode::ProtectedRead if self.worth_keeping() => Rest::Memory,
            Mode::Exclusive if self.worth_keeping() && self.is_clean() => Rest::Memory,
            _ => Rest::Work,
        }
    }

    fn is_releasing_or_acquiring(&self) -> bool {
        let grant = &self.grant;
        grant.recall.is_some() || grant.release.is_some() || grant.acquiring.is_some()
    }

    /// Whether all that is held can be given up with one word: only the call that asks uses the inode, and all that this node did
    /// with it is with the coordinator.
    pub(super) fn may_part(&self, core: &Core) -> bool {
        let known = match self.grant.mode {
            Mode::ProtectedRead => true,
            Mode::Exclusive => self.is_clean(),
            Mode::Null | Mode::ConcurrentWrite => return false,
        };
        known && self.users == 1 && self.is_quiet() && core.log.is_merged(self.logged)
    }
}

enum Rest {
    /// It is only remembered.
    Memory,
    /// Nothing is known of it.
    Nothing,
    /// Something is to be given back, or under way.
    Work,
}

/// Inodes that a call of this node is changing.
pub(super) struct Changing {
    pins: Vec<Pin>,
    core: Arc<Core>,
    /// It may concern inodes that are not known.
    others: bool,
}

impl Changing {
    /// Goes on when the kernel tells nothing of those from the one numbered `first` on.
    fn when_untold(self, first: usize, then: impl FnOnce(Self) + Send + 'static) {
        let told = self.pins[first..].iter().position(|pin| pin.inode.lock().promise.is_out());
        let Some(at) = told.map(|at| first + at) else { return then(self) };
        let inode = self.pins[at].inode.clone();
        let then: Box<dyn FnOnce(Self) + Send> = Box::new(then);
        inode.when_taken_back(move || self.when_untold(at + 1, then));
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        for pin in &self.pins {
            pin.inode.lock().changing -= 1;
        }
        if self.others {
            self.core.unknown_changes.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Core {
    /// The file, if it is in the table; without using it.
    pub(super) fn peek(&self, ino: u64) -> Option<Arc<Inode>> {
        self.files().get(&ino).cloned()
    }

    /// Sends `op`, waits for its outcome, and takes over what it says beyond that.
    pub(super) fn ask(self: &Arc<Self>, op: Op) -> Result<Answered, FsError> {
        let asked_at = self.names_now();
        let answered = self.session.call_blocking(op)?;
        self.absorb(&answered, asked_at);
        Ok(answered)
    }

    /// As [`Core::ask`], without waiting: `done` gets the outcome, on the link's thread.
    pub(super) fn ask_then(
        self: &Arc<Self>,
        op: Op,
        done: impl FnOnce(Result<Answered, FsError>) + Send + 'static,
    ) {
        let (core, asked_at) = (self.clone(), self.names_now());
        self.session.call(op, move |outcome| {
            if let Ok(answered) = &outcome {
                core.absorb(answered, asked_at);
            }
            done(outcome);
        });
    }

    pub(super) fn absorb(self: &Arc<Self>, answered: &Answered, asked_at: u64) {
        if answered.at == 0 {
            return;
        }
        let pins: Vec<Pin> = answered.held.iter().map(|held| self.take_lent(held, answered)).collect();
        let result: Vec<&pb::Attr> = match &answered.result {
            pb::reply::Result::Attr(attr) => vec![attr],
            pb::reply::Result::DirPage(page) => page.entries.iter().filter_map(|e| e.attr.as_ref()).collect(),
            _ => Vec::new(),
        };
        for attr in answered.known.iter().chain(result) {
            if let Ok(attr) = Attr::checked(attr) {
                self.take_attr(attr, asked_at, answered.stamp());
            }
        }
        // Unused ones are remembered as their pins go.
        drop(pins);
    }

    /// Attributes that were true at `stamp`. Where nothing is held, an older answer that brings a grant comes too late: what
    /// this node has changed since, it would not know of.
    fn take_attr(&self, attr: Attr, asked_at: u64, stamp: Seq) {
        self.times.heard_of(attr.ctime);
        let Some(inode) = self.peek(attr.ino) else {
            return self.memory.raise_floor(attr.ino, ((0, 0), stamp));
        };
        let mut state = inode.lock();
        if state.grant.mode == Mode::Null {
            state.attr_at = state.attr_at.max(stamp);
            state.grant.outdate(stamp);
        } else if stamp >= state.since {
            state.merge_attr(attr, asked_at, stamp);
            // Nobody can ask for a file without a name again: what is held of it keeps its blocks from being freed.
            let nameless = attr.nlink == 0 && state.is_unused();
            let outdated = state.promise.is_outdated();
            drop(state);
            if nameless || outdated {
                inode.kick();
            }
        }
    }

    /// A grant that came along.
    fn take_lent(self: &Arc<Self>, held: &pb::Held, answered: &Answered) -> Pin {
        let pin = self.pin(held.ino);
        let mut state = pin.inode.lock();
        let stamp = answered.stamp();
        let from_nothing = state.grant.mode == Mode::Null;
        let wanted = !state.leaving && self.session.is_current(answered);
        if wanted && state.grant.lent(held.mode().into(), (answered.term, held.seq), stamp) && from_nothing {
            state.holds_since(stamp);
        }
        drop(state);
        pin
    }

    /// Says that a call is about to change these inodes, and perhaps others that are not known. Waits until the kernel tells none of
    /// their attributes.
    pub(super) fn changing(self: &Arc<Self>, inos: impl IntoIterator<Item = u64>, others: bool) -> Changing {
        let changing = self.mark_changing(inos, others);
        let (tell, told) = std::sync::mpsc::channel();
        for pin in &changing.pins {
            let tell = tell.clone();
            pin.inode.when_taken_back(move || drop(tell));
        }
        drop(tell);
        // Nobody sends anything: it ends when the last one has gone.
        told.iter().for_each(|()| {});
        changing
    }

    /// The same without waiting: calls `then` at once, or on the kernel's thread.
    pub(super) fn changing_then(
        self: &Arc<Self>,
        inos: impl IntoIterator<Item = u64>,
        others: bool,
        then: impl FnOnce(Changing) + Send + 'static,
    ) {
        self.mark_changing(inos, others).when_untold(0, then);
    }

    fn mark_changing(self: &Arc<Self>, inos: impl IntoIterator<Item = u64>, others: bool) -> Changing {
        if others {
            self.unknown_changes.fetch_add(1, Ordering::AcqRel);
        }
        let pins: Vec<Pin> = inos.into_iter().map(|ino| self.pin(ino)).collect();
        for pin in &pins {
            pin.inode.lock().changing += 1;
        }
        Changing { pins, core: self.clone(), others }
    }

    /// An inode that nobody uses any more: remembered, or given back.
    pub(super) fn put_to_rest(&self, inode: &Arc<Inode>, state: Ranked<std::sync::MutexGuard<'_, State>>) {
        let rest = state.rest();
        drop(state);
        match rest {
            Rest::Memory => self.remember(inode),
            Rest::Nothing => self.retire(inode),
            Rest::Work => inode.kick(),
        }
    }

    /// Keeps what is known of an inode without users, and forgets another one if there are too many.
    pub(super) fn remember(&self, inode: &Arc<Inode>) {
        let mut state = inode.lock();
        state.used = true;
        let new = !std::mem::replace(&mut state.listed, true);
        drop(state);
        if !new {
            return;
        }
        let mut list = self.memory.list();
        list.push_back(inode.ino);
        let too_many = list.len() > self.memory.bound();
        drop(list);
        if too_many {
            self.forget_one();
        }
    }

    /// Remembers no more than so many from now on.
    pub(super) fn bound_memory(&self, inodes: usize) {
        self.memory.bound.store(inodes, Ordering::Relaxed);
        while self.memory.list().len() > inodes {
            self.forget_one();
        }
    }

    fn forget_one(&self) {
        for look in 0..LOOKS_MAX {
            let Some(ino) = self.memory.list().pop_front() else { return };
            let Some(inode) = self.peek(ino) else { return };
            let mut state = inode.lock();
            if state.users == 0 && state.used && look + 1 < LOOKS_MAX {
                state.used = false;
                drop(state);
                self.memory.list().push_back(ino);
                continue;
            }
            state.listed = false;
            state.unwanted = state.users == 0;
            let unwanted = state.unwanted;
            drop(state);
            if unwanted {
                inode.kick();
            }
            return;
        }
    }

    /// Takes out of the table what is only remembered: the goodbye to the coordinator gives it back.
    pub(super) fn forget_all(&self) {
        let mut files = self.files();
        files.retain(|_, inode| {
            let mut state = inode.lock();
            state.leaving = true;
            !matches!(state.grant.mode, Mode::ProtectedRead) || !state.is_merely_remembered()
        });
    }

    /// What a name in a directory is, from memory.
    pub(super) fn remembered_name(&self, dir: u64, name: &[u8]) -> Remembered {
        let Some(inode) = self.peek(dir) else { return Remembered::Unknown };
        if !self.may_tell() {
            return Remembered::Unknown;
        }
        let mut state = inode.lock();
        state.used = true;
        state.told().map_or(Remembered::Unknown, |names| names.find(name))
    }

    /// An answer at `stamp` says that `name` is this inode's.
    pub(super) fn learn_name(&self, dir: u64, name: &[u8], ino: u64, stamp: Seq) {
        if matches!(name, b"." | b"..") {
            return;
        }
        let Some(inode) = self.peek(dir) else { return };
        let mut state = inode.lock();
        let room = self.memory.has_room_for_names();
        match state.memory_for(stamp, &self.memory.names).filter(|_| room) {
            Some(names) => names.insert(&name.into(), ino),
            None => state.names_missing(),
        }
    }

    /// A directory has names that are not remembered.
    pub(super) fn names_missing(&self, dir: u64) {
        if let Some(inode) = self.peek(dir) {
            inode.lock().names_missing();
        }
    }

    /// This node has made a directory, and was lent a grant on it in the same answer: nobody else has put anything in it.
    pub(super) fn learn_empty(&self, dir: u64, stamp: Seq) {
        self.learn(dir, stamp, |names| names.whole = names.by_name.is_empty());
    }

    /// This node has changed a directory, or what else is remembered of an inode: `names` are not what they were.
    pub(super) fn changed_here(&self, ino: u64, gone: &[&[u8]], stamp: Seq) {
        let Some(inode) = self.peek(ino) else { return };
        let mut state = inode.lock();
        if stamp.1 == 0 {
            state.names = None;
        } else if let Some(names) = &mut state.names {
            gone.iter().for_each(|name| names.remove(name));
            names.changed(stamp);
        } else if let Some(names) = state.memory_for(stamp, &self.memory.names) {
            // Older answers may still be on their way.
            names.changed(stamp);
        }
    }

    /// An answer to a change that was given before, and does not say what changed: everything may have.
    pub(super) fn changed_unseen(&self, answered: &Answered) {
        if answered.known.is_empty() {
            self.names_changed();
        }
        for attr in &answered.known {
            self.changed_here(attr.ino, &[], answered.stamp());
        }
    }

    /// A page of a directory, from memory.
    pub(super) fn remembered_page(&self, dir: u64, cookie: u64, max: u32) -> Option<DirPage> {
        let inode = self.peek(dir).filter(|_| self.may_tell())?;
        let mut state = inode.lock();
        state.used = true;
        let listing = state.told()?.listing.clone()?;
        drop(state);
        let first = listing.entries.partition_point(|(at, ..)| *at <= cookie);
        let rest = &listing.entries[first..];
        let count = rest.len().min(usize::try_from(max.max(1)).unwrap_or(usize::MAX));
        let entries = rest[..count].iter().map(|(cookie, name, ino)| {
            let attr = self.peek(*ino)?.attr_at_hand()?;
            Some(DirEntry { name: name.to_vec(), cookie: *cookie, attr })
        });
        let entries = entries.collect::<Option<Vec<_>>>()?;
        Some(DirPage { entries, end: count == rest.len(), parent: listing.parent })
    }

    /// Remembers a page that was asked for at `cookie`.
    pub(super) fn learn_page(&self, dir: u64, cookie: u64, page: &DirPage, stamp: Seq) {
        let Some(inode) = self.peek(dir) else { return };
        let room = self.memory.has_room_for_names();
        let mut state = inode.lock();
        let Some(names) = state.memory_for(stamp, &self.memory.names) else { return };
        if !room {
            names.reading = None;
            return;
        }
        names.read(cookie, page);
        for entry in &page.entries {
            names.insert(&entry.name.as_slice().into(), entry.attr.ino);
        }
        // All that is remembered is true, so as many names as there are entries are all of them.
        names.whole |= names.listing.as_ref().is_some_and(|all| all.entries.len() == names.by_name.len());
    }

    /// What else is remembered of an inode, picked out by `pick`.
    pub(super) fn remembered<T>(&self, ino: u64, pick: impl FnOnce(&Names) -> Option<T>) -> Option<T> {
        let inode = self.peek(ino).filter(|_| self.may_tell())?;
        let mut state = inode.lock();
        state.used = true;
        pick(state.told()?)
    }

    /// Remembers something else of an inode, said by an answer at `stamp`.
    pub(super) fn learn(&self, ino: u64, stamp: Seq, put: impl FnOnce(&mut Names)) {
        let Some(inode) = self.peek(ino) else { return };
        if let Some(names) = inode.lock().memory_for(stamp, &self.memory.names) {
            put(names);
        }
    }
}

impl State {
    /// Nobody uses it, nothing is under way, nothing is buffered.
    pub(super) fn is_merely_remembered(&self) -> bool {
        let busy = self.in_flight > 0 || self.mapping || self.sync.running;
        !busy && !self.is_releasing_or_acquiring() && self.is_unused()
    }
}

impl Names {
    pub(super) fn target(&self) -> Option<Bytes> {
        self.target.clone()
    }

    pub(super) fn set_target(&mut self, target: Bytes) {
        self.target = Some(target);
    }

    pub(super) fn xattr(&self, name: &[u8]) -> Option<Bytes> {
        self.xattrs.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone())
    }

    pub(super) fn set_xattr(&mut self, name: Bytes, value: Bytes) {
        if self.xattrs.len() < XATTRS_MAX && self.xattr(&name).is_none() {
            self.xattrs.push((name, value));
        }
    }

    pub(super) fn xattr_names(&self) -> Option<Vec<Bytes>> {
        self.xattr_names.clone()
    }

    /// Nothing where not all names are known.
    pub(super) fn has_xattr_name(&self, name: &[u8]) -> Option<bool> {
        self.xattr_names.as_ref().map(|names| names.iter().any(|known| known == name))
    }

    pub(super) fn set_xattr_names(&mut self, names: Vec<Bytes>) {
        self.xattr_names = Some(names);
    }
}
