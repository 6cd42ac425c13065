//! `volume`.

use std::sync::Arc;
use std::time::Duration;

use api::config::FenceConfig;
use api::{Error, pb};
use blockio::Route;
use lockmgr::cluster::{ClusterState, FenceKind, MemberState, VolumeRecord, VolumeState};

use super::file::failed;
use super::{health, volume_cache};
use crate::core::Core;
use crate::messages::{NodeAnswer, NodeOp};
use crate::redirect::orders;
use crate::volumes::{LocalVolume, create};
use crate::{forward, view};

/// Longest time that a new volume may take until it is mounted here.
const MOUNTED_WITHIN_MS: u64 = 30_000;
/// Longest time that another node may take to tell how it reaches its volumes.
const ROWS_WITHIN: Duration = Duration::from_secs(5);
/// Longest time to wait for this node to learn of a move that is done.
const RECORD_WITHIN: Duration = Duration::from_secs(2);

pub(super) async fn create(core: &Arc<Core>, request: pb::VolumeCreateRequest) -> Result<pb::Volume, Error> {
    core.refuse_witness("volume create")?;
    let (name, lun, dry_run) = (request.name.clone(), request.lun.clone(), request.dry_run);
    create::create(core, request).await?;
    if dry_run {
        return Ok(pb::Volume { name, lun, state: "would_be_created".to_owned(), ..pb::Volume::default() });
    }
    let wanted = pb::WaitRequest { timeout_ms: MOUNTED_WITHIN_MS, nodes_up: 1, volumes: vec![name.clone()] };
    health::wait(core, wanted).await.map_err(|error| error.during(format!("volume create {name}")))?;
    show(core, &name).await
}

pub(super) async fn list(core: &Arc<Core>) -> Result<pb::Volumes, Error> {
    let state = core.state();
    let mut volumes = Vec::new();
    for record in state.volumes.values() {
        volumes.push(describe(core, &state, record).await);
    }
    Ok(pb::Volumes { volumes })
}

pub(super) async fn show(core: &Arc<Core>, name: &str) -> Result<pb::Volume, Error> {
    let state = core.state();
    Ok(describe(core, &state, view::volume(&state, name)?).await)
}

async fn describe(core: &Arc<Core>, state: &ClusterState, record: &VolumeRecord) -> pb::Volume {
    let local = core.volumes.get(record.id);
    let status = local.as_ref().map(|local| local.status.get());
    let node = local.and_then(|local| local.node());
    let mounted = node.is_some();
    let cache = node.as_ref().map_or_else(String::new, |node| volume_cache::described(&node.read_cache()));
    let room = match node {
        Some(node) => {
            let asked = tokio::task::spawn_blocking(move || node.statfs());
            let answer = tokio::time::timeout(ROWS_WITHIN, asked).await;
            answer.ok().and_then(Result::ok).and_then(Result::ok).unwrap_or_default()
        }
        None => csvfs::proto::VolumeStat::default(),
    };
    pb::Volume {
        name: record.name.clone(),
        id: record.id.to_string(),
        lun: record.lun_uri.clone(),
        size_bytes: room.blocks * room.block_bytes,
        free_bytes: room.blocks_free * room.block_bytes,
        block_bytes: room.block_bytes,
        inodes: room.inodes,
        owner: view::node_name(state, record.owner),
        term: record.term.0,
        fence: record.fence_kind.to_string(),
        fence_wait_ms: match record.fence_kind {
            FenceKind::Lease => core.timing.taker_start_ms(core.timing.lease_ms),
            FenceKind::Agent | FenceKind::Reservation => 0,
        },
        fence_how: fence_how(core, record),
        cache,
        features: Vec::new(),
        state: status.map(|status| status.state.word().to_owned()).unwrap_or_default(),
        mount: if mounted {
            core.config.mount_point(&record.name).display().to_string()
        } else {
            String::new()
        },
    }
}

/// What happens to a node that dies, in words.
fn fence_how(core: &Core, record: &VolumeRecord) -> String {
    match (record.fence_kind, &core.config.fence) {
        (FenceKind::Reservation, _) => {
            "the LUN refuses the writes of a node whose key was taken off it".to_owned()
        }
        (FenceKind::Lease, _) => format!(
            "nothing can cut a node off: others wait until its lease and its last I/O are over, {} ms",
            core.timing.taker_start_ms(core.timing.lease_ms)
        ),
        (FenceKind::Agent, FenceConfig::Operator) => {
            "no program can power a node off: an operator confirms that it is (node confirm-dead)".to_owned()
        }
        (FenceKind::Agent, FenceConfig::LocalKill) => "the processes of the node are killed".to_owned(),
        (FenceKind::Agent, FenceConfig::Agent { program, .. }) => {
            format!("{} powers the node off", program.display())
        }
    }
}

/// A row per volume and node; a node that does not answer is shown as not reachable.
pub(super) async fn states(
    core: &Arc<Core>,
    request: pb::VolumeStateRequest,
) -> Result<pb::VolumeStates, Error> {
    let state = core.state();
    if !request.name.is_empty() {
        view::volume(&state, &request.name)?;
    }
    let members: Vec<_> = if request.node.is_empty() {
        state.members.values().filter(|member| !state.witnesses.contains(&member.id)).collect()
    } else {
        vec![view::member(&state, &request.node)?]
    };
    let mut rows = Vec::new();
    for member in members {
        let op = NodeOp::VolumeState(request.clone());
        let asked = tokio::time::timeout(ROWS_WITHIN, forward::ask(core, member.id, op)).await;
        match asked {
            Ok(Ok(NodeAnswer::VolumeStates(states))) => rows.extend(states.states),
            _ => rows.extend(unknown(&state, &request, &member.name, member.state)),
        }
    }
    rows.sort_by(|a, b| (&a.volume, &a.node).cmp(&(&b.volume, &b.node)));
    Ok(pb::VolumeStates { states: rows })
}

fn unknown(
    state: &ClusterState,
    request: &pb::VolumeStateRequest,
    node: &str,
    member: MemberState,
) -> Vec<pb::VolumeStateRow> {
    let volumes = state.volumes.values().filter(|record| fits(&request.name, record));
    volumes
        .map(|record| pb::VolumeStateRow {
            volume: record.name.clone(),
            node: node.to_owned(),
            state: "paused".to_owned(),
            reason: format!("the node does not answer; the cluster holds it for {member}"),
            code: "no_node".to_owned(),
            since_ms: 0,
            redirected_bytes: 0,
            owner: view::node_name(state, record.owner) == node,
        })
        .collect()
}

fn fits(name: &str, record: &VolumeRecord) -> bool {
    name.is_empty() || name == record.name
}

/// How this node reaches its volumes.
pub(crate) fn states_here(core: &Arc<Core>, request: &pb::VolumeStateRequest) -> pb::VolumeStates {
    let state = core.state();
    let volumes = state.volumes.values().filter(|record| fits(&request.name, record));
    let rows = volumes.map(|record| row(core, record));
    pb::VolumeStates { states: rows.collect() }
}

fn row(core: &Core, record: &VolumeRecord) -> pb::VolumeStateRow {
    let mut row = pb::VolumeStateRow {
        volume: record.name.clone(),
        node: core.config.name.clone(),
        owner: record.owner == core.me,
        state: "paused".to_owned(),
        reason: "the volume has only just appeared".to_owned(),
        code: "starting".to_owned(),
        since_ms: 0,
        redirected_bytes: 0,
    };
    if let Some(local) = core.volumes.get(record.id) {
        let status = local.status.get();
        row.state = status.state.word().to_owned();
        row.code = status.state.code().to_owned();
        row.reason = status.reason;
        row.since_ms = status.since_ms;
        // A failed flush or a refused claim ends all writing here until the node attaches anew (D6).
        if let Some(why) = local.node().and_then(|node| node.stopped()) {
            row.state = "paused".to_owned();
            row.code = "io_stopped".to_owned();
            row.reason = format!("{why}; restart the node when the cause is gone");
        }
    }
    if let Some(why) = core.volumes.get(record.id).and_then(|local| local.road()?.place().lost()) {
        row.state = "paused".to_owned();
        row.code = "cut_off".to_owned();
        row.reason = format!("{why}; restart the node: it comes back as a new incarnation");
        return row;
    }
    if row.state == "direct"
        && let Some(local) = core.volumes.get(record.id)
    {
        show_path(&mut row, &local);
    }
    if row.state != "paused" && !core.membership.lease.is_held() {
        row.state = "paused".to_owned();
        row.code = "no_lease".to_owned();
        row.reason = "the node's lease has run out; its I/O waits for a majority".to_owned();
    }
    row
}

/// Which way the node takes to the LUN, once it is mounted.
fn show_path(row: &mut pb::VolumeStateRow, local: &LocalVolume) {
    let (Some(path), Some(road)) = (local.path(), local.road()) else { return };
    let status = path.status();
    row.redirected_bytes = path.redirected_bytes();
    let (state, code) = match (status.route, status.by_hand) {
        (Route::Direct, _) => return,
        (Route::Detour, true) => ("redirected_block", "by_hand"),
        (Route::Detour, false) => ("redirected_block", "path_lost"),
        (Route::Closed, _) => ("paused", "no_path"),
    };
    row.state = state.to_owned();
    row.code = code.to_owned();
    row.reason = status.reason;
    row.since_ms = road.since_ms();
}

/// Has nodes take the detour, or leave it; gives how they reach the volume then.
pub(super) async fn io_mode(
    core: &Arc<Core>,
    request: pb::VolumeIoModeRequest,
) -> Result<pb::VolumeStates, Error> {
    orders::wants_detour(&request.mode)?;
    let state = core.state();
    let record = view::volume(&state, &request.name)?;
    let nodes: Vec<_> = if request.node.is_empty() {
        state.serving().collect()
    } else {
        vec![view::member(&state, &request.node)?]
    };
    for node in nodes {
        forward::ask(core, node.id, NodeOp::VolumeIoMode(request.clone())).await?;
    }
    states(core, pb::VolumeStateRequest { name: record.name.clone(), node: request.node }).await
}

/// Has the owner hand the coordinator over.
pub(super) async fn move_(
    core: &Arc<Core>,
    request: pb::VolumeMoveRequest,
) -> Result<pb::VolumeMoved, Error> {
    let state = core.state();
    let record = view::volume(&state, &request.name)?;
    if !view::is_up(&state, record.owner, record.owner_epoch) {
        return Err(Error::conflict(format!(
            "volume move {}: its owner {} is not up",
            record.name,
            view::node_name(&state, record.owner)
        ))
        .hint("the cluster appoints another owner by itself once the old one is certainly cut off"));
    }
    match forward::ask(core, record.owner, NodeOp::VolumeMove(request)).await? {
        NodeAnswer::VolumeMoved(moved) => {
            await_record(core, &moved).await;
            Ok(moved)
        }
        _ => Err(Error::failed("the owner's answer cannot be read")),
    }
}

/// Waits until this node's own records show the move, so that the next command here sees what this one did. The move
/// is done in any case; a node that lags behind for long says so in `health`.
async fn await_record(core: &Arc<Core>, moved: &pb::VolumeMoved) {
    let mut records = core.cluster.watch();
    let shown = records.wait_for(|state| {
        state.volumes.get(&moved.volume).is_none_or(|record| {
            record.term.0 > moved.term || (record.term.0 == moved.term && record.state == VolumeState::Online)
        })
    });
    drop(tokio::time::timeout(RECORD_WITHIN, shown).await);
}

/// Has the volume use all of a LUN that has grown.
pub(super) async fn extend(
    core: &Arc<Core>,
    request: pb::VolumeExtendRequest,
) -> Result<pb::VolumeExtended, Error> {
    let state = core.state();
    let record = view::volume(&state, &request.name)?;
    let volume = core
        .volumes
        .get(record.id)
        .ok_or_else(|| Error::conflict(format!("volume {} is not open yet", record.name)))?;
    let node = volume.node_or_why()?;
    let extended = tokio::task::spawn_blocking(move || node.extend()).await.map_err(Error::failed)?;
    let (old_bytes, new_bytes) = extended.map_err(|error| failed("volume extend", &request.name, &error))?;
    Ok(pb::VolumeExtended { volume: request.name, old_bytes, new_bytes })
}
