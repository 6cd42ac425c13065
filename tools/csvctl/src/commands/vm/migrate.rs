//! `csvctl vm migrate`.

use std::time::Duration;

use api::Error;
use api::pb::{MigrateProgress, MigrateReport, VmMigrateRequest, VmRequest};
use clap::{Args, ValueEnum};

use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// Name of the VM
    name: String,
    /// Where to
    #[arg(long, value_name = "NODE", required_unless_present = "cancel")]
    to: Option<String>,
    /// quick: memory is saved to the volume and restored there. live: memory crosses the network while the VM runs
    #[arg(long = "type", value_enum, default_value_t = Type::Live)]
    kind: Type,
    /// Longest time that the VM may stand still in a live move [default: 300ms]
    #[arg(long, value_parser = units::parse_duration, value_name = "TIME")]
    max_blackout: Option<Duration>,
    /// Give up the move that is under way; the VM runs on where it is
    #[arg(long, conflicts_with_all = ["to", "max_blackout"])]
    cancel: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Type {
    Live,
    Quick,
}

impl Migrate {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self.to.clone() {
            Some(to) => self.migrate(to, context).await,
            None => cancel(self.name, context).await,
        }
    }

    async fn migrate(self, to: String, context: &Context) -> Result<(), Error> {
        let request = VmMigrateRequest {
            name: self.name,
            to,
            r#type: match self.kind {
                Type::Live => "live",
                Type::Quick => "quick",
            }
            .to_owned(),
            max_blackout_ms: self
                .max_blackout
                .map_or(0, |limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
            reason: String::new(),
        };
        let what = format!("VM {}: moving to {}", request.name, request.to);
        let mut client = context.client().await?;
        let spinner = context.ui.spinner(&what);
        let mut stream = client.vm_migrate(request).await?.into_inner();
        let mut report = None;
        while let Some(progress) = stream.message().await? {
            spinner.step(&format!("{what}: {}", step(&progress)));
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

async fn cancel(name: String, context: &Context) -> Result<(), Error> {
    let done = format!("VM {name}: its move is being given up");
    context.client().await?.vm_migrate_cancel(VmRequest { name }).await?;
    context.ui.done(&done)
}

fn step(progress: &MigrateProgress) -> String {
    if progress.round == 0 {
        return progress.phase.clone();
    }
    let held_back = match progress.throttle_percent {
        0 => String::new(),
        percent => format!(", held back by {percent} %"),
    };
    format!(
        "{}, pass {}: {} sent at {}/s, {} left, would stand still for {} ms{held_back}",
        progress.phase,
        progress.round,
        units::size(progress.memory_bytes_sent),
        units::size(progress.bytes_per_second),
        units::size(progress.memory_bytes_left),
        progress.blackout_ms_expected,
    )
}

fn text(report: &MigrateReport) -> String {
    let split = report.blackout.unwrap_or_default();
    let saved = match report.delta_pages {
        0 => String::new(),
        pages => format!(
            " ({} less because {pages} pages went as what had changed in them)",
            units::size(report.delta_bytes_saved)
        ),
    };
    format!(
        "VM {} moved from {} to {} ({}) in {:.0} ms\n\
         stood still for {:.1} ms: drain {:.1}, memory {:.1}, state {:.1}, hand-off {:.1}\n\
         {} over the network{saved}, {} of disk copied",
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
