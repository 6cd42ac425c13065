//! `csvctl node evict`.

use api::Error;
use api::pb::NodeEvictRequest;
use clap::Args;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Evict {
    /// The node, which must be off
    node: String,
    /// Check everything, change nothing
    #[arg(long)]
    dry_run: bool,
}

impl Evict {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        if !self.dry_run {
            let what = format!("{} is forgotten: it must join again to come back", self.node);
            context.ui.confirm(&what, &self.node)?;
        }
        let request = NodeEvictRequest { name: self.node, dry_run: self.dry_run };
        let evicted = context.client().await?.node_evict(request).await?.into_inner();
        context.ui.show(&evicted, |evicted| {
            let can = if evicted.dry_run { "can be evicted" } else { "is no longer a member" };
            format!("node {} {can}; {} members remain", evicted.node, evicted.members_left)
        })
    }
}
