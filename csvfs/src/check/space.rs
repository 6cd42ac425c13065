//! Who owns each block.
//!
//! **Invariant (D7):** every block of the data area has exactly one owner: a file, the metadata store, the pool
//! of a client, or nobody (free). What clones share counts as one owner, and its references are counted.

use std::collections::BTreeSet;

use lockmgr::ClientId;

use super::tree::Nodes;
use super::{Findings, shared};
use crate::extents::{Extent, State, fault};
use crate::format::layout::{BLOCK_BYTES, FIRST_CHUNK_OFFSET};
use crate::format::log_record::LANES;
use crate::format::meta_slot::Chunk;
use crate::meta::{PoolRun, Snapshot, StoreError};
use crate::proto::FileKind;

/// A run of blocks and whose it is.
struct Owned {
    start: u64,
    blocks: u64,
    owner: Owner,
}

/// Runs that marked extents have: first block and number.
type References = Vec<(u64, u64)>;

#[derive(Clone, Copy, PartialEq)]
enum Owner {
    File(u64),
    Clones,
    Metadata,
    Pool(u64),
    Free,
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(ino) => write!(f, "inode {ino}"),
            Self::Clones => f.write_str("files that share it"),
            Self::Metadata => f.write_str("the metadata store"),
            Self::Pool(log) => write!(f, "the pool with log {log}"),
            Self::Free => f.write_str("free space"),
        }
    }
}

pub(super) fn check(
    snapshot: &Snapshot,
    lun_bytes: u64,
    chunks: &[Chunk],
    nodes: Nodes,
    findings: &mut Findings,
) -> Result<(), StoreError> {
    let area = FIRST_CHUNK_OFFSET / BLOCK_BYTES..lun_bytes / BLOCK_BYTES;
    let (mut owned, references) = files(snapshot, &area, nodes, findings)?;
    for (start, blocks) in shared::check(snapshot, &references, findings)? {
        owned.push(Owned { start, blocks, owner: Owner::Clones });
    }
    let metadata = snapshot.chunks()?;
    for chunk in chunks {
        let run = (chunk.offset / BLOCK_BYTES, chunk.bytes / BLOCK_BYTES);
        if !metadata.contains(&run) {
            findings.problem(0, format!("a metadata chunk at {} that is not the store's", chunk.offset));
        }
    }
    for (start, blocks) in metadata {
        findings.report.metadata_blocks += blocks;
        owned.push(Owned { start, blocks, owner: Owner::Metadata });
    }
    for (start, blocks) in snapshot.free()? {
        findings.report.free_blocks += blocks;
        owned.push(Owned { start, blocks, owner: Owner::Free });
    }
    pools(snapshot, &mut owned, findings)?;
    one_owner_each(owned, &area, findings);
    Ok(())
}

/// Each pool is of a client that is there, and has a log for itself.
fn pools(snapshot: &Snapshot, owned: &mut Vec<Owned>, findings: &mut Findings) -> Result<(), StoreError> {
    let clients: BTreeSet<ClientId> = snapshot.clients()?.into_iter().map(|(client, _)| client).collect();
    let (mut lanes, mut logs) = (BTreeSet::new(), BTreeSet::new());
    for (client, row) in snapshot.logs()? {
        findings.report.pools += 1;
        if !clients.contains(&client) {
            findings.problem(0, format!("an intent log of client {client}, who is not there"));
        }
        if !logs.insert(row.log) || !lanes.insert(row.lane) || row.lane >= u32::from(LANES) {
            findings.problem(0, format!("the intent log of client {client} is not its own"));
        }
    }
    for PoolRun { start, blocks, log } in snapshot.pools()? {
        findings.report.pool_blocks += blocks;
        if !logs.contains(&log) {
            findings.problem(0, format!("block {start} is in the pool of nobody"));
        }
        owned.push(Owned { start, blocks, owner: Owner::Pool(log) });
    }
    Ok(())
}

/// What files have, and apart from that the runs that are marked as shared.
fn files(
    snapshot: &Snapshot,
    area: &std::ops::Range<u64>,
    mut nodes: Nodes,
    findings: &mut Findings,
) -> Result<(Vec<Owned>, References), StoreError> {
    let (mut owned, mut references) = (Vec::new(), Vec::new());
    let mut file: (u64, Vec<Extent>) = (0, Vec::new());
    snapshot.each_extent(|ino, extent| {
        if file.0 != ino {
            file_ends(&file, area, &mut nodes, findings);
            file = (ino, Vec::new());
        }
        findings.report.extents += 1;
        match extent.state {
            State::Data => findings.report.data_blocks += extent.blocks,
            State::Fresh => findings.report.fresh_blocks += extent.blocks,
            State::Shared => references.push((extent.lun, extent.blocks)),
        }
        if extent.state != State::Shared {
            owned.push(Owned { start: extent.lun, blocks: extent.blocks, owner: Owner::File(ino) });
        }
        file.1.push(extent);
        Ok(())
    })?;
    file_ends(&file, area, &mut nodes, findings);
    for (ino, node) in nodes.iter().filter(|(_, node)| node.blocks != 0) {
        findings.problem(*ino, format!("{} blocks too many are counted", node.blocks));
    }
    Ok((owned, references))
}

/// Checks one file's map; takes its blocks off what its inode counts.
fn file_ends(
    (ino, extents): &(u64, Vec<Extent>),
    area: &std::ops::Range<u64>,
    nodes: &mut Nodes,
    findings: &mut Findings,
) {
    if extents.is_empty() {
        return;
    }
    if let Some(fault) = fault(extents, area) {
        findings.problem(*ino, fault);
    }
    let blocks: u64 = extents.iter().map(|e| e.blocks).sum();
    match nodes.get_mut(ino) {
        Some(node) => {
            if node.kind != FileKind::Regular {
                findings.problem(*ino, "blocks of what is no regular file");
            }
            if node.blocks == blocks {
                node.blocks = 0;
            } else {
                findings.problem(*ino, format!("{} blocks are counted, {blocks} are there", node.blocks));
                node.blocks = 0;
            }
        }
        None => findings.problem(*ino, "blocks of a missing inode"),
    }
}

fn one_owner_each(mut owned: Vec<Owned>, area: &std::ops::Range<u64>, findings: &mut Findings) {
    owned.sort_by_key(|run| (run.start, run.blocks));
    let (mut at, mut last) = (area.start, Owner::Metadata);
    for run in &owned {
        if run.start > at {
            findings.problem(0, format!("blocks {at} to {} have no owner", run.start - 1));
        }
        if run.start < at {
            let what = format!("block {} belongs to {last} and to {}", run.start, run.owner);
            // A problem of each file: both are held still for its repair.
            let files = [last, run.owner].into_iter().filter_map(|owner| match owner {
                Owner::File(ino) => Some(ino),
                _ => None,
            });
            let files: BTreeSet<u64> = files.collect();
            if files.is_empty() {
                findings.problem(0, what.clone());
            }
            files.into_iter().for_each(|ino| findings.problem(ino, what.clone()));
        }
        let end = run.start.saturating_add(run.blocks);
        if end > at {
            (at, last) = (end, run.owner);
        }
    }
    if at < area.end {
        findings.problem(0, format!("blocks {at} to {} have no owner", area.end - 1));
    }
    if at > area.end {
        findings.problem(0, format!("{last} reaches beyond the end of the volume"));
    }
}
