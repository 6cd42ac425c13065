//! `csvctl dev down`.
//!
//! ```text
//!   VMs stop (their records need a quorum) -> nodes that coordinate nothing end -> coordinators end -> what lies about goes
//! ```
//! A node gives back what it holds to the volume's coordinator, so that one is the last to go.

use std::collections::BTreeSet;
use std::time::Duration;

use api::Error;
use api::config::NodeConfig;
use api::pb::{VmListRequest, VmStopRequest, VolumeListRequest};
use clap::Args;
use rustix::process::Signal;

use super::DevDir;
use super::folder::Folder;
use super::node;
use super::process::Running;
use crate::context::Context;
use crate::files::cannot;

/// Longest time that a daemon may take to flush and end by itself.
pub(crate) const END_WITHIN: Duration = Duration::from_secs(20);

/// Longest time that all VMs together may take to stop in order.
const VMS_STOP_WITHIN: Duration = Duration::from_secs(15);

/// A node that does not answer within this time is not asked.
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
            let mut running = Vec::new();
            for config in &configs {
                if let Some(daemon) = Running::find(&config.pid_file())? {
                    // A stopped process would not notice that it is asked.
                    daemon.signal_group(Signal::CONT)?;
                    running.push((config, daemon));
                }
            }
            // Without a quorum nothing can be recorded, and the first node that ends says nothing to the others.
            let owners =
                if running.len() * 2 > configs.len() { settle(&running).await } else { BTreeSet::new() };
            let (last, first): (Vec<_>, Vec<_>) =
                running.into_iter().partition(|(config, _)| owners.contains(&config.name));
            end(&first)?;
            end(&last)?;
            for (planned, config) in plan.nodes.iter().zip(&configs) {
                node::unmount_leftovers(&folder, plan, planned)?;
                node::remove_leftovers(config)?;
            }
        }
        if self.destroy {
            std::fs::remove_dir_all(&root).map_err(|error| cannot("remove", &root, &error))?;
            return context.ui.done(&format!("the cluster in {} is stopped and removed", root.display()));
        }
        context.ui.done(&format!("the cluster in {} is stopped", root.display()))
    }
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

/// Stops the VMs in order and tells which nodes coordinate a volume. As far as it is possible: what cannot be done in order
/// is ended all the same.
async fn settle(running: &[(&NodeConfig, Running)]) -> BTreeSet<String> {
    for (config, _) in running {
        let Ok(Ok(mut client)) =
            tokio::time::timeout(ANSWER_WITHIN, api::connect(&config.admin_socket())).await
        else {
            continue;
        };
        let volumes = tokio::time::timeout(ANSWER_WITHIN, client.volume_list(VolumeListRequest {})).await;
        let vms = tokio::time::timeout(ANSWER_WITHIN, client.vm_list(VmListRequest {})).await;
        let (Ok(Ok(volumes)), Ok(Ok(vms))) = (volumes, vms) else { continue };
        let stopping = async {
            for vm in
                vms.into_inner().vms.into_iter().filter(|vm| vm.state == "running" || vm.state == "paused")
            {
                // Whatever cannot be stopped in order ends with its node.
                drop(client.vm_stop(VmStopRequest { name: vm.name, force: false }).await);
            }
        };
        let _late = tokio::time::timeout(VMS_STOP_WITHIN, stopping).await;
        return volumes.into_inner().volumes.into_iter().map(|volume| volume.owner).collect();
    }
    BTreeSet::new()
}

/// Asks these daemons at once, then makes sure.
fn end(running: &[(&NodeConfig, Running)]) -> Result<(), Error> {
    for (_, daemon) in running {
        daemon.ask_to_end()?;
    }
    for (_, daemon) in running {
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
