//! `csvctl file map`.

use api::Error;
use api::pb::{FileExtents, FileRequest};

use crate::context::Context;
use crate::ui;

pub(crate) async fn run(request: FileRequest, context: &Context) -> Result<(), Error> {
    let map = context.client().await?.file_map(request).await?.into_inner();
    context.ui.show(&map, text)
}

fn text(map: &FileExtents) -> String {
    let rows = map.extents.iter().map(|extent| {
        [
            extent.file_offset_bytes.to_string(),
            extent.length_bytes.to_string(),
            extent.lun_offset_bytes.to_string(),
            extent.state.clone(),
        ]
    });
    format!(
        "{} (inode {}, {} bytes) on {}\n{}",
        map.path,
        map.ino,
        map.size_bytes,
        map.lun,
        ui::table(["file offset", "length", "lun offset", "state"], rows)
    )
}
