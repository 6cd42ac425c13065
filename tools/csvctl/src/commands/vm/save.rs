//! `csvctl vm save`.

use api::Error;
use api::pb::VmRequest;

use super::VmName;
use crate::context::Context;

pub(crate) async fn run(vm: VmName, context: &Context) -> Result<(), Error> {
    let vm = context.client().await?.vm_save(VmRequest { name: vm.name }).await?.into_inner();
    context.ui.show(&vm, super::summary)
}
