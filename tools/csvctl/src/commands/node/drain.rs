//! `csvctl node drain`.

use api::pb::{NodeDrainProgress, NodeDrainRequest};
use api::{Error, Streaming};
use clap::Args;

use crate::context::Context;
use crate::ui::Ui;

#[derive(Debug, Args)]
pub(crate) struct Drain {
    /// The node
    node: String,
    /// Show what would move, move nothing
    #[arg(long)]
    dry_run: bool,
}

impl Drain {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let request = NodeDrainRequest { name: self.node.clone(), dry_run: self.dry_run };
        let stream = context.client().await?.node_drain(request).await?.into_inner();
        let end = follow(&context.ui, &format!("draining node {}", self.node), stream).await?;
        context.ui.show(&end, text)
    }
}

/// Shows a drain until it has come to something.
pub(super) async fn follow(
    ui: &Ui,
    what: &str,
    mut stream: Streaming<NodeDrainProgress>,
) -> Result<NodeDrainProgress, Error> {
    let spinner = ui.spinner(what);
    let mut last = None;
    while let Some(progress) = stream.message().await? {
        spinner.step(&format!("{what}: {}", step(&progress)));
        last = Some(progress);
    }
    last.filter(|progress| progress.done).ok_or_else(|| {
        Error::unreachable(format!("{what}: the daemon ended before it was done"))
            .hint("it goes on by itself; `csvctl node list` shows how far it is")
    })
}

fn step(progress: &NodeDrainProgress) -> String {
    let left: Vec<_> = progress
        .volumes
        .iter()
        .map(|name| format!("volume {name}"))
        .chain(progress.vms.iter().map(|name| format!("vm {name}")))
        .collect();
    let moved = progress.volumes_moved + progress.vms_moved;
    match left.first() {
        Some(next) => format!("{moved} of {} moved, next is {next}", moved as usize + left.len()),
        None => progress.phase.clone(),
    }
}

fn text(progress: &NodeDrainProgress) -> String {
    if progress.dry_run {
        let list = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        return format!(
            "would move from {}: coordinators of {}; VMs {}",
            progress.node,
            list(&progress.volumes),
            list(&progress.vms)
        );
    }
    format!(
        "node {} is drained: {} coordinators and {} VMs have moved; `csvctl node resume {}` brings them back",
        progress.node, progress.volumes_moved, progress.vms_moved, progress.node
    )
}
