//! Orders about the way: by hand, and the rehearsal of a lost path. The daemon follows them itself and tells its processes.

use std::sync::Arc;

use api::{Error, pb};
use blockio::Route;
use hv_runner::PathOrder;
use lockmgr::VolumeId;

use crate::core::Core;
use crate::view;

/// Takes the detour on this node, or leaves it.
pub(crate) async fn io_mode(core: &Arc<Core>, request: pb::VolumeIoModeRequest) -> Result<(), Error> {
    let redirected = wants_detour(&request.mode)?;
    let state = core.state();
    let record = view::volume(&state, &request.name)?;
    let volume = core.volumes.get(record.id);
    let path = volume.and_then(|volume| volume.path()).ok_or_else(|| {
        Error::conflict(format!("volume {} is not open on {}", record.name, core.config.name))
            .hint("`csvctl volume state` shows what is missing")
    })?;
    let status = tokio::task::spawn_blocking(move || path.redirect_by_hand(redirected)).await;
    let status = status.map_err(Error::failed)?;
    tell_processes(core, record.id);
    let wanted = if redirected { Route::Detour } else { Route::Direct };
    if status.route == wanted {
        return Ok(());
    }
    Err(Error::conflict(format!(
        "volume {} on {} is not {}: {}",
        record.name, core.config.name, request.mode, status.reason
    ))
    .hint("`csvctl volume state` shows how each node reaches it"))
}

/// `direct` or `redirected`.
pub(crate) fn wants_detour(mode: &str) -> Result<bool, Error> {
    match mode {
        "direct" => Ok(false),
        "redirected" => Ok(true),
        other => {
            Err(Error::usage(format!("`{other}` is no way to do I/O")).hint("it is direct or redirected"))
        }
    }
}

/// Cuts this node's paths to all LUNs, or mends them.
pub(crate) fn cut(core: &Arc<Core>, cut: bool) {
    core.lun_cut.set(cut);
    for volume in core.volumes.all() {
        tell_processes(core, volume.id);
    }
}

/// Tells the VM processes of this node how they are to reach the LUN of a volume.
pub(crate) fn tell_processes(core: &Arc<Core>, volume: VolumeId) {
    let order = order(core, volume);
    core.clients.order(volume, &order);
}

/// What a process that has just come is told.
pub(crate) fn order(core: &Arc<Core>, volume: VolumeId) -> PathOrder {
    let path = core.volumes.get(volume).and_then(|volume| volume.path());
    PathOrder {
        volume: volume.0.as_bytes().to_vec(),
        redirected: path.is_some_and(|path| path.status().by_hand),
        cut: core.lun_cut.is_cut(),
    }
}
