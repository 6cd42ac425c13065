//! `csvctl node confirm-dead`.

use api::Error;
use api::pb::NodeConfirmDeadRequest;
use clap::Args;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct ConfirmDead {
    /// The node, which is in quarantine because its fence failed
    node: String,
}

impl ConfirmDead {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let what = format!(
            "if {} is not really off, its late writes will destroy data: what it held is given to other nodes",
            self.node
        );
        context.ui.confirm(&what, &self.node)?;
        let who = std::env::var("SUDO_USER")
            .or_else(|_| std::env::var("USER"))
            .unwrap_or_else(|_| "root".to_owned());
        let request = NodeConfirmDeadRequest { name: self.node, who };
        let node = context.client().await?.node_confirm_dead(request).await?.into_inner();
        context.ui.show(&node, |node| {
            format!("node {} is {}: what it held may be used again", node.name, node.state)
        })
    }
}
