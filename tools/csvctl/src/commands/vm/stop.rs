//! `csvctl vm stop`.

use api::Error;
use api::pb::VmStopRequest;
use clap::Args;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Stop {
    /// Name of the VM
    name: String,
    /// Pull the plug: do not wait for disks to be flushed
    #[arg(long)]
    force: bool,
}

impl Stop {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let request = VmStopRequest { name: self.name, force: self.force };
        let vm = context.client().await?.vm_stop(request).await?.into_inner();
        context.ui.show(&vm, super::summary)
    }
}
