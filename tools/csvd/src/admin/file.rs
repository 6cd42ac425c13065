//! `file`: what is behind a path.
//!
//! The node library is asked, so the answers are coherent with what other nodes are writing.

use std::sync::Arc;

use api::{Error, pb};
use csvfs::node::{Attr, ExtentState, FileKind, FsError, Node};
use csvfs::proto::{ClientId, GrantInfo, GrantMode, LockInfo, Timestamp};
use lockmgr::NodeId;

use super::path::{OnVolume, resolve};
use crate::core::Core;
use crate::view;

/// Runs `ask` with the volume's node library, which may block, on a thread for it.
async fn with_node<T: Send + 'static>(
    core: &Arc<Core>,
    path: String,
    doing: &'static str,
    ask: impl FnOnce(&Arc<Node>, &str) -> Result<T, FsError> + Send + 'static,
) -> Result<(OnVolume, T), Error> {
    let place = resolve(core, &core.state(), &path)?;
    let volume = core
        .volumes
        .get(place.volume.id)
        .ok_or_else(|| Error::conflict(format!("volume {} is not open yet", place.volume.name)))?;
    let node = volume.node_or_why()?;
    let below = place.path.clone();
    let asked = tokio::task::spawn_blocking(move || ask(&node, &below)).await.map_err(Error::failed)?;
    let answer = asked.map_err(|error| failed(doing, &path, &error))?;
    Ok((place, answer))
}

pub(super) fn failed(doing: &str, path: &str, error: &FsError) -> Error {
    let kind = match error.errno() {
        libc::ENOENT => api::Kind::NotFound,
        libc::EBUSY => api::Kind::Conflict,
        _ => api::Kind::Failed,
    };
    Error::new(kind, error).during(format!("{doing} {path}"))
}

pub(super) async fn stat(core: &Arc<Core>, path: String) -> Result<pb::FileStatus, Error> {
    let shown = path.clone();
    let (place, attr) = with_node(core, path, "file stat", |node, below| node.resolve(below)).await?;
    Ok(status(shown, place.volume.name, &attr))
}

fn status(path: String, volume: String, attr: &Attr) -> pb::FileStatus {
    pb::FileStatus {
        path,
        volume,
        ino: attr.ino,
        kind: kind(attr.kind).to_owned(),
        mode: format!("{:04o}", attr.mode),
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        size_bytes: attr.size_bytes,
        allocated_bytes: attr.allocated_bytes,
        atime_ms: unix_ms(attr.atime),
        mtime_ms: unix_ms(attr.mtime),
        ctime_ms: unix_ms(attr.ctime),
        btime_ms: unix_ms(attr.btime),
        generation: attr.generation,
    }
}

fn kind(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Regular => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
        FileKind::CharDevice => "char_device",
        FileKind::BlockDevice => "block_device",
    }
}

fn unix_ms(time: Timestamp) -> i64 {
    time.seconds.saturating_mul(1000).saturating_add(i64::from(time.nanos / 1_000_000))
}

pub(super) async fn map(core: &Arc<Core>, path: String) -> Result<pb::FileExtents, Error> {
    let shown = path.clone();
    let (place, (attr, extents)) = with_node(core, path, "file map", |node, below| {
        let attr = node.resolve(below)?;
        let file = node.open(attr.ino)?;
        let extents = file.map()?;
        Ok((file.attr()?, extents))
    })
    .await?;
    let extents = extents.into_iter().map(|extent| {
        let state = match extent.state {
            ExtentState::Data => "data",
            ExtentState::Fresh => "fresh",
            ExtentState::Shared => "shared",
        };
        pb::FileExtent {
            file_offset_bytes: extent.file_offset,
            length_bytes: extent.length,
            lun_offset_bytes: extent.lun_offset,
            state: state.to_owned(),
        }
    });
    Ok(pb::FileExtents {
        path: shown,
        volume: place.volume.name,
        ino: attr.ino,
        lun: place.volume.lun_uri,
        size_bytes: attr.size_bytes,
        extents: extents.collect(),
    })
}

pub(super) async fn grants(core: &Arc<Core>, path: String) -> Result<pb::FileGrantList, Error> {
    let shown = path.clone();
    let (place, (ino, list)) = with_node(core, path, "file grants", |node, below| {
        let ino = node.resolve_at_once(below)?;
        Ok((ino, node.grants(ino)?))
    })
    .await?;
    let state = core.state();
    let name_of = |client: Option<ClientId>| {
        let node = client.and_then(|client| u16::try_from(client.node).ok()).map(NodeId);
        node.map(|node| view::node_name(&state, node)).unwrap_or_default()
    };
    let grants = list.grants.iter().map(|grant| self::grant(name_of(grant.client), grant)).collect();
    let locks = list.locks.iter().map(|lock| self::lock(name_of(lock.client), lock)).collect();
    Ok(pb::FileGrantList { path: shown, volume: place.volume.name, ino, grants, locks })
}

fn lock(node: String, info: &LockInfo) -> pb::FileLock {
    let lock = info.lock.unwrap_or_default();
    pb::FileLock {
        client: info.client_name.clone(),
        node,
        family: if lock.flock { "flock" } else { "range" }.to_owned(),
        mode: if lock.write { "write" } else { "read" }.to_owned(),
        start: lock.start,
        end: lock.end,
        pid: lock.pid,
        waits: info.waits,
        for_ms: info.since_ms,
        next: info.next.clone(),
    }
}

fn grant(node: String, grant: &GrantInfo) -> pb::FileGrant {
    pb::FileGrant {
        client: grant.client_name.clone(),
        node,
        held: mode(grant.held()).to_owned(),
        wanted: mode(grant.wanted()).to_owned(),
        for_ms: grant.since_ms,
        recalled: grant.recalled,
        next: grant.next.clone(),
    }
}

fn mode(mode: GrantMode) -> &'static str {
    match mode {
        GrantMode::Null => "NL",
        GrantMode::ProtectedRead => "PR",
        GrantMode::ConcurrentWrite => "CW",
        GrantMode::Exclusive => "EX",
    }
}
