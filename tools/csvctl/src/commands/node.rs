//! `csvctl node`.

mod list;

use api::Error;
use api::pb::Node;
use clap::Subcommand;

use crate::context::Context;
use crate::ui;

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// List the members
    List(list::List),
}

impl NodeCommand {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Self::List(command) => command.run(context).await,
        }
    }
}

/// Nodes as a table.
pub(crate) fn table(nodes: &[Node]) -> String {
    let rows = nodes.iter().map(|node| {
        [
            node.name.clone(),
            node.id.to_string(),
            node.state.clone(),
            node.epoch.to_string(),
            node.address.clone(),
            role(node),
            node.volumes_owned.to_string(),
            node.vms.to_string(),
        ]
    });
    ui::table(["node", "id", "state", "epoch", "address", "role", "volumes", "vms"], rows)
}

fn role(node: &Node) -> String {
    match (node.leader, node.this_node) {
        (true, true) => "leader, here",
        (true, false) => "leader",
        (false, true) => "here",
        (false, false) => "",
    }
    .to_owned()
}
