//! `csvctl vm migrate`.

use std::time::Duration;

use api::Error;
use api::pb::{MigrateReport, VmMigrateRequest};
use clap::{Args, ValueEnum};

use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// Name of the VM
    name: String,
    /// Where to
    #[arg(long, value_name = "NODE")]
    to: String,
    /// quick: memory is saved to the volume and restored there. live: memory crosses the network while the VM runs
    #[arg(long = "type", value_enum, default_value_t = Type::Live)]
    kind: Type,
    /// Longest time that the VM may stand still
    #[arg(long, value_parser = units::parse_duration, value_name = "TIME")]
    max_blackout: Option<Duration>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Type {
    Live,
    Quick,
}

impl Migrate {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let request = VmMigrateRequest {
            name: self.name,
            to: self.to,
            r#type: match self.kind {
                Type::Live => "live",
                Type::Quick => "quick",
            }
            .to_owned(),
            max_blackout_ms: self
                .max_blackout
                .map_or(0, |limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
        };
        let what = format!("VM {}: moving to {}", request.name, request.to);
        let mut client = context.client().await?;
        let spinner = context.ui.spinner(&what);
        let mut stream = client.vm_migrate(request).await?.into_inner();
        let mut report = None;
        while let Some(progress) = stream.message().await? {
            spinner.step(&format!("{what}: {}", progress.phase));
            report = progress.report.or(report);
        }
        drop(spinner);
        let report = report.ok_or_else(|| {
            Error::unreachable(format!("{what}: the daemon ended without a report"))
                .hint("`csvctl vm show` tells where the VM is")
        })?;
        context.ui.show(&report, text)
    }
}

fn text(report: &MigrateReport) -> String {
    let split = report.blackout.unwrap_or_default();
    format!(
        "VM {} moved from {} to {} ({}) in {:.0} ms\n\
         stood still for {:.1} ms: drain {:.1}, memory {:.1}, state {:.1}, hand-off {:.1}\n\
         {} over the network, {} of disk copied",
        report.vm,
        report.from,
        report.to,
        report.r#type,
        report.total_ms,
        report.blackout_ms,
        split.drain_ms,
        split.memory_ms,
        split.state_ms,
        split.handoff_ms,
        units::size(report.memory_bytes_sent),
        units::size(report.disk_bytes_copied),
    )
}
