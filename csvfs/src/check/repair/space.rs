//! Blocks: each has one owner, or files that share it; what nobody has is free.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::Repair;
use crate::check::shared::counted;
use crate::extents::{Extent, State, merged, shared, without};
use crate::format::layout::BLOCK_BYTES;
use crate::meta::{StoreError, TableId};
use crate::proto::FileKind;
use crate::refcounts::SharedRun;

/// Runs of blocks: first to one past the last.
type Runs = Vec<Range<u64>>;

impl Repair<'_, '_> {
    pub(super) fn space(&mut self) -> Result<(), StoreError> {
        self.chunks()?;
        self.pools()?;
        let mut files = self.maps()?;
        self.owners(&mut files)?;
        self.counts(&files)?;
        self.blocks_of_inodes(&files);
        self.free(&files)?;
        // Blocks without an owner may have got names.
        self.links()
    }

    /// The metadata slot knows its chunks.
    fn chunks(&mut self) -> Result<(), StoreError> {
        let known: BTreeSet<(u64, u64)> = self.tables.chunks()?.into_iter().collect();
        for chunk in self.params.chunks.clone() {
            let (start, blocks) = (chunk.offset / BLOCK_BYTES, chunk.bytes / BLOCK_BYTES);
            if !known.contains(&(start, blocks)) {
                self.tables.put_chunk(start, blocks)?;
                self.did(0, format!("the metadata chunk at block {start} is the store's again"));
            }
        }
        Ok(())
    }

    /// Each pool is of a log.
    fn pools(&mut self) -> Result<(), StoreError> {
        let logs: BTreeSet<u64> = self.tables.logs()?.into_iter().map(|(_, row)| row.log).collect();
        for run in self.tables.pools()?.into_iter().filter(|run| !logs.contains(&run.log)) {
            self.tables.quarantine_pool_run(run.start)?;
            self.did(0, format!("{} blocks at {} were in the pool of nobody", run.blocks, run.start));
        }
        Ok(())
    }

    /// The maps of all files, without what cannot be in one.
    fn maps(&mut self) -> Result<BTreeMap<u64, Vec<Extent>>, StoreError> {
        let mut files: BTreeMap<u64, Vec<Extent>> = BTreeMap::new();
        let mut bad = Vec::new();
        let (area, inodes) = (self.params.area.clone(), &self.inodes);
        self.tables.each_extent(|ino, extent| {
            let regular = inodes.get(&ino).is_some_and(|inode| inode.kind() == FileKind::Regular);
            let inside = extent.lun >= area.start && extent.lun + extent.blocks <= area.end;
            let map = files.entry(ino).or_default();
            if !regular || !inside || map.last().is_some_and(|last| last.end() > extent.file) {
                bad.push((ino, extent));
            } else {
                map.push(extent);
            }
            Ok(())
        })?;
        for (ino, extent) in bad {
            self.tables.quarantine_extent(ino, extent.file)?;
            let (at, lun) = (extent.file, extent.lun);
            self.did(
                ino,
                format!("the extent at block {at} of the file, to block {lun}, cannot be and was set aside"),
            );
        }
        Ok(files)
    }

    /// Settles who has what. Fresh blocks that others have too become holes, which read the same; data that two files have is
    /// shared from now on.
    fn owners(&mut self, files: &mut BTreeMap<u64, Vec<Extent>>) -> Result<(), StoreError> {
        let metadata: Runs =
            self.tables.chunks()?.into_iter().map(|(start, blocks)| start..start + blocks).collect();
        let pools: Runs = self.tables.pools()?.iter().map(|run| run.start..run.start + run.blocks).collect();
        let data = counted(&runs_of(files, |state| state != State::Fresh));
        let twice: Runs =
            data.iter().filter(|(.., count)| *count > 1).map(|(from, to, _)| *from..*to).collect();
        let once: Runs = data.iter().map(|(from, to, _)| *from..*to).collect();
        let mut fresh_so_far: Runs = Vec::new();
        let inos: Vec<u64> = files.keys().copied().collect();
        for ino in inos {
            let old = files.get(&ino).cloned().unwrap_or_default();
            let mut map = old.clone();
            let of_store = file_ranges(&map, &metadata, |_| true);
            let fresh =
                |taken: &[Range<u64>], map: &[Extent]| file_ranges(map, taken, |state| state == State::Fresh);
            let holes = [fresh(&once, &map), fresh(&fresh_so_far, &map)].concat();
            let marks = file_ranges(&map, &twice, |state| state == State::Data);
            for range in of_store.iter().chain(&holes) {
                map = without(&map, range, |_| true).0;
            }
            for range in &marks {
                map = shared(&map, range);
            }
            let pooled = file_ranges(&map, &pools, |_| true);
            if !pooled.is_empty() {
                self.left(ino, "blocks of it are in the pool of a client: end that client (stop the VM, or restart the node), then repair again");
            }
            if map != old && !(self.params.is_quiet)(ino) {
                self.left(ino, "somebody uses the file: repair again");
            } else if map != old {
                self.tables.replace_extents(ino, &old, &map)?;
                self.tell(ino, of_store.len(), holes.len(), marks.len());
                files.insert(ino, map);
            }
            let now = files.get(&ino).map(Vec::as_slice).unwrap_or_default();
            let fresh = now.iter().filter(|e| e.state == State::Fresh);
            fresh_so_far.extend(fresh.map(|e| e.lun..e.lun + e.blocks));
            fresh_so_far.sort_by_key(|run| run.start);
        }
        Ok(())
    }

    fn tell(&mut self, ino: u64, of_store: usize, holes: usize, marks: usize) {
        if of_store > 0 {
            self.did(
                ino,
                format!(
                    "{of_store} ranges of it lay in the metadata store and read zeros now: restore the file"
                ),
            );
        }
        if holes > 0 {
            self.did(
                ino,
                format!(
                    "{holes} ranges of it that were never written are holes now: others have their blocks"
                ),
            );
        }
        if marks > 0 {
            self.did(ino, format!("{marks} ranges of it are shared with other files now, which claim the same blocks: compare their content"));
        }
    }

    /// The references, counted anew.
    fn counts(&mut self, files: &BTreeMap<u64, Vec<Extent>>) -> Result<(), StoreError> {
        let references = counted(&runs_of(files, |state| state == State::Shared));
        let mut wanted: Vec<SharedRun> = Vec::new();
        for (start, end, count) in references.into_iter().filter(|(.., count)| *count >= 2) {
            match wanted.last_mut() {
                Some(last) if last.end() == start && last.count == count => last.blocks += end - start,
                _ => wanted.push(SharedRun { start, blocks: end - start, count }),
            }
        }
        let mut kept = Vec::new();
        self.tables.each_shared_run(|run| {
            kept.push(run);
            Ok(())
        })?;
        let there: Vec<_> = wanted.iter().map(|run| (run.start, run.end(), run.count)).collect();
        let wrong = crate::check::shared::differences(&there, &kept);
        if !wrong.is_empty() {
            self.tables.replace_shared_runs(&kept, &wanted)?;
            self.did(0, format!("{} counts of references were corrected", wrong.len()));
        }
        Ok(())
    }

    fn blocks_of_inodes(&mut self, files: &BTreeMap<u64, Vec<Extent>>) {
        let all: Vec<u64> = self.inodes.keys().copied().collect();
        for ino in all {
            let there: u64 = files.get(&ino).into_iter().flatten().map(|extent| extent.blocks).sum();
            if self.inodes.get(&ino).is_some_and(|inode| inode.blocks != there) {
                if let Some(inode) = self.change(ino) {
                    inode.blocks = there;
                }
                self.did(ino, format!("{there} blocks are counted"));
            }
        }
    }

    /// Free is what nobody has; when it is not known who had something, it is kept as a file.
    fn free(&mut self, files: &BTreeMap<u64, Vec<Extent>>) -> Result<(), StoreError> {
        let mut owned: Vec<(u64, u64)> = runs_of(files, |_| true);
        owned.extend(self.tables.chunks()?);
        owned.extend(self.tables.pools()?.iter().map(|run| (run.start, run.blocks)));
        let owned: Runs = counted(&owned).into_iter().map(|(from, to, _)| from..to).collect();
        let kept = self.tables.free()?;
        let kept_runs: Runs = counted(&kept).into_iter().map(|(from, to, _)| from..to).collect();
        let mut free = gaps(&self.params.area, &owned);
        let leaked: Runs = free.iter().flat_map(|run| gaps(run, &kept_runs)).collect();
        let leaked_blocks: u64 = leaked.iter().map(|run| run.end - run.start).sum();
        let unknown = self.tables.set_aside(Some(TableId::Extents))?;
        let unknown_pools = self.tables.set_aside(Some(TableId::Pools))?;
        if leaked_blocks > 0 && unknown + unknown_pools > 0 {
            self.keep_as_file(&leaked)?;
            free = free.iter().flat_map(|run| gaps(run, &leaked)).collect();
        } else if leaked_blocks > 0 {
            self.did(0, format!("{leaked_blocks} blocks without an owner are free again"));
        }
        let wanted: Vec<(u64, u64)> = free.iter().map(|run| (run.start, run.end - run.start)).collect();
        if wanted != kept {
            for (start, _) in &kept {
                self.tables.remove_free(*start)?;
            }
            for (start, blocks) in &wanted {
                self.tables.put_free(*start, *blocks)?;
            }
            if leaked_blocks == 0 {
                self.did(0, "the table of free space was built anew");
            }
        }
        Ok(())
    }

    /// Blocks whose owner was lost with its row.
    fn keep_as_file(&mut self, runs: &[Range<u64>]) -> Result<(), StoreError> {
        let ino = self.next_ino;
        self.next_ino += 1;
        self.make_inode(ino, FileKind::Regular);
        let mut extents = Vec::new();
        let mut at = 0;
        for run in runs {
            let blocks = run.end - run.start;
            extents.push(Extent { file: at, blocks, lun: run.start, state: State::Data });
            at += blocks;
        }
        self.tables.replace_extents(ino, &[], &merged(extents))?;
        if let Some(inode) = self.change(ino) {
            (inode.blocks, inode.size_bytes, inode.nlink) = (at, at * BLOCK_BYTES, 1);
        }
        let folder = self.lost_found()?;
        let name = format!("blocks-{ino}");
        self.put_name(folder, name.as_bytes(), ino)?;
        self.did(ino, format!("{at} blocks whose owner is not known are /lost+found/{name} now"));
        Ok(())
    }
}

/// Where the extents whose state `counts` lie, as (first, number).
fn runs_of(files: &BTreeMap<u64, Vec<Extent>>, counts: impl Fn(State) -> bool) -> Vec<(u64, u64)> {
    let extents = files.values().flatten().filter(|extent| counts(extent.state));
    extents.map(|extent| (extent.lun, extent.blocks)).collect()
}

/// The parts of a map, as ranges of the file, that lie in `runs`, which are sorted and do not overlap.
fn file_ranges(map: &[Extent], runs: &[Range<u64>], counts: impl Fn(State) -> bool) -> Runs {
    let mut found = Vec::new();
    for extent in map.iter().filter(|extent| counts(extent.state)) {
        let end = extent.lun + extent.blocks;
        let first = runs.partition_point(|run| run.end <= extent.lun);
        for run in runs[first..].iter().take_while(|run| run.start < end) {
            let (from, to) = (run.start.max(extent.lun), run.end.min(end));
            found.push(extent.file + (from - extent.lun)..extent.file + (to - extent.lun));
        }
    }
    found
}

/// The parts of `whole` that are in none of `runs`, which are sorted and do not overlap.
fn gaps(whole: &Range<u64>, runs: &[Range<u64>]) -> Runs {
    let (mut gaps, mut at) = (Vec::new(), whole.start);
    let first = runs.partition_point(|run| run.end <= whole.start);
    for run in runs[first..].iter().take_while(|run| run.start < whole.end) {
        if run.start > at {
            gaps.push(at..run.start);
        }
        at = at.max(run.end);
    }
    if at < whole.end {
        gaps.push(at..whole.end);
    }
    gaps
}
