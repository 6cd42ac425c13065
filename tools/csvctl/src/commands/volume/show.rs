//! `csvctl volume show`.

use api::Error;
use api::pb::VolumeShowRequest;
use clap::Args;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// Name of the volume
    name: String,
}

impl Show {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let request = VolumeShowRequest { name: self.name };
        let volume = context.client().await?.volume_show(request).await?.into_inner();
        context.ui.show(&volume, super::details)
    }
}
