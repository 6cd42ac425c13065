//! `csvctl volume give-up-log`.

use api::Error;
use api::pb::{VolumeGiveUpLogRequest, VolumeLogGivenUp};
use clap::Args;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct GiveUpLog {
    /// Name of the volume
    name: String,
    /// The client whose log cannot be read, as `volume check` names it: NODE.EPOCH.SERIAL
    #[arg(long)]
    client: String,
}

impl GiveUpLog {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let what =
            format!("volume give-up-log {}: what client {} flushed last may be lost", self.name, self.client);
        context.ui.confirm(&what, &self.name)?;
        let request = VolumeGiveUpLogRequest { name: self.name, client: self.client };
        let given_up = context.client().await?.volume_give_up_log(request).await?.into_inner();
        context.ui.show(&given_up, text)
    }
}

fn text(given_up: &VolumeLogGivenUp) -> String {
    format!("{}: client {} has ended without its log", given_up.volume, given_up.client)
}
