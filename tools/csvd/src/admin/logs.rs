//! Logs of a node, read by whoever administers any node: `log collect` and `support bundle`.
//!
//! **Invariant:** only files that a daemon and its VM processes write as logs are read, by the names that the listing gives.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;

use api::{Error, pb};

use crate::core::Core;
use crate::messages::{NodeAnswer, NodeOp};
use crate::{forward, view};

/// Bytes of a piece, far below the longest frame.
const PIECE_BYTES: u64 = 512 << 10;

/// Asks the node that has the log.
pub(super) async fn read(core: &Arc<Core>, request: pb::LogRequest) -> Result<pb::LogPiece, Error> {
    let node = view::member(&core.state(), &request.node)?.id;
    match forward::ask(core, node, NodeOp::LogRead(request)).await? {
        NodeAnswer::Log(piece) => Ok(piece),
        _ => Err(Error::failed("the node's answer cannot be read")),
    }
}

/// A piece of a log of this node, or their names.
pub(crate) async fn read_here(core: &Arc<Core>, request: pb::LogRequest) -> Result<pb::LogPiece, Error> {
    let core = Arc::clone(core);
    let reading = move || {
        let files = files(&core);
        if request.name.is_empty() {
            let names = files.into_iter().map(|(name, _)| name).collect();
            return Ok(pb::LogPiece { names, end: true, ..pb::LogPiece::default() });
        }
        let found = files.into_iter().find(|(name, _)| *name == request.name);
        let (_, path) = found.ok_or_else(|| Error::not_found(format!("there is no log {}", request.name)))?;
        piece(&path, request.from).map_err(|error| Error::failed(format!("read {}: {error}", path.display())))
    };
    tokio::task::spawn_blocking(reading).await.map_err(Error::failed)?
}

fn piece(path: &PathBuf, from: u64) -> std::io::Result<pb::LogPiece> {
    let mut file = fs::File::open(path)?;
    file.seek(SeekFrom::Start(from))?;
    let mut data = Vec::new();
    let read = file.take(PIECE_BYTES).read_to_end(&mut data)? as u64;
    Ok(pb::LogPiece { data, next: from + read, end: read < PIECE_BYTES, ..pb::LogPiece::default() })
}

/// The daemon's own logs, and those of its VM processes.
fn files(core: &Core) -> Vec<(String, PathBuf)> {
    let own = core.config.log_file();
    let folders = [("", own.parent().map(PathBuf::from)), ("vm-", Some(core.config.vm_dir()))];
    let mut found = Vec::new();
    for (prefix, folder) in folders {
        for entry in folder.into_iter().flat_map(fs::read_dir).flatten().flatten() {
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            let is_log = path.extension().is_some_and(|kind| kind == "log" || kind == "err");
            if is_log && entry.file_type().is_ok_and(|kind| kind.is_file()) {
                found.push((format!("{prefix}{name}"), path));
            }
        }
    }
    found.sort();
    found
}
