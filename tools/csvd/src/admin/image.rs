//! Images that VMs use: who uses a file, and work on one while its guest goes on.

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

/// How often the owner is asked how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// The VMs that have the file as a disk, or as a parent of one.
pub(super) async fn users(core: &Arc<Core>, path: &str) -> Result<pb::FileUserList, Error> {
    let place = resolve(core, &core.state(), path)?;
    Ok(pb::FileUserList { users: vms::users(core, &place.volume.name, &place.path).await? })
}

/// Has the owner of the VM do the work, and tells meanwhile how far it is. Paths are looked up here, where the user's mounts are.
pub(super) async fn work(
    core: &Arc<Core>,
    mut request: pb::VmImageRequest,
) -> Result<Streamed<pb::VmImageProgress>, Error> {
    let shown = request.path.clone();
    let during = |error: Error| error.during(format!("vhdx {} {shown}", request.action));
    let user = writer(core, &request.path).await.map_err(during)?;
    for path in [&mut request.other, &mut request.parent] {
        if !path.is_empty() {
            let place = resolve(core, &core.state(), path)?;
            *path = format!("{}:/{}", place.volume.name, place.path);
        }
    }
    request.path = user.disk;
    request.vm = user.vm.clone();
    let owner = view::vm(&core.state(), &user.vm)?.owner;
    let asked = Arc::clone(core);
    // A task of its own: the work goes on when nobody looks at it any more.
    let done = core.runtime.spawn(async move { forward::ask(&asked, owner, NodeOp::VmImage(request)).await });
    let following = Following { core: Arc::clone(core), owner, vm: user.vm, done, shown: None };
    Ok(Box::pin(stream::unfold(Some(following), |following| async move {
        let mut following = following?;
        match following.next().await {
            Ok(progress) => {
                let more = progress.result.is_empty().then_some(following);
                Some((Ok(progress), more))
            }
            Err(error) => Some((Err(error.into()), None)),
        }
    })))
}

/// The VM whose disk the file is.
async fn writer(core: &Arc<Core>, path: &str) -> Result<pb::FileUser, Error> {
    let runs = |user: &pb::FileUser| matches!(user.state.as_str(), "running" | "paused");
    let users = users(core, path).await?.users;
    users.into_iter().find(|user| user.depth == 0 && user.checkpoint.is_empty() && runs(user)).ok_or_else(
        || {
            Error::conflict("it is no disk of a VM that runs")
                .hint("`csvctl vm show` lists the disks of a VM")
        },
    )
}

/// Work that somebody looks at.
struct Following {
    core: Arc<Core>,
    owner: NodeId,
    vm: String,
    done: JoinHandle<Result<NodeAnswer, Error>>,
    shown: Option<pb::VmImageProgress>,
}

impl Following {
    /// The next thing worth telling: progress, or the end.
    async fn next(&mut self) -> Result<pb::VmImageProgress, Error> {
        loop {
            match tokio::time::timeout(PROGRESS_EVERY, &mut self.done).await {
                Ok(done) => {
                    return match done.map_err(Error::failed)?? {
                        NodeAnswer::Image(progress) => Ok(progress),
                        _ => Err(Error::failed("the owner's answer cannot be read")),
                    };
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
    async fn ask(&mut self) -> Option<pb::VmImageProgress> {
        let op = NodeOp::VmImageProgress(pb::VmRequest { name: self.vm.clone() });
        let Ok(NodeAnswer::Image(now)) = forward::ask(&self.core, self.owner, op).await else { return None };
        let news = self.shown.as_ref() != Some(&now) && now.total > 0;
        self.shown = Some(now.clone());
        news.then_some(now)
    }
}
