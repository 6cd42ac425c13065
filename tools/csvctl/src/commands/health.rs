//! `csvctl health`.

use api::pb::{HealthReport, HealthRequest};
use api::{Error, Kind};
use clap::Args;

use crate::context::Context;

/// Show what is wrong; exit code 6 when something is
#[derive(Debug, Args)]
pub(crate) struct Health {}

impl Health {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let report = context.client().await?.health(HealthRequest {}).await?.into_inner();
        context.ui.show(&report, text)?;
        match report.problems.len() {
            0 => Ok(()),
            count => Err(Error::new(Kind::Degraded, format!("the cluster is degraded: {count} problem(s)"))),
        }
    }
}

fn text(report: &HealthReport) -> String {
    if report.problems.is_empty() {
        return report.status.clone();
    }
    let lines: Vec<_> = report
        .problems
        .iter()
        .map(|problem| match problem.hint.as_str() {
            "" => format!("{}: {}", problem.subject, problem.message),
            hint => format!("{}: {} ({hint})", problem.subject, problem.message),
        })
        .collect();
    lines.join("\n")
}
