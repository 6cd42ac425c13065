//! The admin interface on `csvd.sock`: one file per noun, this one joins them.
//!
//! A member's administrator may come over the network too: with the node's certificate, by mutual TLS, to the same socket.
//!
//! An answer rests on the present: whatever was acknowledged on any node before the question is known to whoever answers.
//!
//! Whoever may connect (root and the socket's group, 0660) may do everything; the kernel keeps others out.

mod cluster;
mod events;
mod file;
mod file_clone;
mod health;
mod image;
pub(crate) mod logs;
mod members;
mod path;
mod top;
pub(crate) mod validate;
mod vm;
mod vm_console;
pub(crate) mod volume;
pub(crate) mod volume_cache;
mod volume_check;

use std::os::unix::fs::MetadataExt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use api::{Error, pb};
use futures::{Stream, StreamExt};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::{Request, Response, Status};
use tower::BoxError;
use tower::filter::AsyncFilterLayer;
use wire::ByteStream;

use crate::core::Core;
use crate::node_socket::listen;
use crate::{drain, membership, settings};

/// Longest wait for the present. Without a quorum there is none, and what is known here is what can be answered.
const PRESENT_WITHIN: Duration = Duration::from_secs(2);

/// The socket, while it is served.
#[derive(Debug)]
pub(crate) struct Served {
    closing: CancellationToken,
    task: JoinHandle<()>,
}

impl Served {
    /// Stops answering; streams are cut.
    pub(crate) async fn end(self) {
        self.closing.cancel();
        drop(self.task.await);
    }
}

/// Serves the socket.
pub(crate) fn serve(core: &Arc<Core>) -> Result<Served, Error> {
    let path = core.config.admin_socket();
    let listener = listen(&path, 0o660)?;
    tracing::debug!(inode = std::fs::metadata(&path).map(|meta| meta.ino()).unwrap_or(0), "admin socket");
    let closing = CancellationToken::new();
    let service = pb::admin_server::AdminServer::new(Admin { core: Arc::clone(core) });
    let closed = closing.clone();
    let known = Arc::clone(core);
    let present = AsyncFilterLayer::new(move |request: http::Request<Body>| {
        let core = Arc::clone(&known);
        async move {
            await_present(&core).await;
            Ok::<_, BoxError>(request)
        }
    });
    let task = core.runtime.spawn(async move {
        let serving = tonic::transport::Server::builder()
            .layer(present)
            .add_service(service)
            .serve_with_incoming(UnixListenerStream::new(listener));
        // Dropping the server closes its connections: a stream that follows something never ends by itself.
        if let Some(Err(error)) = closed.run_until_cancelled(serving).await {
            tracing::error!(%error, "the admin socket is not served any more");
        }
    });
    Ok(Served { closing, task })
}

/// Returns when this node knows what was acknowledged anywhere before, if that can be known.
async fn await_present(core: &Core) {
    if let Err(_) | Ok(Err(_)) = tokio::time::timeout(PRESENT_WITHIN, core.cluster.read()).await {
        tracing::debug!("no quorum answers: the admin interface goes on with what is known here");
    }
}

/// Lets a program on another node talk to the socket, whose certificate the handshake has proved.
pub(crate) async fn carry(core: Arc<Core>, stream: ByteStream) {
    let peer = stream.peer().clone();
    tracing::info!(%peer, "admin connection");
    let carried = async {
        let near = tokio::net::UnixStream::connect(core.config.admin_socket()).await?;
        stream.carry(near).await
    };
    if let Err(error) = carried.await {
        tracing::debug!(%peer, %error, "admin connection broke");
    }
}

struct Admin {
    core: Arc<Core>,
}

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Carries out what must not be left half done, also when the client hangs up: its request is dropped then.
async fn to_its_end<T, F>(core: &Arc<Core>, work: impl FnOnce(Arc<Core>) -> F) -> Result<T, Error>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Error>> + Send + 'static,
{
    core.runtime.spawn(work(Arc::clone(core))).await.map_err(Error::failed)?
}

/// The progress of a drain, for whoever asked.
async fn progress(
    begun: impl Future<Output = Result<drain::Progress, Error>>,
) -> Answer<Streamed<pb::NodeDrainProgress>> {
    answer(begun.await.map(|progress| {
        Box::pin(progress.map(|news| news.map_err(Status::from))) as Streamed<pb::NodeDrainProgress>
    }))
}

fn answer<T>(outcome: Result<T, Error>) -> Answer<T> {
    outcome.map(Response::new).map_err(Status::from)
}

#[tonic::async_trait]
impl pb::admin_server::Admin for Admin {
    async fn wait(&self, request: Request<pb::WaitRequest>) -> Answer<pb::Done> {
        answer(health::wait(&self.core, request.into_inner()).await)
    }

    async fn health(&self, _: Request<pb::HealthRequest>) -> Answer<pb::HealthReport> {
        answer(Ok(health::report(&self.core).await))
    }

    async fn cluster_show(&self, _: Request<pb::ClusterShowRequest>) -> Answer<pb::Cluster> {
        answer(Ok(cluster::show(&self.core)))
    }

    async fn cluster_validate(&self, request: Request<pb::ValidateRequest>) -> Answer<pb::Validation> {
        answer(
            to_its_end(&self.core, |core| async move { validate::run(&core, request.into_inner()).await })
                .await,
        )
    }

    async fn cluster_token(&self, request: Request<pb::ClusterTokenRequest>) -> Answer<pb::ClusterToken> {
        answer(members::token(&self.core, request.into_inner().valid_ms).await)
    }

    async fn cluster_rotate_certificates(
        &self,
        request: Request<pb::RotateCertificatesRequest>,
    ) -> Answer<pb::CertificatesRenewed> {
        answer(membership::certificates::rotate(&self.core, request.into_inner().grace_ms).await)
    }

    async fn node_confirm_dead(&self, request: Request<pb::NodeConfirmDeadRequest>) -> Answer<pb::Node> {
        answer(
            to_its_end(
                &self.core,
                |core| async move { members::confirm_dead(&core, request.into_inner()).await },
            )
            .await,
        )
    }

    async fn node_evict(&self, request: Request<pb::NodeEvictRequest>) -> Answer<pb::NodeEvicted> {
        answer(
            to_its_end(&self.core, |core| async move { members::evict(&core, request.into_inner()).await })
                .await,
        )
    }

    async fn node_list(&self, _: Request<pb::NodeListRequest>) -> Answer<pb::Nodes> {
        answer(Ok(pb::Nodes { nodes: cluster::nodes(&self.core) }))
    }

    type NodeDrainStream = Streamed<pb::NodeDrainProgress>;

    async fn node_drain(&self, request: Request<pb::NodeDrainRequest>) -> Answer<Self::NodeDrainStream> {
        let request = request.into_inner();
        progress(to_its_end(&self.core, |core| async move {
            drain::begin(&core, &request.name, request.dry_run).await
        }))
        .await
    }

    type NodeResumeStream = Streamed<pb::NodeDrainProgress>;

    async fn node_resume(&self, request: Request<pb::NodeResumeRequest>) -> Answer<Self::NodeResumeStream> {
        let name = request.into_inner().name;
        progress(to_its_end(&self.core, |core| async move { drain::resume(&core, &name).await })).await
    }

    type NodeLeaveStream = Streamed<pb::NodeDrainProgress>;

    async fn node_leave(&self, request: Request<pb::NodeLeaveRequest>) -> Answer<Self::NodeLeaveStream> {
        let dry_run = request.into_inner().dry_run;
        progress(to_its_end(&self.core, |core| async move { drain::begin_leave(&core, dry_run).await })).await
    }

    async fn settings(&self, _: Request<pb::SettingsRequest>) -> Answer<pb::SettingList> {
        answer(Ok(settings::list(&self.core)))
    }

    async fn set(&self, request: Request<pb::SetRequest>) -> Answer<pb::Setting> {
        let request = request.into_inner();
        answer(to_its_end(&self.core, |core| async move { settings::set(&core, request).await }).await)
    }

    async fn fault(&self, request: Request<pb::FaultRequest>) -> Answer<pb::Done> {
        answer(cluster::fault(&self.core, &request.into_inner().action).await)
    }

    async fn volume_create(&self, request: Request<pb::VolumeCreateRequest>) -> Answer<pb::Volume> {
        answer(
            to_its_end(&self.core, |core| async move { volume::create(&core, request.into_inner()).await })
                .await,
        )
    }

    async fn volume_list(&self, _: Request<pb::VolumeListRequest>) -> Answer<pb::Volumes> {
        answer(volume::list(&self.core).await)
    }

    async fn volume_show(&self, request: Request<pb::VolumeShowRequest>) -> Answer<pb::Volume> {
        answer(volume::show(&self.core, &request.into_inner().name).await)
    }

    async fn volume_state(&self, request: Request<pb::VolumeStateRequest>) -> Answer<pb::VolumeStates> {
        answer(volume::states(&self.core, request.into_inner()).await)
    }

    async fn volume_move(&self, request: Request<pb::VolumeMoveRequest>) -> Answer<pb::VolumeMoved> {
        answer(volume::move_(&self.core, request.into_inner()).await)
    }

    async fn volume_io_mode(&self, request: Request<pb::VolumeIoModeRequest>) -> Answer<pb::VolumeStates> {
        answer(
            to_its_end(&self.core, |core| async move { volume::io_mode(&core, request.into_inner()).await })
                .await,
        )
    }

    async fn volume_check(&self, request: Request<pb::VolumeCheckRequest>) -> Answer<pb::CheckReport> {
        answer(volume_check::check(&self.core, request.into_inner()).await)
    }

    async fn volume_extend(&self, request: Request<pb::VolumeExtendRequest>) -> Answer<pb::VolumeExtended> {
        answer(volume::extend(&self.core, request.into_inner()).await)
    }

    async fn volume_cache(&self, request: Request<pb::VolumeCacheRequest>) -> Answer<pb::VolumeCaches> {
        answer(volume_cache::cache(&self.core, request.into_inner()).await)
    }

    async fn volume_give_up_log(
        &self,
        request: Request<pb::VolumeGiveUpLogRequest>,
    ) -> Answer<pb::VolumeLogGivenUp> {
        answer(volume_check::give_up_log(&self.core, request.into_inner()).await)
    }

    async fn file_stat(&self, request: Request<pb::FileRequest>) -> Answer<pb::FileStatus> {
        answer(file::stat(&self.core, request.into_inner().path).await)
    }

    async fn file_map(&self, request: Request<pb::FileRequest>) -> Answer<pb::FileExtents> {
        answer(file::map(&self.core, request.into_inner().path).await)
    }

    async fn file_clone(&self, request: Request<pb::FileCloneRequest>) -> Answer<pb::FileCloned> {
        answer(file_clone::clone(&self.core, request.into_inner()).await)
    }

    async fn file_grants(&self, request: Request<pb::FileRequest>) -> Answer<pb::FileGrantList> {
        answer(file::grants(&self.core, request.into_inner().path).await)
    }

    async fn file_users(&self, request: Request<pb::FileRequest>) -> Answer<pb::FileUserList> {
        answer(image::users(&self.core, &request.into_inner().path).await)
    }

    type VmImageStream = Streamed<pb::VmImageProgress>;

    async fn vm_image(&self, request: Request<pb::VmImageRequest>) -> Answer<Self::VmImageStream> {
        answer(image::work(&self.core, request.into_inner()).await)
    }

    async fn vm_checkpoint(&self, request: Request<pb::VmCheckpointRequest>) -> Answer<pb::VmCheckpoints> {
        answer(vm::checkpoint(&self.core, request.into_inner()).await)
    }

    async fn vm_create(&self, request: Request<pb::VmCreateRequest>) -> Answer<pb::Vm> {
        answer(
            to_its_end(&self.core, |core| async move { vm::create(&core, request.into_inner()).await }).await,
        )
    }

    async fn vm_start(&self, request: Request<pb::VmRequest>) -> Answer<pb::Vm> {
        answer(
            to_its_end(&self.core, |core| async move { vm::start(&core, request.into_inner()).await }).await,
        )
    }

    async fn vm_stop(&self, request: Request<pb::VmStopRequest>) -> Answer<pb::Vm> {
        answer(vm::stop(&self.core, request.into_inner()).await)
    }

    async fn vm_save(&self, request: Request<pb::VmRequest>) -> Answer<pb::Vm> {
        answer(vm::save(&self.core, request.into_inner()).await)
    }

    async fn vm_pause(&self, request: Request<pb::VmRequest>) -> Answer<pb::Vm> {
        answer(vm::pause(&self.core, request.into_inner()).await)
    }

    async fn vm_disk(&self, request: Request<pb::VmDiskRequest>) -> Answer<pb::Vm> {
        answer(vm::disk(&self.core, request.into_inner()).await)
    }

    async fn vm_balloon(&self, request: Request<pb::VmBalloonRequest>) -> Answer<pb::Vm> {
        answer(vm::balloon(&self.core, request.into_inner()).await)
    }

    async fn vm_resume(&self, request: Request<pb::VmRequest>) -> Answer<pb::Vm> {
        answer(vm::resume(&self.core, request.into_inner()).await)
    }

    async fn vm_list(&self, _: Request<pb::VmListRequest>) -> Answer<pb::Vms> {
        answer(Ok(vm::list(&self.core)))
    }

    async fn vm_show(&self, request: Request<pb::VmRequest>) -> Answer<pb::Vm> {
        answer(vm::show(&self.core, request.into_inner()).await)
    }

    type VmConsoleStream = Streamed<pb::ConsoleChunk>;

    async fn vm_console(&self, request: Request<pb::VmConsoleRequest>) -> Answer<Self::VmConsoleStream> {
        answer(vm_console::pieces(&self.core, request.into_inner()))
    }

    async fn vm_type(&self, request: Request<pb::VmTypeRequest>) -> Answer<pb::VmTyped> {
        answer(vm::type_in(&self.core, request.into_inner()).await)
    }

    type VmMigrateStream = Streamed<pb::MigrateProgress>;

    async fn vm_migrate(&self, request: Request<pb::VmMigrateRequest>) -> Answer<Self::VmMigrateStream> {
        answer(vm::migrate(&self.core, request.into_inner()))
    }

    async fn vm_migrate_cancel(&self, request: Request<pb::VmRequest>) -> Answer<pb::Done> {
        answer(vm::migrate_cancel(&self.core, request.into_inner()).await)
    }

    async fn vm_check_migrate(
        &self,
        request: Request<pb::VmCheckMigrateRequest>,
    ) -> Answer<pb::MigrateProblems> {
        answer(vm::check_migrate(&self.core, request.into_inner()).await)
    }

    async fn vm_delete(&self, request: Request<pb::VmDeleteRequest>) -> Answer<pb::Done> {
        answer(vm::delete(&self.core, request.into_inner()).await)
    }

    async fn top(&self, _: Request<pb::TopRequest>) -> Answer<pb::TopReport> {
        answer(Ok(top::report(&self.core).await))
    }

    async fn log_read(&self, request: Request<pb::LogRequest>) -> Answer<pb::LogPiece> {
        answer(logs::read(&self.core, request.into_inner()).await)
    }

    type EventsStream = Streamed<pb::Event>;

    async fn events(&self, request: Request<pb::EventsRequest>) -> Answer<Self::EventsStream> {
        answer(Ok(events::stream(&self.core, request.into_inner())))
    }
}
