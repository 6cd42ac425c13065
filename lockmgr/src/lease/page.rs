//! The lease page: one page of memory that all processes of a node share, written by its daemon alone.
//!
//! ```text
//!   offset 0   magic         8 bytes, "CSVLEASE"
//!          8   sequence      odd while the writer is at work
//!         16   node          id and layout version
//!         24   epoch
//!         32   deadline      milliseconds on the BOOTTIME clock
//!         40   state         1 active, 2 revoked
//!         48   checksum      CRC-32C of the four values before it
//!         56   renewals      32-bit counter, a futex that readers sleep on
//! ```
//! It is a file on a memory filesystem or any other, mapped shared. All accesses are atomic loads and stores of words, so
//! there is no data race even with a writer that was killed half way: a reader that finds the sequence odd or the
//! checksum wrong treats the lease as run out, which only makes it wait.
//!
//! **Invariants:** an active page never gets an earlier deadline; a page whose epoch is over is never active again.
#![expect(unsafe_code, reason = "a page shared between processes is a memory mapping, seen as atomic words")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use blockio::{Permission, WriteRight};
use memmap2::{MmapOptions, MmapRaw};
use rustix::thread::futex;

use crate::clock::boottime_ms;
use crate::{Epoch, Millis, NodeId};

/// Size of the file in bytes.
pub const PAGE_BYTES: usize = 4096;

const MAGIC: u64 = u64::from_le_bytes(*b"CSVLEASE");
const VERSION: u64 = 1;
const ACTIVE: u64 = 1;
const REVOKED: u64 = 2;
/// How often a reader looks again when it meets the writer at work; the writer holds the page for nanoseconds.
const READ_TRIES: usize = 64;

/// Why a lease page cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The file cannot be opened or mapped.
    #[error("cannot {action} the lease page {}: {source}; is the node's daemon running with this folder?", path.display())]
    Io {
        /// `open`, `map`, ...
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is something else.
    #[error("{} is not a lease page: {what}; name the page that the node's daemon made", path.display())]
    NotALeasePage {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The page already belongs to a later incarnation.
    #[error("the lease page {} belongs to epoch {found} already, epoch {epoch} is over; join the cluster again", path.display())]
    EpochOver {
        /// The file.
        path: PathBuf,
        /// The epoch asked for.
        epoch: Epoch,
        /// The epoch that it has.
        found: Epoch,
    },
}

/// What a page says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseView {
    /// Whose it is.
    pub node: NodeId,
    /// Which incarnation.
    pub epoch: Epoch,
    /// Nothing is submitted from here on, unless it is renewed.
    pub deadline: Millis,
    /// Whether it has ended for good.
    pub revoked: bool,
}

/// The mapped page.
#[derive(Debug)]
struct Page {
    map: MmapRaw,
}

/// Word indices.
mod word {
    pub(super) const MAGIC: usize = 0;
    pub(super) const SEQUENCE: usize = 1;
    pub(super) const NODE: usize = 2;
    pub(super) const EPOCH: usize = 3;
    pub(super) const DEADLINE: usize = 4;
    pub(super) const STATE: usize = 5;
    pub(super) const CHECKSUM: usize = 6;
    pub(super) const RENEWALS: usize = 7;
}

impl Page {
    fn map(file: &File, path: &Path) -> Result<Self, LeaseError> {
        let map = MmapOptions::new().len(PAGE_BYTES).map_raw(file);
        map.map(|map| Self { map }).map_err(|source| LeaseError::Io {
            action: "map",
            path: path.into(),
            source,
        })
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < PAGE_BYTES / size_of::<u64>());
        // SAFETY: the mapping is page-aligned, `PAGE_BYTES` long and lives as long as `self`; the index is inside it. All
        // accesses to it, from every process, are atomic.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().cast::<u64>().add(index)) }
    }

    fn renewals(&self) -> &AtomicU32 {
        // SAFETY: as in `word`; this word is only ever accessed with 32 bits.
        unsafe { AtomicU32::from_ptr(self.map.as_mut_ptr().cast::<u64>().add(word::RENEWALS).cast::<u32>()) }
    }

    fn load(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Relaxed)
    }

    /// What the page says, `None` when the writer was met at work each time or has left it torn.
    fn read(&self) -> Option<LeaseView> {
        (0..READ_TRIES).find_map(|_| self.try_read())
    }

    fn try_read(&self) -> Option<LeaseView> {
        let before = self.word(word::SEQUENCE).load(Ordering::Acquire);
        let values = [word::NODE, word::EPOCH, word::DEADLINE, word::STATE].map(|index| self.load(index));
        let checksum = self.load(word::CHECKSUM);
        // The loads above must not move below the second look at the sequence.
        fence(Ordering::Acquire);
        let after = self.load(word::SEQUENCE);
        let whole = before == after && before.is_multiple_of(2) && checksum == checksum_of(&values);
        if !whole || self.load(word::MAGIC) != MAGIC {
            return None;
        }
        view_of(values)
    }

    /// Writes everything; only the daemon does this, with one thread at a time.
    fn write(&self, view: LeaseView) {
        let state = if view.revoked { REVOKED } else { ACTIVE };
        let values = [VERSION << 16 | u64::from(view.node.0), view.epoch.0, view.deadline.0, state];
        // Odd also when a former writer was killed half way and has left an odd number.
        let working = self.load(word::SEQUENCE) | 1;
        self.word(word::SEQUENCE).store(working, Ordering::Relaxed);
        fence(Ordering::Release);
        for (index, value) in [word::NODE, word::EPOCH, word::DEADLINE, word::STATE].into_iter().zip(values) {
            self.word(index).store(value, Ordering::Relaxed);
        }
        self.word(word::CHECKSUM).store(checksum_of(&values), Ordering::Relaxed);
        self.word(word::MAGIC).store(MAGIC, Ordering::Relaxed);
        self.word(word::SEQUENCE).store(working.wrapping_add(1), Ordering::Release);
        self.renewals().fetch_add(1, Ordering::Release);
        // Nobody to wake is no error, and a reader that was not woken looks again after its own time limit.
        let _ = futex::wake(self.renewals(), futex::Flags::empty(), u32::MAX >> 1);
    }
}

fn checksum_of(values: &[u64; 4]) -> u64 {
    let fold = |crc, value: &u64| crc32c::crc32c_append(crc, &value.to_le_bytes());
    u64::from(values.iter().fold(0, fold))
}

fn view_of([node, epoch, deadline, state]: [u64; 4]) -> Option<LeaseView> {
    let id = u16::try_from(node & 0xffff).expect("masked to 16 bits");
    (node >> 16 == VERSION && (state == ACTIVE || state == REVOKED)).then_some(LeaseView {
        node: NodeId(id),
        epoch: Epoch(epoch),
        deadline: Millis(deadline),
        revoked: state == REVOKED,
    })
}

/// The writer's side. One per node.
#[derive(Debug)]
pub struct LeasePage {
    page: Page,
    view: LeaseView,
}

impl LeasePage {
    /// Makes the page of `node` in `epoch`, without a lease yet.
    ///
    /// A page that exists is taken over in place, never replaced: processes that still have it mapped see the new epoch
    /// and so learn that theirs is over. In the same epoch the lease goes on: a daemon that was restarted within it stops
    /// nobody's I/O.
    ///
    /// # Errors
    /// When the file cannot be made or mapped, is something else, or belongs to a later epoch.
    pub fn create(path: &Path, node: NodeId, epoch: Epoch) -> Result<Self, LeaseError> {
        let page = Self::open_or_make(path)?;
        let fresh = LeaseView { node, epoch, deadline: Millis(0), revoked: false };
        let view = match page.read() {
            Some(old) if old.epoch > epoch => {
                return Err(LeaseError::EpochOver { path: path.into(), epoch, found: old.epoch });
            }
            Some(old) if old.epoch == epoch && old.node == node => old,
            _ => fresh,
        };
        page.write(view);
        Ok(Self { page, view })
    }

    fn open_or_make(path: &Path) -> Result<Page, LeaseError> {
        let fail = |action| move |source| LeaseError::Io { action, path: path.into(), source };
        let refuse = |what| LeaseError::NotALeasePage { path: path.into(), what };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path).map_err(fail("create"))?;
        match file.metadata().map_err(fail("look at"))?.len() {
            0 => file.set_len(PAGE_BYTES as u64).map_err(fail("size"))?,
            size if size == PAGE_BYTES as u64 => {}
            _ => return Err(refuse("its size is not 4096 bytes")),
        }
        let page = Page::map(&file, path)?;
        // 0: its maker was killed before the first write.
        if ![0, MAGIC].contains(&page.load(word::MAGIC)) {
            return Err(refuse("its magic number is wrong"));
        }
        Ok(page)
    }

    /// Moves the deadline on. An earlier one than before is ignored, and so is everything after [`Self::revoke`].
    pub fn renew(&mut self, deadline: Millis) {
        if self.view.revoked || deadline <= self.view.deadline {
            return;
        }
        self.view.deadline = deadline;
        self.page.write(self.view);
    }

    /// Ends the right for good: the node was fenced, or its epoch is over.
    pub fn revoke(&mut self) {
        self.view.revoked = true;
        self.page.write(self.view);
    }

    /// What the page says now.
    #[must_use]
    pub fn view(&self) -> LeaseView {
        self.view
    }
}

/// The reader's side, for every process of the node that writes to a LUN. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LeaseReader {
    page: Arc<Page>,
}

impl LeaseReader {
    /// Opens the page that the node's daemon has made.
    ///
    /// # Errors
    /// When there is none, or when the file is something else.
    pub fn open(path: &Path) -> Result<Self, LeaseError> {
        let fail = |action| move |source| LeaseError::Io { action, path: path.into(), source };
        let refuse = |what| LeaseError::NotALeasePage { path: path.into(), what };
        // The raw mapping asks for write access; the reader only ever loads.
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(fail("open"))?;
        let size = file.metadata().map_err(fail("look at"))?.len();
        if size != PAGE_BYTES as u64 {
            return Err(refuse("its size is not 4096 bytes"));
        }
        let page = Page::map(&file, path)?;
        if page.load(word::MAGIC) != MAGIC {
            return Err(refuse("its magic number is wrong"));
        }
        Ok(Self { page: Arc::new(page) })
    }

    /// What the page says, `None` when the daemon has died while it wrote.
    #[must_use]
    pub fn view(&self) -> Option<LeaseView> {
        self.page.read()
    }

    /// Whether a process of incarnation `epoch` may submit I/O now. Called right before each submit (B3).
    #[must_use]
    pub fn check(&self, epoch: Epoch) -> Permission {
        self.check_at(boottime_ms(), epoch)
    }

    fn check_at(&self, now: Millis, epoch: Epoch) -> Permission {
        let Some(view) = self.page.read() else { return Permission::Wait };
        if view.epoch != epoch {
            let (node, new) = (view.node, view.epoch);
            return Permission::Revoked(format!(
                "node {node} is in epoch {new}, this process belongs to epoch {epoch}"
            ));
        }
        if view.revoked {
            return Permission::Revoked(format!("the lease of node {} epoch {epoch} was revoked", view.node));
        }
        if now < view.deadline { Permission::Granted } else { Permission::Wait }
    }

    fn lasts_at(&self, now: Millis, epoch: Epoch) -> Duration {
        let view = self.page.read().filter(|view| view.epoch == epoch && !view.revoked);
        view.map_or(Duration::ZERO, |view| Duration::from_millis(view.deadline.0.saturating_sub(now.0)))
    }

    /// A number that changes with each renewal, for [`Self::wait_change`].
    #[must_use]
    pub fn renewals(&self) -> u32 {
        self.page.renewals().load(Ordering::Acquire)
    }

    /// Sleeps until [`Self::renewals`] is no longer `seen`, or `limit` has passed. Gives the present number.
    #[must_use]
    pub fn wait_change(&self, seen: u32, limit: Duration) -> u32 {
        let limit = rustix::time::Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        };
        // Every way to wake up (a change, the limit, a signal) means: look again.
        let _ = futex::wait(self.page.renewals(), futex::Flags::empty(), seen, Some(&limit));
        self.renewals()
    }

    /// The right of a process of incarnation `epoch`, as a gate in front of a device asks for it.
    #[must_use]
    pub fn right_of(self, epoch: Epoch) -> LeaseRight {
        LeaseRight { reader: self, epoch }
    }
}

/// The right of one incarnation to do I/O, for [`blockio::GatedDevice`].
#[derive(Clone, Debug)]
pub struct LeaseRight {
    reader: LeaseReader,
    epoch: Epoch,
}

impl LeaseRight {
    /// The page behind it.
    #[must_use]
    pub fn reader(&self) -> &LeaseReader {
        &self.reader
    }
}

impl WriteRight for LeaseRight {
    fn check(&self) -> Permission {
        self.reader.check(self.epoch)
    }

    fn lasts(&self) -> Duration {
        self.reader.lasts_at(boottime_ms(), self.epoch)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    const NODE: NodeId = NodeId(3);

    fn page() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a folder for the test");
        let path = dir.path().join("lease");
        (dir, path)
    }

    #[test]
    fn a_right_lasts_to_the_deadline_of_its_own_epoch_unless_it_is_revoked() {
        let (_dir, path) = page();
        let mut writer = LeasePage::create(&path, NODE, Epoch(5)).expect("created");
        let reader = LeaseReader::open(&path).expect("opened");
        let lasts = |now, epoch| reader.lasts_at(Millis(now), Epoch(epoch)).as_millis();
        assert_eq!(lasts(100, 5), 0, "not renewed yet");
        writer.renew(Millis(700));
        assert_eq!((lasts(100, 5), lasts(700, 5), lasts(900, 5), lasts(100, 4)), (600, 0, 0, 0));
        writer.revoke();
        assert_eq!(lasts(100, 5), 0);
    }

    fn granted_until(reader: &LeaseReader, epoch: u64, deadline: u64) -> bool {
        let at = |now| reader.check_at(Millis(now), Epoch(epoch));
        at(deadline - 1) == Permission::Granted && at(deadline) == Permission::Wait
    }

    #[test]
    fn a_new_page_grants_nothing_until_it_is_renewed() {
        let (_dir, path) = page();
        let mut writer = LeasePage::create(&path, NODE, Epoch(5)).expect("created");
        let reader = LeaseReader::open(&path).expect("opened");
        assert_eq!(reader.check(Epoch(5)), Permission::Wait);
        writer.renew(boottime_ms().plus(3_600_000));
        assert_eq!(reader.check(Epoch(5)), Permission::Granted);
    }

    // Invariant B3
    #[test]
    fn no_io_is_permitted_after_the_deadline_and_a_renewal_permits_it_again() {
        let (_dir, path) = page();
        let mut writer = LeasePage::create(&path, NODE, Epoch(5)).expect("created");
        let reader = LeaseReader::open(&path).expect("opened");
        writer.renew(Millis(1000));
        assert!(granted_until(&reader, 5, 1000));
        writer.renew(Millis(400));
        assert!(granted_until(&reader, 5, 1000), "a deadline never gets earlier");
        writer.renew(Millis(2000));
        assert!(granted_until(&reader, 5, 2000));
    }

    // Invariant A5
    #[test]
    fn a_process_of_an_older_epoch_loses_its_right_for_good() {
        let (_dir, path) = page();
        LeasePage::create(&path, NODE, Epoch(5)).expect("created").renew(Millis(1000));
        let reader = LeaseReader::open(&path).expect("opened");
        let mut next = LeasePage::create(&path, NODE, Epoch(6)).expect("taken over in place");
        next.renew(Millis(9000));
        assert!(matches!(reader.check_at(Millis(10), Epoch(5)), Permission::Revoked(_)));
        assert_eq!(reader.check_at(Millis(10), Epoch(6)), Permission::Granted);
    }

    #[test]
    fn a_daemon_restarted_in_its_epoch_goes_on_with_the_lease_and_an_older_one_is_refused() {
        let (_dir, path) = page();
        LeasePage::create(&path, NODE, Epoch(5)).expect("created").renew(Millis(1000));
        let mut again = LeasePage::create(&path, NODE, Epoch(5)).expect("taken over");
        let reader = LeaseReader::open(&path).expect("opened");
        assert!(granted_until(&reader, 5, 1000));
        again.revoke();
        let still = LeasePage::create(&path, NODE, Epoch(5)).expect("taken over");
        assert!(still.view().revoked, "an epoch that is over stays over");
        assert!(matches!(LeasePage::create(&path, NODE, Epoch(4)), Err(LeaseError::EpochOver { .. })));
    }

    // Invariant A2
    #[test]
    fn a_revoked_lease_cannot_be_renewed() {
        let (_dir, path) = page();
        let mut writer = LeasePage::create(&path, NODE, Epoch(5)).expect("created");
        writer.renew(Millis(1000));
        writer.revoke();
        writer.renew(Millis(5000));
        let reader = LeaseReader::open(&path).expect("opened");
        assert!(matches!(reader.check_at(Millis(10), Epoch(5)), Permission::Revoked(_)));
    }

    #[test]
    fn a_page_torn_by_a_killed_writer_makes_io_wait_until_the_next_writer() {
        let (_dir, path) = page();
        let mut writer = LeasePage::create(&path, NODE, Epoch(5)).expect("created");
        writer.renew(Millis(1000));
        let reader = LeaseReader::open(&path).expect("opened");
        writer.page.word(word::DEADLINE).store(99_999, Ordering::Relaxed);
        assert_eq!(reader.check_at(Millis(10), Epoch(5)), Permission::Wait, "checksum");
        writer.page.word(word::DEADLINE).store(1000, Ordering::Relaxed);
        assert_eq!(reader.check_at(Millis(10), Epoch(5)), Permission::Granted);
        writer.page.word(word::SEQUENCE).fetch_or(1, Ordering::Relaxed);
        assert_eq!(reader.check_at(Millis(10), Epoch(5)), Permission::Wait, "writer at work");
        LeasePage::create(&path, NODE, Epoch(5)).expect("taken over").renew(Millis(1500));
        assert!(granted_until(&reader, 5, 1500));
    }

    #[test]
    fn readers_never_see_half_of_a_change() {
        let (_dir, path) = page();
        let mut writer = LeasePage::create(&path, NODE, Epoch(1)).expect("created");
        let reader = LeaseReader::open(&path).expect("opened");
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let (mut last, mut seen) = (0, 0_u64);
                while !stop.load(Ordering::Relaxed) {
                    let Some(view) = reader.view() else { continue };
                    assert_eq!(view.epoch.0, 1 + view.deadline.0 / 10, "{view:?}");
                    assert!(view.deadline.0 >= last);
                    last = view.deadline.0;
                    seen += 1;
                }
                seen
            });
            for deadline in 1..200_000 {
                writer.view.epoch = Epoch(1 + deadline / 10);
                writer.renew(Millis(deadline));
            }
            stop.store(true, Ordering::Relaxed);
            watch.join().expect("the watcher saw only whole pages");
        });
        assert_eq!(reader.view().expect("whole").deadline, Millis(199_999));
    }

    #[test]
    fn a_renewal_wakes_those_who_wait() {
        let (_dir, path) = page();
        let mut writer = LeasePage::create(&path, NODE, Epoch(1)).expect("created");
        let reader = LeaseReader::open(&path).expect("opened");
        let seen = reader.renewals();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| reader.wait_change(seen, Duration::from_secs(600)));
            writer.renew(Millis(1));
            assert_eq!(waiting.join().expect("woken"), seen + 1);
        });
    }

    #[test]
    fn what_is_not_a_lease_page_is_refused_by_name() {
        let (dir, path) = page();
        let missing = LeaseReader::open(&path).expect_err("not there").to_string();
        assert!(missing.contains("lease") && missing.contains("daemon"), "{missing}");
        let short = dir.path().join("short");
        std::fs::write(&short, b"CSVLEASE").expect("written");
        assert!(matches!(LeaseReader::open(&short), Err(LeaseError::NotALeasePage { .. })));
        let other = dir.path().join("other");
        std::fs::write(&other, [7; PAGE_BYTES]).expect("written");
        assert!(matches!(LeaseReader::open(&other), Err(LeaseError::NotALeasePage { .. })));
        assert!(matches!(LeasePage::create(&other, NODE, Epoch(1)), Err(LeaseError::NotALeasePage { .. })));
        assert_eq!(std::fs::read(&other).expect("read"), [7; PAGE_BYTES], "left as it was");
    }
}
