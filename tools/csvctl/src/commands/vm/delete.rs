//! `csvctl vm delete`.

use api::Error;
use api::pb::VmDeleteRequest;
use clap::Args;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Name of the VM
    name: String,
    /// Check everything, delete nothing
    #[arg(long)]
    dry_run: bool,
}

impl Delete {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        if !self.dry_run {
            context.ui.confirm(&format!("vm delete forgets VM {}", self.name), &self.name)?;
        }
        let request = VmDeleteRequest { name: self.name.clone(), dry_run: self.dry_run };
        context.client().await?.vm_delete(request).await?;
        let verb = if self.dry_run { "can be deleted" } else { "is deleted; its disks are still there" };
        context.ui.done(&format!("VM {} {verb}", self.name))
    }
}
