//! Saved memories that were left behind: the daemon that was to remove one has ended before the guest had read all of it.
//!
//! ```text
//!   .NAME-E.vmstate    written in epoch E, read by a process of epoch E + 1, of no use in any later one
//! ```
//! **Invariant:** a file that a record or a checkpoint names stays, and so does one whose reader may still run.

use std::sync::Arc;

use csvfs::node::{FsError, Node, ROOT_INO};
use hv_runner::config::VolumePath;
use lockmgr::cluster::ClusterState;

use super::migration::{remove_state, saved_name};
use crate::core::Core;

/// Entries of one page of a listing.
const PAGE_ENTRIES: u32 = 512;
const SUFFIX: &str = ".vmstate";

/// Removes what is left of a VM's saved memories, without being waited for.
pub(super) fn sweep(core: &Arc<Core>, vm: &str) {
    let (core, vm) = (Arc::clone(core), vm.to_owned());
    let runtime = core.runtime.clone();
    runtime.spawn_blocking(move || {
        for (volume, record) in &core.state().volumes {
            let Some(node) = core.volumes.get(record.id).and_then(|volume| volume.node()) else { continue };
            let names = names(&node).unwrap_or_else(|error| {
                tracing::warn!(volume, %error, "not looked for memories that were left behind");
                Vec::new()
            });
            // Not older than the listing: a file that is written now belongs to a record of now.
            let state = core.state();
            let files = names.into_iter().map(|path| VolumePath { volume: volume.clone(), path });
            files.filter(|file| is_left(&state, &vm, file)).for_each(|file| remove_state(&core, file));
        }
    });
}

/// Names in the volume's root.
fn names(node: &Node) -> Result<Vec<String>, FsError> {
    let (mut names, mut cookie) = (Vec::new(), 0);
    loop {
        let page = node.readdir(ROOT_INO, cookie, PAGE_ENTRIES)?;
        for entry in page.entries {
            cookie = entry.cookie;
            names.extend(String::from_utf8(entry.name));
        }
        if page.end {
            return Ok(names);
        }
    }
}

/// Whether a file is a memory of this VM that nobody reads any more.
fn is_left(state: &ClusterState, vm: &str, file: &VolumePath) -> bool {
    let Some(written_in) = epoch_of(vm, &file.path) else { return false };
    match state.vms.get(vm) {
        Some(record) => {
            record.epoch >= written_in.saturating_add(2) && record.saved.as_ref() != Some(&saved_name(file))
        }
        None => true,
    }
}

/// The epoch in which a memory of this VM was written.
fn epoch_of(vm: &str, path: &str) -> Option<u64> {
    path.strip_prefix('.')?.strip_prefix(vm)?.strip_prefix('-')?.strip_suffix(SUFFIX)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_is_told_from_those_of_other_vms_and_from_other_files() {
        assert_eq!(epoch_of("web", ".web-5.vmstate"), Some(5));
        assert_eq!(epoch_of("web-1", ".web-1-5.vmstate"), Some(5));
        for other in
            [".web-1-5.vmstate", ".web-5.vmstate.bak", "web-5.vmstate", ".web-.vmstate", ".we-5.vmstate"]
        {
            assert_eq!(epoch_of("web", other), None, "{other}");
        }
    }
}
