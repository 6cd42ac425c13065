//! `csvctl node show`.

use api::Error;
use api::pb::{Node, NodeListRequest};
use clap::Args;

use crate::context::Context;
use crate::ui;

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// The node
    node: String,
}

impl Show {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let nodes = context.client().await?.node_list(NodeListRequest {}).await?.into_inner().nodes;
        let names: Vec<_> = nodes.iter().map(|node| node.name.clone()).collect();
        let node = nodes.into_iter().find(|node| node.name == self.node).ok_or_else(|| {
            Error::not_found(format!("there is no node {}", self.node))
                .hint(format!("the nodes are {}", names.join(", ")))
        })?;
        context.ui.show(&node, text)
    }
}

fn text(node: &Node) -> String {
    ui::fields([
        ("node", format!("{} (number {})", node.name, node.id)),
        ("state", super::state(node)),
        ("epoch", node.epoch.to_string()),
        ("address", node.address.clone()),
        ("vote", if node.voter { "yes" } else { "not yet" }.to_owned()),
        ("leads", if node.leader { "yes" } else { "no" }.to_owned()),
        ("coordinates", format!("{} volumes", node.volumes_owned)),
        ("VMs", node.vms.to_string()),
    ])
}
