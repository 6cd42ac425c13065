//! Checks a volume: walks everything and says what does not fit.
//!
//! ```text
//!   fixed areas   superblocks, owner block, intent logs, metadata slots       read from the LUN
//!   tables        inodes <-> entries <-> cookies, links, tree, orphans        from one committed moment of the store
//!   attributes    each has an inode, lists agree with modes                   "
//!   space         every block of the data area has exactly one owner          files, metadata chunks, pools, free
//! ```
//! In use, the tables are read from a snapshot beside the running coordinator. Offline, the store is opened on an
//! overlay: recovery writes to memory, so a check never changes the LUN (D7).
//!
//! **Invariant:** a check changes nothing, and ends on any input: cycles and nonsense are found, not followed.

mod overlay;
pub(crate) mod repair;
mod shared;
mod space;
mod tree;
mod xattrs;

use std::sync::Arc;

use blockio::BlockDevice;
use lockmgr::VolumeId;

use crate::format::meta_slot::Chunk;
use crate::format::owner::{OWNER_BYTES, OwnerBlock};
use crate::format::superblock::Superblock;
use crate::format::{Damaged, intent, layout};
use crate::meta::{Snapshot, Store, StoreError, guarded};
use crate::proto::{CheckProblem, CheckReport};
use crate::volume::{VolumeError, read_copies};

/// Problems that are listed; after as many, the rest is only counted.
const PROBLEMS_MAX: usize = 1000;

/// A report in the making.
#[derive(Debug, Default)]
struct Findings {
    report: CheckReport,
    unlisted: u64,
}

impl Findings {
    fn problem(&mut self, ino: u64, what: impl Into<String>) {
        if self.report.problems.len() < PROBLEMS_MAX {
            self.report.problems.push(CheckProblem { what: what.into(), ino });
        } else {
            self.unlisted += 1;
        }
    }

    fn finish(mut self) -> CheckReport {
        if self.unlisted > 0 {
            let what = format!("and {} more problems", self.unlisted);
            self.report.problems.push(CheckProblem { what, ino: 0 });
        }
        self.report
    }
}

/// Checks the volume on a LUN that no coordinator serves. Writes nothing.
///
/// # Errors
/// When the volume cannot even be opened: no superblock, or a metadata store that is no database any more.
pub fn check_device(device: &Arc<dyn BlockDevice>) -> Result<CheckReport, VolumeError> {
    let block = Superblock::read(device.as_ref())?;
    let overlay = Arc::new(overlay::Overlay::new(device.clone()));
    let mut store = Store::open_verified(overlay, block.volume, block.lun_bytes)?;
    let report = guarded("a page that cannot be read", || {
        store.make_tables()?;
        let snapshot = store.snapshot()?.passing_over_damage();
        check_tables(&snapshot, block.lun_bytes, &store.chunks())
    })??;
    Ok(with_fixed_areas(report, device.as_ref(), block.volume))
}

/// Checks the tables of the store.
pub(crate) fn check_tables(
    snapshot: &Snapshot,
    lun_bytes: u64,
    chunks: &[Chunk],
) -> Result<CheckReport, StoreError> {
    // An extension that was cut short is finished by the next coordinator; until then the tables know less than the LUN.
    let lun_bytes = snapshot
        .area_blocks()
        .ok()
        .flatten()
        .map_or(lun_bytes, |blocks| lun_bytes.min(blocks * layout::BLOCK_BYTES));
    let mut findings = Findings::default();
    for row in snapshot.damaged_rows(PROBLEMS_MAX)? {
        findings.problem(0, format!("a row of {} cannot be read", row.table.name()));
    }
    findings.report.quarantined = snapshot.set_aside(None)?;
    let inodes = tree::check(snapshot, &mut findings)?;
    space::check(snapshot, lun_bytes, chunks, inodes, &mut findings)?;
    Ok(findings.finish())
}

/// Adds what is wrong with the fixed areas.
pub(crate) fn with_fixed_areas(
    mut report: CheckReport,
    device: &dyn BlockDevice,
    volume: VolumeId,
) -> CheckReport {
    let mut problem = |what: String| report.problems.push(CheckProblem { what, ino: 0 });
    match read_copies(device) {
        Ok(copies) => copies.into_iter().filter_map(Result::err).for_each(|d| problem(d.to_string())),
        Err(error) => problem(error.to_string()),
    }
    if let Some(what) = owner_problem(device, volume) {
        problem(what);
    }
    for slot in 0..lockmgr::NODES_MAX {
        let mut bytes = vec![0; intent::RING_HEADER_BYTES];
        match device.read_at(intent::ring_offset(slot), &mut bytes) {
            Ok(()) => {
                if let Err(damage) = intent::check_ring(&bytes, slot, volume) {
                    problem(damage.to_string());
                }
            }
            Err(error) => problem(error.to_string()),
        }
    }
    report
}

/// One copy may be torn or not yet written; without any, nobody knows the term.
fn owner_problem(device: &dyn BlockDevice, volume: VolumeId) -> Option<String> {
    let read = |offset: u64| {
        let mut bytes = vec![0; OWNER_BYTES];
        device.read_at(offset, &mut bytes).map_err(|error| error.to_string())?;
        OwnerBlock::decode(&bytes, offset, volume).map(drop).map_err(|damage: Damaged| damage.to_string())
    };
    let [a, b] = layout::OWNER_OFFSETS.map(read);
    match (a, b) {
        (Err(a), Err(b)) => Some(format!("no owner block is whole: {a}; {b}")),
        _ => None,
    }
}
