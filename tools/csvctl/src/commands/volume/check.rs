//! `csvctl volume check`.

use api::Error;
use api::pb::{CheckReport, VolumeCheckRequest};
use clap::Args;

use crate::context::Context;
use crate::ui;

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Name of the volume
    name: String,
    /// Rebuild what the rest of the metadata tells, and set aside what nobody can know
    ///
    /// Nothing is dropped silently: rows that cannot stay are kept in the table of quarantine, inodes without a name and blocks
    /// without an owner are found in /lost+found. Save the LUN before.
    #[arg(long)]
    repair: bool,
}

impl Check {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let spinner = context.ui.spinner(&format!("volume {}: checking", self.name));
        let request = VolumeCheckRequest { name: self.name, repair: self.repair };
        let report = context.client().await?.volume_check(request).await?.into_inner();
        drop(spinner);
        context.ui.show(&report, text)?;
        match report.problems.len() {
            0 => Ok(()),
            count => {
                Err(Error::conflict(format!("volume check {}: {count} problem(s) found", report.volume))
                    .hint(match report.actions.is_empty() {
                        true => "save the LUN, then put it right with --repair",
                        false => "what is left has its reason beside it",
                    }))
            }
        }
    }
}

fn text(report: &CheckReport) -> String {
    let summary = ui::fields([
        ("volume", report.volume.clone()),
        ("inodes", report.inodes.to_string()),
        ("directories", report.directories.to_string()),
        ("extents", report.extents.to_string()),
        ("data blocks", report.data_blocks.to_string()),
        ("fresh blocks", report.fresh_blocks.to_string()),
        ("shared blocks", report.shared_blocks.to_string()),
        ("free blocks", report.free_blocks.to_string()),
        ("metadata blocks", report.metadata_blocks.to_string()),
        ("orphans", report.orphans.to_string()),
        ("set aside", report.set_aside.to_string()),
        ("problems", report.problems.len().to_string()),
    ]);
    let problems = report.problems.iter().map(|problem| match problem.ino {
        0 => format!("\n  {}", problem.what),
        ino => format!("\n  inode {ino}: {}", problem.what),
    });
    let actions = report.actions.iter().map(|action| {
        let (done, what) = (if action.done { "repaired" } else { "left" }, &action.what);
        match action.ino {
            0 => format!("\n  {done}: {what}"),
            ino => format!("\n  {done}: inode {ino}: {what}"),
        }
    });
    summary + &problems.chain(actions).collect::<String>()
}
