//! `csvctl cluster validate`.

use api::Error;
use api::pb::{ValidateRequest, Validation};
use clap::Args;

use crate::context::Context;
use crate::ui;

#[derive(Debug, Args)]
pub(crate) struct Validate {
    /// Only look at reservations: take no key off a LUN to see whether it refuses the write after that
    #[arg(long)]
    without_trial: bool,
}

impl Validate {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let spinner = context.ui.spinner("trying out what the cluster promises");
        let request = ValidateRequest { without_trial: self.without_trial, clock_only: false };
        let report = context.client().await?.cluster_validate(request).await?.into_inner();
        drop(spinner);
        context.ui.show(&report, text)?;
        let failed: Vec<_> = report.checks.iter().filter(|check| check.result == "failed").collect();
        match failed.first() {
            None => Ok(()),
            Some(first) => Err(Error::conflict(format!(
                "cluster validate: {} of {} checks failed, the first: {} of {}: {}",
                failed.len(),
                report.checks.len(),
                first.what,
                first.node,
                first.detail
            ))
            .hint("the report names each; `csvctl health` shows what is wrong right now")),
        }
    }
}

fn text(report: &Validation) -> String {
    let rows = report.checks.iter().map(|check| {
        [
            check.result.clone(),
            check.what.clone(),
            check.node.clone(),
            check.volume.clone(),
            check.detail.clone(),
        ]
    });
    ui::table(["result", "check", "node", "volume", "found"], rows)
}
