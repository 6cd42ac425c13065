//! `csvctl node resume`.

use api::Error;
use api::pb::NodeResumeRequest;
use clap::Args;

use super::drain::follow;
use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Resume {
    /// The node
    node: String,
}

impl Resume {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let request = NodeResumeRequest { name: self.node.clone() };
        let stream = context.client().await?.node_resume(request).await?.into_inner();
        let end = follow(&context.ui, &format!("resuming node {}", self.node), stream).await?;
        context.ui.show(&end, |end| format!("node {} takes part again", end.node))
    }
}
