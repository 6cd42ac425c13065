//! `csvctl dev down`.

use std::time::Duration;

use api::Error;
use api::config::NodeConfig;
use api::pb::VolumeListRequest;
use clap::Args;
use rustix::process::Signal;

use super::DevDir;
use super::folder::{Folder, cannot};
use super::node;
use super::process::Running;
use crate::context::Context;

/// Longest time that a daemon may take to flush and end by itself.
pub(crate) const END_WITHIN: Duration = Duration::from_secs(20);

/// Longest time to wait for a node that says who coordinates what; it only decides about the order of ending.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(crate) struct Down {
    #[command(flatten)]
    folder: DevDir,
    /// Also remove the folder, with the LUN's file when it lies there
    #[arg(long)]
    destroy: bool,
    /// Say what would be done, do nothing
    #[arg(long)]
    dry_run: bool,
}

impl Down {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let folder = Folder::open(&self.folder.dir)?;
        let root = folder.root().to_path_buf();
        // A start that failed early leaves a folder without a plan; it can be destroyed all the same.
        let plan = if self.destroy { folder.plan()? } else { Some(folder.existing_plan()?) };
        if self.destroy {
            refuse_foreign(&root, plan.is_some())?;
        }
        if self.dry_run {
            return context.ui.done(&format!("would stop the cluster in {}", root.display()));
        }
        if self.destroy {
            context.ui.confirm(
                &format!("dev down --destroy removes {}", root.display()),
                &root.display().to_string(),
            )?;
        }
        if let Some(plan) = &plan {
            let configs: Vec<_> = plan.nodes.iter().map(|node| folder.node_config(plan, node)).collect();
            // The others first: they give back what they hold, and that takes a coordinator that still answers.
            let owners = owners(&configs).await;
            let (last, first): (Vec<_>, Vec<_>) =
                configs.iter().partition(|config| owners.contains(&config.name));
            for group in [first, last] {
                let mut running = Vec::new();
                for config in group {
                    running.extend(Running::find(&config.pid_file())?);
                }
                end(&running)?;
            }
            for planned in &plan.nodes {
                node::unmount_leftovers(&folder, plan, planned)?;
            }
        }
        if self.destroy {
            std::fs::remove_dir_all(&root).map_err(|error| cannot("remove", &root, &error))?;
            return context.ui.done(&format!("the cluster in {} is stopped and removed", root.display()));
        }
        context.ui.done(&format!("the cluster in {} is stopped", root.display()))
    }
}

/// Names of the nodes that coordinate a volume, as far as a node that answers at once knows them.
async fn owners(configs: &[NodeConfig]) -> Vec<String> {
    for config in configs {
        let answer = tokio::time::timeout(ANSWER_WITHIN, async {
            let mut client = api::connect(&config.admin_socket()).await?;
            Ok::<_, Error>(client.volume_list(VolumeListRequest {}).await?.into_inner())
        });
        if let Ok(Ok(volumes)) = answer.await {
            return volumes.volumes.into_iter().map(|volume| volume.owner).collect();
        }
    }
    Vec::new()
}

/// Never removes a folder that is not one of ours.
fn refuse_foreign(root: &std::path::Path, has_plan: bool) -> Result<(), Error> {
    let empty_but_lock = std::fs::read_dir(root)
        .map(|entries| {
            entries.flatten().all(|entry| entry.file_name() == "dev.lock" || entry.file_name() == "ca")
        })
        .unwrap_or(false);
    if has_plan || empty_but_lock {
        return Ok(());
    }
    Err(Error::not_found(format!("there is no cluster in {}", root.display()))
        .hint("nothing was removed; remove the folder by hand if it is no longer needed"))
}

/// Asks all daemons at once, then makes sure.
fn end(running: &[Running]) -> Result<(), Error> {
    for daemon in running {
        // A stopped process would not notice that it is asked.
        daemon.signal_group(Signal::CONT)?;
        daemon.ask_to_end()?;
    }
    for daemon in running {
        let ended = daemon.wait_end(END_WITHIN)?;
        // Whatever is left of the group goes too: a VM without its daemon has no lease for long.
        daemon.signal_group(Signal::KILL)?;
        if !ended && !daemon.wait_end(END_WITHIN)? {
            return Err(Error::failed(format!("process {} does not end, even when killed", daemon.pid()))
                .hint("it hangs in the kernel; look at its stack in /proc/PID/stack"));
        }
    }
    Ok(())
}
