//! `vm`: each request is carried out by the node that owns the VM.

use std::sync::Arc;

use api::{Error, pb};
use futures::stream;
use lockmgr::NodeId;

use super::Streamed;
use super::path::resolve;
use crate::core::Core;
use crate::messages::{NodeAnswer, NodeOp};
use crate::{forward, view, vms};

pub(super) async fn create(core: &Arc<Core>, request: pb::VmCreateRequest) -> Result<pb::Vm, Error> {
    let state = core.state();
    let mut disks = Vec::new();
    for disk in &request.disks {
        let (path, read_only) = disk.strip_suffix(",ro").map_or((disk.as_str(), false), |path| (path, true));
        let place = resolve(core, &state, path)
            .map_err(|error| error.during(format!("vm create {}", request.name)))?;
        disks.push(pb::VmDisk { volume: place.volume.name, path: place.path, read_only });
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
    vms::claim_stopped(core, &request.name).await?;
    at_owner(core, &request.name.clone(), NodeOp::VmStart(request)).await
}

pub(super) async fn stop(core: &Arc<Core>, request: pb::VmStopRequest) -> Result<pb::Vm, Error> {
    at_owner(core, &request.name.clone(), NodeOp::VmStop(request)).await
}

pub(super) async fn pause(core: &Arc<Core>, request: pb::VmRequest) -> Result<pb::Vm, Error> {
    at_owner(core, &request.name.clone(), NodeOp::VmPause(request)).await
}

pub(super) async fn resume(core: &Arc<Core>, request: pb::VmRequest) -> Result<pb::Vm, Error> {
    at_owner(core, &request.name.clone(), NodeOp::VmResume(request)).await
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

/// Pieces of the console. The VM may move while it is followed: each piece is asked where it is then.
pub(super) fn console(
    core: &Arc<Core>,
    request: pb::VmConsoleRequest,
) -> Result<Streamed<pb::ConsoleChunk>, Error> {
    owner(core, &request.name)?;
    let reading = Some((Arc::clone(core), request));
    Ok(Box::pin(stream::unfold(reading, |reading| async move {
        let (core, mut request) = reading?;
        match piece(&core, &request).await {
            Ok(None) => None,
            Ok(Some(chunk)) => {
                request.from = chunk.next;
                // With a limit, the first piece that was waited for is the last.
                let more = !(request.follow && request.limit_ms > 0);
                Some((Ok(chunk), more.then_some((core, request))))
            }
            Err(error) => Some((Err(error.into()), None)),
        }
    })))
}

async fn piece(core: &Arc<Core>, request: &pb::VmConsoleRequest) -> Result<Option<pb::ConsoleChunk>, Error> {
    loop {
        let owner = owner(core, &request.name)?;
        let answer = forward::ask(core, owner, NodeOp::VmConsole(request.clone())).await;
        match answer {
            Ok(NodeAnswer::Console(chunk)) if !chunk.data.is_empty() => return Ok(Some(chunk)),
            Ok(NodeAnswer::Console(_)) => {
                let endless = request.follow && request.limit_ms == 0;
                if !endless {
                    return Ok(None);
                }
            }
            Ok(_) => return Err(Error::failed("the owner's answer cannot be read")),
            Err(error) if self::owner(core, &request.name)? == owner => return Err(error),
            // It has moved in the meantime.
            Err(_) => {}
        }
    }
}

/// Has the owner move the VM, and passes on what the records show meanwhile.
pub(super) fn migrate(
    core: &Arc<Core>,
    request: pb::VmMigrateRequest,
) -> Result<Streamed<pb::MigrateProgress>, Error> {
    let state = core.state();
    let record = view::vm(&state, &request.name)?;
    let to = view::member(&state, &request.to)?;
    vms::check_migrate(&state, record, to, &request.r#type)?;
    let (core, owner) = (Arc::clone(core), record.owner);
    Ok(Box::pin(stream::once(async move {
        match forward::ask(&core, owner, NodeOp::VmMigrate(request)).await {
            Ok(NodeAnswer::Migrated(report)) => {
                Ok(pb::MigrateProgress { phase: "done".to_owned(), report: Some(report) })
            }
            Ok(_) => Err(Error::failed("the owner's answer cannot be read").into()),
            Err(error) => Err(error.into()),
        }
    })))
}

pub(super) async fn delete(core: &Arc<Core>, request: pb::VmDeleteRequest) -> Result<pb::Done, Error> {
    vms::delete(core, &request.name, request.dry_run).await?;
    Ok(pb::Done {})
}
