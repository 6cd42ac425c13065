//! `csvctl vm list`.

use api::Error;
use api::pb::{VmListRequest, Vms};
use clap::Args;

use crate::context::Context;
use crate::{ui, units};

#[derive(Debug, Args)]
pub(crate) struct List {}

impl List {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let vms = context.client().await?.vm_list(VmListRequest {}).await?.into_inner();
        context.ui.show(&vms, text)
    }
}

fn text(vms: &Vms) -> String {
    let rows = vms.vms.iter().map(|vm| {
        let spec = vm.spec.clone().unwrap_or_default();
        [
            vm.name.clone(),
            vm.state.clone(),
            vm.owner.clone(),
            vm.epoch.to_string(),
            units::size(spec.memory_bytes),
            spec.cpus.to_string(),
            spec.disks.len().to_string(),
            vm.reason.clone(),
        ]
    });
    ui::table(["vm", "state", "owner", "epoch", "memory", "cpus", "disks", ""], rows)
}
