//! `csvctl node list`.

use api::Error;
use api::pb::NodeListRequest;
use clap::Args;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct List {}

impl List {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let nodes = context.client().await?.node_list(NodeListRequest {}).await?.into_inner();
        context.ui.show(&nodes, |nodes| super::table(&nodes.nodes))
    }
}
