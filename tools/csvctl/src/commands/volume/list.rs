//! `csvctl volume list`.

use api::Error;
use api::pb::{VolumeListRequest, Volumes};
use clap::Args;

use crate::context::Context;
use crate::{ui, units};

#[derive(Debug, Args)]
pub(crate) struct List {}

impl List {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let volumes = context.client().await?.volume_list(VolumeListRequest {}).await?.into_inner();
        context.ui.show(&volumes, text)
    }
}

fn text(volumes: &Volumes) -> String {
    let rows = volumes.volumes.iter().map(|volume| {
        [
            volume.name.clone(),
            units::size(volume.size_bytes),
            units::size(volume.free_bytes),
            volume.owner.clone(),
            volume.term.to_string(),
            volume.fence.clone(),
            volume.state.clone(),
            volume.lun.clone(),
        ]
    });
    ui::table(["volume", "size", "free", "owner", "term", "fence", "state", "lun"], rows)
}
