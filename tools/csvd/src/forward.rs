//! Requests that only a certain node can carry out: asked there over the mesh, or done at once when it is this one.

use std::sync::Arc;
use std::time::Duration;

use api::{Error, pb};
use bytes::Bytes;
use futures::future::BoxFuture;
use lockmgr::cluster::ClusterState;
use lockmgr::{ClientId, Epoch, NodeId};
use prost::Message;
use tokio::sync::watch;
use wire::service;

use crate::core::Core;
use crate::messages::{NodeAnswer, NodeOp, NodeReply, NodeRequest, OfClient};
use crate::redirect::{self, orders};
use crate::volumes::{balancing, moves};
use crate::{admin, membership, view, vms};

/// Longest wait until the records have come here as far as they had at the node that asks. One that lags by more answers from
/// what it knows: its changes expect what it has read, so that an old copy can only make them fail.
const RECORDS_WITHIN: Duration = Duration::from_secs(2);

/// Has `op` carried out by `node`.
pub(crate) async fn ask(core: &Arc<Core>, node: NodeId, op: NodeOp) -> Result<NodeAnswer, Error> {
    if node == core.me {
        // A task of its own: who asks may stop waiting at any moment, and what was begun must come to its end.
        let (runtime, core) = (core.runtime.clone(), Arc::clone(core));
        return runtime.spawn(async move { boxed(&core, op).await }).await.map_err(Error::failed)?;
    }
    let body = NodeRequest { op: Some(op), seen: core.state().applied }.encode_to_vec();
    let reply = core.mesh.call(node.0, service::ADMIN, body.into()).await.map_err(|error| {
        let name = view::node_name(&core.state(), node);
        let failed = Error::unreachable(error.explain()).during(format!("asking node {name}"));
        failed.hint(error.hint().unwrap_or("`csvctl node list` shows which nodes are up"))
    })?;
    let answer = NodeReply::decode(reply).ok().and_then(|reply| reply.answer);
    match answer {
        Some(NodeAnswer::Error(detail)) => Err(Error::of_detail(detail)),
        Some(answer) => Ok(answer),
        None => Err(Error::failed("the node's answer cannot be read").hint("it may be of a newer version")),
    }
}

/// Carries out what another node asks for.
pub(crate) async fn serve(core: &Arc<Core>, from: NodeId, body: Bytes) -> Bytes {
    let outcome = match NodeRequest::decode(body).map(|request| (request.op, request.seen)) {
        Ok((Some(op), seen)) => {
            if !op.is_urgent() {
                await_records(core.cluster.watch(), seen).await;
            }
            boxed(core, op).await
        }
        Ok((None, _)) | Err(_) => {
            Err(Error::usage("this node does not know the request").hint("is it of an older version?"))
        }
    };
    let answer = outcome.unwrap_or_else(|error| {
        tracing::debug!(%from, %error, "request of another node refused");
        NodeAnswer::Error(error.to_detail())
    });
    NodeReply { answer: Some(answer) }.encode_to_vec().into()
}

/// Whoever asks has seen the records up to `seen`, and so may its user: what is done here must not rest on older ones.
async fn await_records(mut records: watch::Receiver<Arc<ClusterState>>, seen: u64) {
    let come = records.wait_for(|state| state.applied >= seen);
    if tokio::time::timeout(RECORDS_WITHIN, come).await.is_err() {
        tracing::warn!(seen, "the records lag: a request of another node is answered from older ones");
    }
}

/// What is carried out here may have to ask other nodes in turn: the type of the future must not contain itself.
fn boxed(core: &Arc<Core>, op: NodeOp) -> BoxFuture<'_, Result<NodeAnswer, Error>> {
    Box::pin(perform(core, op))
}

async fn perform(core: &Arc<Core>, op: NodeOp) -> Result<NodeAnswer, Error> {
    let done = NodeAnswer::Done(pb::Done {});
    Ok(match op {
        NodeOp::VolumeMove(request) => NodeAnswer::VolumeMoved(moves::hand_over(core, request).await?),
        NodeOp::AwaitCoordinator(asked) => NodeAnswer::Serving(moves::await_coordinator(core, asked).await?),
        NodeOp::VolumeState(request) => NodeAnswer::VolumeStates(admin::volume::states_here(core, &request)),
        NodeOp::ClientGone(gone) => {
            client_gone(core, &gone);
            done
        }
        NodeOp::IsClientGone(asked) => {
            is_client_gone(core, &asked)?;
            done
        }
        NodeOp::VolumeIoMode(request) => {
            orders::io_mode(core, request).await?;
            done
        }
        NodeOp::VolumeCache(request) => NodeAnswer::VolumeCaches(admin::volume_cache::here(core, &request)?),
        NodeOp::EndSession(session) => {
            redirect::end_session(core, session).await?;
            done
        }
        NodeOp::EndOver(asked) => {
            redirect::end_over(core, asked).await?;
            done
        }
        NodeOp::CutOff(asked) => {
            membership::cut_off(core, asked).await?;
            done
        }
        NodeOp::Validate(request) => NodeAnswer::Validated(admin::validate::here(core, request).await),
        NodeOp::CutTrial(asked) => {
            admin::validate::cut(core, asked).await?;
            done
        }
        NodeOp::Barred(asked) => {
            membership::barred(core, asked).await?;
            done
        }
        NodeOp::Testify(verdict) => {
            let node = u16::try_from(verdict.node).map_err(|_| Error::usage("no such node"))?;
            membership::testify(core, NodeId(node), Epoch(verdict.epoch), verdict.reason);
            done
        }
        NodeOp::Convict(verdict) => {
            let node = u16::try_from(verdict.node).map_err(|_| Error::usage("no such node"))?;
            membership::convict(core, NodeId(node), Epoch(verdict.epoch), verdict.reason);
            done
        }
        NodeOp::Loads(_) => NodeAnswer::Loads(balancing::loads_here(core).await),
        NodeOp::LogRead(request) => NodeAnswer::Log(admin::logs::read_here(core, request).await?),
        NodeOp::VmStart(request) => NodeAnswer::Vm(vms::start(core, &request.name).await?),
        NodeOp::VmStop(request) => NodeAnswer::Vm(vms::stop(core, &request.name, request.force).await?),
        NodeOp::VmSave(request) => NodeAnswer::Vm(vms::save(core, &request.name).await?),
        NodeOp::VmPause(request) => NodeAnswer::Vm(vms::pause(core, &request.name).await?),
        NodeOp::VmResume(request) => NodeAnswer::Vm(vms::resume(core, &request.name).await?),
        NodeOp::VmDisk(request) => NodeAnswer::Vm(vms::change_disk(core, request).await?),
        NodeOp::VmBalloon(request) => NodeAnswer::Vm(vms::set_balloon(core, request).await?),
        NodeOp::VmShow(request) => NodeAnswer::Vm(vms::show(core, &request.name).await?),
        NodeOp::VmConsole(request) => NodeAnswer::Console(vms::console(core, &request).await?),
        NodeOp::VmType(request) => NodeAnswer::Typed(vms::type_in(core, request).await?),
        NodeOp::VmMigrate(request) => NodeAnswer::Migrated(vms::migrate(core, request).await?),
        NodeOp::VmProgress(request) => NodeAnswer::Progress(vms::progress(core, &request.name)?),
        NodeOp::VmMigrateCancel(request) => {
            vms::cancel(core, &request.name)?;
            done
        }
        NodeOp::VmCheckMigrate(request) => NodeAnswer::MigrateProblems(vms::problems(core, &request).await?),
        NodeOp::VmImage(request) => NodeAnswer::Image(vms::work_on_image(core, request).await?),
        NodeOp::VmImageProgress(request) => NodeAnswer::Image(vms::image_progress(core, &request.name)?),
        NodeOp::VmCheckpoint(request) => NodeAnswer::Checkpoints(vms::checkpoint(core, request).await?),
        NodeOp::VmIncoming(body) => NodeAnswer::Incoming(vms::incoming(core, body).await?),
    })
}

/// A client of another node is gone for certain.
fn client_gone(core: &Arc<Core>, gone: &OfClient) {
    let state = core.state();
    let (Some(record), Ok(node)) = (state.volumes.get(&gone.volume), u16::try_from(gone.node)) else {
        return;
    };
    let client = ClientId { node: NodeId(node), epoch: Epoch(gone.epoch), serial: gone.serial };
    if let Some(coordinator) = core.volumes.host(record.id).and_then(|host| host.serving()) {
        coordinator.client_gone(client);
    }
}

/// Whether a client of this node is gone for certain.
fn is_client_gone(core: &Arc<Core>, asked: &OfClient) -> Result<(), Error> {
    let ours = asked.node == u32::from(core.me.0) && core.epoch() == Some(Epoch(asked.epoch));
    let volume = core.state().volumes.get(&asked.volume).map(|record| record.id);
    let there = volume.is_some_and(|volume| core.clients.has(volume, asked.serial))
        || core.vms.is_expected(asked.serial);
    if ours && !there { Ok(()) } else { Err(Error::conflict("the client is still there")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn come_to(applied: u64) -> Arc<ClusterState> {
        Arc::new(ClusterState { applied, ..ClusterState::default() })
    }

    // A VM that another node has just seen running must not be `saved` here: the user would be told so.
    #[tokio::test(start_paused = true)]
    async fn a_request_waits_for_the_records_that_its_sender_has_seen_and_not_for_ever() {
        let (records, seen) = watch::channel(come_to(6));
        let waiting = tokio::spawn(await_records(seen.clone(), 8));
        for applied in 7..=8 {
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished(), "the records have come to {} only", applied - 1);
            records.send_replace(come_to(applied));
        }
        waiting.await.expect("it goes on");
        let begun = tokio::time::Instant::now();
        await_records(seen.clone(), 8).await;
        assert_eq!(begun.elapsed(), Duration::ZERO, "what is here needs no wait");
        await_records(seen, 9).await;
        assert_eq!(begun.elapsed(), RECORDS_WITHIN, "a node that lags answers all the same");
    }
}
