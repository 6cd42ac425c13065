//! `csvctl vm balloon`.

use api::Error;
use api::pb::VmBalloonRequest;
use clap::Args;

use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct Balloon {
    /// Name of the VM
    name: String,
    /// How much of its memory the guest shall give back in all, such as 512M; 0 lets it take all of it again
    #[arg(value_parser = units::parse_size)]
    size: u64,
}

impl Balloon {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let request = VmBalloonRequest { name: self.name, bytes: self.size };
        let vm = context.client().await?.vm_balloon(request).await?.into_inner();
        context.ui.show(&vm, super::details)
    }
}
