//! `csvctl vm check-migrate`.

use api::Error;
use api::pb::{MigrateProblems, VmCheckMigrateRequest};
use clap::Args;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct CheckMigrate {
    /// Name of the VM
    name: String,
    /// Where it would go
    #[arg(long, value_name = "NODE")]
    to: String,
}

impl CheckMigrate {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let request = VmCheckMigrateRequest { name: self.name, to: self.to };
        let found = context.client().await?.vm_check_migrate(request).await?.into_inner();
        context.ui.show(&found, text)?;
        match found.problems.len() {
            0 => Ok(()),
            count => Err(Error::conflict(format!(
                "vm check-migrate {}: {count} problem(s) stand against a move to {}",
                found.vm, found.to
            ))
            .hint("put right what is listed, or choose another node")),
        }
    }
}

fn text(found: &MigrateProblems) -> String {
    if found.problems.is_empty() {
        return format!("VM {} can move to {}", found.vm, found.to);
    }
    let lines: Vec<_> =
        found.problems.iter().map(|problem| format!("{}: {}", problem.kind, problem.message)).collect();
    lines.join("\n")
}
