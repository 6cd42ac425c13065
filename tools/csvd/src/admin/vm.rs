//! `vm`: each request is carried out by the node that owns the VM.

use std::sync::Arc;
use std::time::Duration;

use api::{Error, pb};
use futures::stream;
use lockmgr::NodeId;
use tokio::task::JoinHandle;

use super::Streamed;
use super::path::resolve;
use crate::core::Core;
use crate::messages::{NodeAnswer, NodeOp};
use crate::{forward, view, vms};

/// How often the source of a move is asked how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

pub(super) async fn create(core: &Arc<Core>, request: pb::VmCreateRequest) -> Result<pb::Vm, Error> {
    core.refuse_witness("vm create")?;
    let state = core.state();
    let mut disks = Vec::new();
    for disk in &request.disks {
        let (path, read_only) = disk.strip_suffix(",ro").map_or((disk.as_str(), false), |path| (path, true));
        let place = resolve(core, &state, path)
            .map_err(|error| error.during(format!("vm create {}", request.name)))?;
        disks.push(pb::VmDisk {
            volume: place.volume.name,
            path: place.path,
            read_only,
            ..pb::VmDisk::default()
        });
    }
    let spec = pb::VmSpec {
        memory_bytes: request.memory_bytes,
        cpus: request.cpus,
        disks,
        kernel: request.kernel,
        initrd: request.initrd,
        cmdline: request.cmdline,
        priority: request.priority,
        on_node_loss: request.on_node_loss,
        net: request.net,
        ..pb::VmSpec::default()
    };
    vms::create(core, &request.name, spec).await
}

fn owner(core: &Arc<Core>, name: &str) -> Result<NodeId, Error> {
    Ok(view::vm(&core.state(), name)?.owner)
}

async fn at_owner(core: &Arc<Core>, name: &str, op: NodeOp) -> Result<pb::Vm, Error> {
    match forward::ask(core, owner(core, name)?, op).await? {
        NodeAnswer::Vm(vm) => Ok(vm),
        _ => Err(Error::failed("the owner's answer cannot be read")),
    }
}

/// Starts the VM here: a stopped VM belongs to whoever starts it.
pub(super) async fn start(core: &Arc<Core>, request: pb::VmRequest) -> Result<pb::Vm, Error> {
    core.refuse_witness("vm start")?;
    vms::claim_stopped(core, &request.name).await?;
    at_owner(core, &request.name.clone(), NodeOp::VmStart(request)).await
}

pub(super) async fn stop(core: &Arc<Core>, request: pb::VmStopRequest) -> Result<pb::Vm, Error> {
    at_owner(core, &request.name.clone(), NodeOp::VmStop(request)).await
}

pub(super) async fn save(core: &Arc<Core>, request: pb::VmRequest) -> Result<pb::Vm, Error> {
    at_owner(core, &request.name.clone(), NodeOp::VmSave(request)).await
}

pub(super) async fn pause(core: &Arc<Core>, request: pb::VmRequest) -> Result<pb::Vm, Error> {
    at_owner(core, &request.name.clone(), NodeOp::VmPause(request)).await
}

pub(super) async fn resume(core: &Arc<Core>, request: pb::VmRequest) -> Result<pb::Vm, Error> {
    at_owner(core, &request.name.clone(), NodeOp::VmResume(request)).await
}

/// Changes a disk. The path is looked up here, where the user's mounts are.
pub(super) async fn disk(core: &Arc<Core>, mut request: pb::VmDiskRequest) -> Result<pb::Vm, Error> {
    let state = core.state();
    let during = |error: Error| error.during(format!("vm disk {} {}", request.action, request.name));
    let (path, read_only) =
        request.path.strip_suffix(",ro").map_or((&*request.path, false), |path| (path, true));
    let place = resolve(core, &state, path).map_err(during)?;
    let disk = request.disk.take().unwrap_or_default();
    request.disk = Some(pb::VmDisk { volume: place.volume.name, path: place.path, read_only, ..disk });
    at_owner(core, &request.name.clone(), NodeOp::VmDisk(request)).await
}

pub(super) async fn balloon(core: &Arc<Core>, request: pb::VmBalloonRequest) -> Result<pb::Vm, Error> {
    at_owner(core, &request.name.clone(), NodeOp::VmBalloon(request)).await
}

pub(super) async fn type_in(core: &Arc<Core>, request: pb::VmTypeRequest) -> Result<pb::VmTyped, Error> {
    let owner = owner(core, &request.name)?;
    match forward::ask(core, owner, NodeOp::VmType(request)).await? {
        NodeAnswer::Typed(typed) => Ok(typed),
        _ => Err(Error::failed("the owner's answer cannot be read")),
    }
}

pub(super) fn list(core: &Arc<Core>) -> pb::Vms {
    let state = core.state();
    pb::Vms { vms: state.vms.values().map(|vm| vms::describe(&state, vm)).collect() }
}

/// With what only the owner knows, when it answers.
pub(super) async fn show(core: &Arc<Core>, request: pb::VmRequest) -> Result<pb::Vm, Error> {
    let state = core.state();
    let record = view::vm(&state, &request.name)?;
    let shown = at_owner(core, &request.name.clone(), NodeOp::VmShow(request)).await;
    Ok(shown.unwrap_or_else(|_| vms::describe(&state, record)))
}

/// Has the owner move the VM, and tells meanwhile how far it is.
pub(super) fn migrate(
    core: &Arc<Core>,
    request: pb::VmMigrateRequest,
) -> Result<Streamed<pb::MigrateProgress>, Error> {
    let state = core.state();
    let record = view::vm(&state, &request.name)?;
    let to = view::member(&state, &request.to)?;
    vms::check_migrate(&state, record, to, &request.r#type)?;
    let (owner, name, epoch) = (record.owner, request.name.clone(), record.epoch);
    let asked = Arc::clone(core);
    // A task of its own: a move goes on when nobody looks at it any more.
    let moved =
        core.runtime.spawn(async move { forward::ask(&asked, owner, NodeOp::VmMigrate(request)).await });
    let following = Following { core: Arc::clone(core), owner, name, epoch, moved, shown: None };
    Ok(Box::pin(stream::unfold(Some(following), |following| async move {
        let mut following = following?;
        match following.next().await {
            Ok(progress) => {
                let more = progress.report.is_none().then_some(following);
                Some((Ok(progress), more))
            }
            Err(error) => Some((Err(error.into()), None)),
        }
    })))
}

/// A move that somebody looks at.
struct Following {
    core: Arc<Core>,
    owner: NodeId,
    name: String,
    /// Before the move.
    epoch: u64,
    moved: JoinHandle<Result<NodeAnswer, Error>>,
    shown: Option<pb::MigrateProgress>,
}

impl Following {
    /// The next thing worth telling: progress, or the end.
    async fn next(&mut self) -> Result<pb::MigrateProgress, Error> {
        loop {
            match tokio::time::timeout(PROGRESS_EVERY, &mut self.moved).await {
                Ok(moved) => {
                    let moved = moved.map_err(Error::failed)??;
                    vms::await_arrival(&self.core, &self.name, self.epoch).await;
                    return finished(moved);
                }
                Err(_) => {
                    if let Some(news) = self.ask().await {
                        return Ok(news);
                    }
                }
            }
        }
    }

    /// How far it is, if that is news. An owner that does not answer now has an end to tell soon.
    async fn ask(&mut self) -> Option<pb::MigrateProgress> {
        let op = NodeOp::VmProgress(pb::VmRequest { name: self.name.clone() });
        let Ok(NodeAnswer::Progress(now)) = forward::ask(&self.core, self.owner, op).await else {
            return None;
        };
        let news = self.shown.as_ref() != Some(&now);
        self.shown = Some(now.clone());
        news.then_some(now)
    }
}

fn finished(answer: NodeAnswer) -> Result<pb::MigrateProgress, Error> {
    match answer {
        NodeAnswer::Migrated(report) => Ok(pb::MigrateProgress {
            phase: "done".to_owned(),
            report: Some(report),
            ..pb::MigrateProgress::default()
        }),
        _ => Err(Error::failed("the owner's answer cannot be read")),
    }
}

/// Asks the owner to give the move up. The move itself reports what becomes of it.
pub(super) async fn migrate_cancel(core: &Arc<Core>, request: pb::VmRequest) -> Result<pb::Done, Error> {
    let owner = owner(core, &request.name)?;
    forward::ask(core, owner, NodeOp::VmMigrateCancel(request)).await.map(|_| pb::Done {})
}

/// What stands against a move.
pub(super) async fn check_migrate(
    core: &Arc<Core>,
    request: pb::VmCheckMigrateRequest,
) -> Result<pb::MigrateProblems, Error> {
    let owner = owner(core, &request.name)?;
    view::member(&core.state(), &request.to)?;
    match forward::ask(core, owner, NodeOp::VmCheckMigrate(request)).await? {
        NodeAnswer::MigrateProblems(problems) => Ok(problems),
        _ => Err(Error::failed("the owner's answer cannot be read")),
    }
}

/// Makes, lists, restores or deletes checkpoints.
pub(super) async fn checkpoint(
    core: &Arc<Core>,
    request: pb::VmCheckpointRequest,
) -> Result<pb::VmCheckpoints, Error> {
    let owner = owner(core, &request.name)?;
    match forward::ask(core, owner, NodeOp::VmCheckpoint(request)).await? {
        NodeAnswer::Checkpoints(checkpoints) => Ok(checkpoints),
        _ => Err(Error::failed("the owner's answer cannot be read")),
    }
}

pub(super) async fn delete(core: &Arc<Core>, request: pb::VmDeleteRequest) -> Result<pb::Done, Error> {
    vms::delete(core, &request.name, request.dry_run).await?;
    Ok(pb::Done {})
}
