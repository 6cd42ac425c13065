//! `csvctl node leave`.

use std::path::Path;
use std::time::Duration;

use api::Error;
use api::pb::{NodeDrainProgress, NodeLeaveRequest, NodeListRequest};
use clap::Args;

use crate::commands::dev::process::Running;
use crate::context::Context;

/// Longest time for the daemon to end after it is empty.
const ENDS_WITHIN: Duration = Duration::from_secs(90);

#[derive(Debug, Args)]
pub(crate) struct Leave {
    /// Check everything and show what would move, change nothing
    #[arg(long)]
    dry_run: bool,
}

impl Leave {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let mut client = context.client().await?;
        let nodes = client.node_list(NodeListRequest {}).await?.into_inner().nodes;
        let name = nodes.into_iter().find(|node| node.this_node).map(|node| node.name).unwrap_or_default();
        if !self.dry_run {
            let what =
                format!("{name} leaves the cluster: its keys are removed, it must join again to come back");
            context.ui.confirm(&what, &name)?;
        }
        let request = NodeLeaveRequest { dry_run: self.dry_run };
        let stream = client.node_leave(request).await?.into_inner();
        let end = super::drain::follow(&context.ui, &format!("draining node {name}"), stream).await?;
        if !self.dry_run {
            left(&end)?;
        }
        context.ui.show(&end, |end| match end.dry_run {
            true => format!(
                "node {} can leave: {} coordinators and {} VMs would move",
                end.node,
                end.volumes.len(),
                end.vms.len()
            ),
            false => format!(
                "node {} is no longer a member; {} holds nothing of the cluster any more",
                end.node, end.dir
            ),
        })
    }
}

/// Waits for the end of the daemon, which takes its configuration away when the others have forgotten it.
fn left(end: &NodeDrainProgress) -> Result<(), Error> {
    let dir = Path::new(&end.dir);
    let ended = match Running::find(&dir.join("csvd.pid"))? {
        Some(daemon) => daemon.wait_end(ENDS_WITHIN)?,
        None => true,
    };
    if !ended || dir.join("csvd.toml").exists() {
        return Err(Error::failed(format!("node {} is drained and not forgotten yet", end.node)).hint(
            format!(
                "the others forget it when they can, see `csvctl node list` there; its log is {}",
                dir.join("log/csvd.log").display()
            ),
        ));
    }
    Ok(())
}
