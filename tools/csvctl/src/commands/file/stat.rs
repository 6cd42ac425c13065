//! `csvctl file stat`.

use api::Error;
use api::pb::{FileRequest, FileStatus};

use crate::context::Context;
use crate::{ui, units};

pub(crate) async fn run(request: FileRequest, context: &Context) -> Result<(), Error> {
    let status = context.client().await?.file_stat(request).await?.into_inner();
    context.ui.show(&status, text)
}

fn text(status: &FileStatus) -> String {
    ui::fields([
        ("path", status.path.clone()),
        ("volume", status.volume.clone()),
        ("inode", format!("{} (generation {})", status.ino, status.generation)),
        ("kind", status.kind.clone()),
        ("mode", status.mode.clone()),
        ("links", status.nlink.to_string()),
        ("owner", format!("{}:{}", status.uid, status.gid)),
        ("size", format!("{} ({} bytes)", units::size(status.size_bytes), status.size_bytes)),
        ("allocated", units::size(status.allocated_bytes)),
        ("modified", moment(status.mtime_ms)),
        ("changed", moment(status.ctime_ms)),
        ("accessed", moment(status.atime_ms)),
        ("born", moment(status.btime_ms)),
    ])
}

fn moment(unix_ms: i64) -> String {
    u64::try_from(unix_ms).map_or_else(|_| "before 1970".to_owned(), units::moment)
}
