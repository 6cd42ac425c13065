//! `csvctl cluster show`.

use api::Error;
use api::pb::{Cluster, ClusterShowRequest};
use clap::Args;

use crate::commands::node;
use crate::context::Context;
use crate::ui;

#[derive(Debug, Args)]
pub(crate) struct Show {}

impl Show {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let cluster = context.client().await?.cluster_show(ClusterShowRequest {}).await?.into_inner();
        context.ui.show(&cluster, text)
    }
}

fn text(cluster: &Cluster) -> String {
    let leader = if cluster.leader.is_empty() { "none" } else { &cluster.leader };
    let summary = ui::fields([
        ("cluster", cluster.name.clone()),
        ("id", cluster.id.clone()),
        ("leader", format!("{leader} (raft term {})", cluster.raft_term)),
        ("quorum", if cluster.quorum { "yes" } else { "no" }.to_owned()),
        ("volumes", cluster.volumes.to_string()),
        ("VMs", cluster.vms.to_string()),
    ]);
    format!("{summary}\n\n{}", node::table(&cluster.nodes))
}
