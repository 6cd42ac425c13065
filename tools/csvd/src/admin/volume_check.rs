//! `volume check`, its repair, and intent logs that are given up.
//!
//! A repair is a check, the repair of what it found, and another check: what is left is in the report.

use std::sync::Arc;

use api::{Error, pb};
use csvfs::node::{FsError, Node};
use csvfs::proto::{CheckReport, Repaired};
use lockmgr::{ClientId, Epoch, NodeId};

use super::file::failed;
use crate::core::Core;
use crate::view;

fn node_of(core: &Core, name: &str) -> Result<Arc<Node>, Error> {
    let state = core.state();
    let record = view::volume(&state, name)?;
    let volume = core.volumes.get(record.id);
    volume.ok_or_else(|| Error::conflict(format!("volume {name} is not open yet")))?.node_or_why()
}

pub(super) async fn check(
    core: &Arc<Core>,
    request: pb::VolumeCheckRequest,
) -> Result<pb::CheckReport, Error> {
    let node = node_of(core, &request.name)?;
    let repair = request.repair;
    let checked = tokio::task::spawn_blocking(move || checked(&node, repair)).await.map_err(Error::failed)?;
    let (report, actions) = checked.map_err(|error| failed("volume check", &request.name, &error))?;
    let problem = |p: csvfs::proto::CheckProblem| pb::CheckProblem { what: p.what, ino: p.ino };
    let action = |a: Repaired| pb::CheckAction { what: a.what, ino: a.ino, done: a.done };
    Ok(pb::CheckReport {
        volume: request.name,
        problems: report.problems.into_iter().map(problem).collect(),
        inodes: report.inodes,
        directories: report.directories,
        extents: report.extents,
        data_blocks: report.data_blocks,
        fresh_blocks: report.fresh_blocks,
        free_blocks: report.free_blocks,
        metadata_blocks: report.metadata_blocks,
        orphans: report.orphans,
        actions: actions.into_iter().map(action).collect(),
        shared_blocks: report.shared_blocks,
        set_aside: report.quarantined,
    })
}

fn checked(node: &Node, repair: bool) -> Result<(CheckReport, Vec<Repaired>), FsError> {
    let found = node.check()?;
    if !repair || found.problems.is_empty() {
        return Ok((found, Vec::new()));
    }
    let actions = node.repair(&found)?;
    Ok((node.check()?, actions))
}

/// Ends a client whose intent log cannot be read, without what the log may say.
pub(super) async fn give_up_log(
    core: &Arc<Core>,
    request: pb::VolumeGiveUpLogRequest,
) -> Result<pb::VolumeLogGivenUp, Error> {
    let client = client_of(&request.client).ok_or_else(|| {
        Error::usage(format!("{} is no client", request.client))
            .hint("`csvctl volume check` names the client: NODE.EPOCH.SERIAL")
    })?;
    let node = node_of(core, &request.name)?;
    let given_up = tokio::task::spawn_blocking(move || node.give_up_log(client)).await;
    given_up.map_err(Error::failed)?.map_err(|error| failed("volume give-up-log", &request.name, &error))?;
    Ok(pb::VolumeLogGivenUp { volume: request.name, client: request.client })
}

fn client_of(text: &str) -> Option<ClientId> {
    let mut parts = text.split('.');
    let (node, epoch, serial) = (parts.next()?, parts.next()?, parts.next()?);
    let (node, epoch) = (NodeId(node.parse().ok()?), Epoch(epoch.parse().ok()?));
    let client = ClientId { node, epoch, serial: serial.parse().ok()? };
    parts.next().is_none().then_some(client)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_named_as_it_is_shown() {
        let client = ClientId { node: NodeId(2), epoch: Epoch(7), serial: 9 };
        assert_eq!(client_of(&client.to_string()), Some(client));
        for text in ["", "1.2", "1.2.x", "1.2.3.4", "70000.1.1"] {
            assert_eq!(client_of(text), None, "{text}");
        }
    }
}
