//! Making a new volume: format the LUN here, then tell the cluster.

use std::sync::Arc;

use api::Error;
use api::pb::VolumeCreateRequest;
use blockio::{BlockDevice, OpenOptions, open_uri};
use csvfs::Superblock;
use csvfs::volume::{CreateParams, Volume, VolumeError};
use lockmgr::VolumeId;
use lockmgr::cluster::{ClusterState, Command, FenceKind};
use lockmgr::fence::ReservationKey;

use super::fence_choice::Choice;
use crate::core::{Core, refused as refused_by_cluster};
use crate::view;

/// Longest name: it is also the name of a folder.
const NAME_BYTES_MAX: usize = 64;

/// Formats the LUN and adds the volume to the records, with this node as its first owner.
pub(crate) async fn create(core: &Arc<Core>, request: VolumeCreateRequest) -> Result<(), Error> {
    check_name(&request.name)?;
    check_lun(&request.lun)?;
    let state = core.cluster.read().await.map_err(|error| refused_by_cluster(&error))?;
    let cluster = state.cluster.ok_or_else(|| Error::unreachable("the cluster has not formed yet"))?;
    let epoch = core.epoch().ok_or_else(|| Error::unreachable("this node has not joined yet"))?;
    let taken =
        state.volumes.values().find(|record| record.name == request.name || record.lun_uri == request.lun);
    if let Some(record) = taken {
        return Err(Error::conflict(format!(
            "volume create {}: volume {} on {} already exists",
            request.name, record.name, record.lun_uri
        ))
        .hint("choose another name and LUN, or use the volume that is there"));
    }
    let key = ReservationKey::new(cluster, core.me, epoch);
    let choice = Choice::of(&request.fence, &core.config.fence, key)?;
    let made = format(&request, cluster, Arc::clone(&state), choice).await?;
    let Some((id, fence_kind)) = made else { return Ok(()) };
    core.propose(Command::CreateVolume {
        name: request.name.clone(),
        id,
        lun_uri: request.lun.clone(),
        owner: core.me,
        owner_epoch: epoch,
        fence_kind,
    })
    .await
    .map_err(|error| {
        error
            .during(format!("volume create {}: the LUN is formatted, but not added", request.name))
            .hint("run the command again with --force")
    })?;
    Ok(())
}

/// Writes the volume's structure, and says how its dead nodes are cut off; `None` after a dry run.
async fn format(
    request: &VolumeCreateRequest,
    cluster: lockmgr::ClusterId,
    state: Arc<ClusterState>,
    choice: Choice,
) -> Result<Option<(VolumeId, FenceKind)>, Error> {
    let request = request.clone();
    let formatting = move || {
        let device = open_uri(&request.lun, OpenOptions::default()).map_err(|error| {
            Error::failed(error)
                .during(format!("volume create {}: opening {}", request.name, request.lun))
                .hint("every node must reach the LUN under the same name")
        })?;
        refuse_known(&request, device.as_ref(), &state)?;
        let params = CreateParams { name: request.name.clone(), cluster, force: request.force };
        Volume::check_create(device.as_ref(), &params).map_err(|error| refused(&request, &error))?;
        // Before the first write: where there is a reservation, only the registered write.
        let kind = choice.settle(&request, device.as_ref())?;
        if request.dry_run {
            choice.withdraw(kind, device.as_ref());
            return Ok(None);
        }
        match Volume::create(Arc::clone(&device), params) {
            Ok(superblock) => Ok(Some((superblock.volume, kind))),
            Err(error) => {
                choice.withdraw(kind, device.as_ref());
                Err(refused(&request, &error))
            }
        }
    };
    tokio::task::spawn_blocking(formatting).await.map_err(Error::failed)?
}

/// A LUN may have several paths: one that holds a volume of this cluster is in use, and no force overrides that.
fn refuse_known(
    request: &VolumeCreateRequest,
    device: &dyn BlockDevice,
    state: &ClusterState,
) -> Result<(), Error> {
    let Ok(found) = Superblock::read(device) else { return Ok(()) };
    match view::volume_by_id(state, found.volume) {
        None => Ok(()),
        Some(record) => Err(Error::conflict(format!(
            "volume create {}: {} is the LUN of volume {} ({}), which is in use",
            request.name, request.lun, record.name, record.lun_uri
        ))
        .hint("choose another LUN")),
    }
}

fn refused(request: &VolumeCreateRequest, error: &VolumeError) -> Error {
    let what = format!("volume create {} on {}", request.name, request.lun);
    let (kind, hint) = match error {
        VolumeError::Occupied { .. } => {
            (api::Kind::Conflict, "choose another LUN; `--force` destroys what is on this one")
        }
        VolumeError::TooSmall { .. } => {
            (api::Kind::Conflict, "give the LUN more room, or choose another one")
        }
        VolumeError::BadName { .. } => (api::Kind::Usage, "choose another name"),
        VolumeError::Io { .. } | VolumeError::Store(_) => {
            (api::Kind::Failed, "look at the LUN's path and the kernel's log")
        }
        VolumeError::NotAVolume { .. }
        | VolumeError::BothTorn { .. }
        | VolumeError::UnknownFeatures { .. }
        | VolumeError::Shrunk { .. } => (api::Kind::Conflict, "look at what the LUN holds before it is used"),
    };
    Error::new(kind, error).during(what).hint(hint)
}

fn check_name(name: &str) -> Result<(), Error> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.chars().all(good) && !name.starts_with('.') {
        return Ok(());
    }
    Err(Error::usage(format!("`{name}` cannot be a volume's name"))
        .hint(format!("use up to {NAME_BYTES_MAX} letters, digits, `-`, `_` and `.`")))
}

fn check_lun(uri: &str) -> Result<(), Error> {
    let relative = uri.strip_prefix("file:").is_some_and(|path| !path.starts_with('/'));
    if relative {
        return Err(Error::usage(format!("LUN {uri}: the path must be absolute"))
            .hint("every node must find the LUN under this name"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_also_a_folder() {
        assert!(check_name("vol1").is_ok());
        for bad in ["", ".", "..", "a/b", ".hidden", "a b"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
