//! `volume cache`: memory for blocks of the LUN that a node's mount reads again, and for what it remembers of files.
//!
//! It serves reads through the mount. Processes of VMs read past it, with the cache of their guest. The setting is the
//! running daemon's: a node that starts again begins without.

use std::sync::Arc;

use api::{Error, pb};
use csvfs::node::CacheStats;

use crate::core::Core;
use crate::messages::{NodeAnswer, NodeOp};
use crate::{forward, view};

/// Changes or shows the caches of all nodes that are asked for.
pub(super) async fn cache(
    core: &Arc<Core>,
    request: pb::VolumeCacheRequest,
) -> Result<pb::VolumeCaches, Error> {
    let state = core.state();
    view::volume(&state, &request.name)?;
    let nodes: Vec<_> = if request.node.is_empty() {
        let mounts = |id| !state.witnesses.contains(&id);
        let up = state.members.values().filter(|member| view::is_up(&state, member.id, member.epoch));
        up.filter(|member| mounts(member.id)).collect()
    } else {
        vec![view::member(&state, &request.node)?]
    };
    let mut caches = Vec::new();
    for node in nodes {
        match forward::ask(core, node.id, NodeOp::VolumeCache(request.clone())).await? {
            NodeAnswer::VolumeCaches(rows) => caches.extend(rows.caches),
            _ => return Err(Error::failed("the node's answer cannot be read")),
        }
    }
    caches.sort_by(|a, b| a.node.cmp(&b.node));
    Ok(pb::VolumeCaches { caches })
}

/// Changes or shows this node's.
pub(crate) fn here(core: &Arc<Core>, request: &pb::VolumeCacheRequest) -> Result<pb::VolumeCaches, Error> {
    let state = core.state();
    let record = view::volume(&state, &request.name)?;
    let volume = core.volumes.get(record.id);
    let volume = volume.ok_or_else(|| Error::conflict(format!("volume {} is not open yet", record.name)))?;
    let node = volume.node_or_why()?;
    if let Some(bytes) = request.size_bytes {
        let road = volume.road().ok_or_else(|| Error::conflict("the LUN is not open yet"))?;
        node.set_read_cache(bytes, Some(road.right()?));
        let text = if bytes == 0 { "off".to_owned() } else { format!("{} MiB", bytes >> 20) };
        core.note("volume.cache", &record.name, format!("the read cache of {} is {text}", core.config.name));
    }
    if let Some(files) = request.files_max {
        node.set_memory(usize::try_from(files).unwrap_or(usize::MAX));
        let text = format!("{} remembers up to {files} files that nobody uses", core.config.name);
        core.note("volume.cache", &record.name, text);
    }
    let stats = node.read_cache();
    let row = pb::VolumeCacheRow {
        volume: record.name.clone(),
        node: core.config.name.clone(),
        size_bytes: stats.limit_bytes,
        used_bytes: stats.used_bytes,
        hits: stats.hits,
        misses: stats.misses,
        hit_rate: hit_rate(&stats),
        files: node.stats().files,
        files_max: node.memory() as u64,
    };
    Ok(pb::VolumeCaches { caches: vec![row] })
}

fn hit_rate(stats: &CacheStats) -> f64 {
    let all = stats.hits + stats.misses;
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let rate = stats.hits as f64 / all.max(1) as f64;
    rate
}

/// In one line, for `volume show`.
pub(super) fn described(stats: &CacheStats) -> String {
    if stats.limit_bytes == 0 {
        return "off".to_owned();
    }
    let (used, limit) = (stats.used_bytes >> 20, stats.limit_bytes.div_ceil(1 << 20));
    let rate = 100.0 * hit_rate(stats);
    format!("{used} of {limit} MiB, {rate:.1} % of {} reads from memory", stats.hits + stats.misses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_that_has_seen_nothing_has_a_rate_too() {
        let stats = CacheStats { limit_bytes: 1 << 20, ..CacheStats::default() };
        assert_eq!(described(&stats), "0 of 1 MiB, 0.0 % of 0 reads from memory");
        let stats = CacheStats { hits: 3, misses: 1, ..stats };
        assert_eq!(described(&stats), "0 of 1 MiB, 75.0 % of 4 reads from memory");
        assert_eq!(described(&CacheStats::default()), "off");
    }
}
