//! `csvctl cluster token`.

use api::Error;
use api::pb::{ClusterToken, ClusterTokenRequest};
use clap::Args;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Token {
    /// How long it is good for, in minutes
    #[arg(long, value_name = "MINUTES", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=10_080))]
    valid_minutes: u64,
}

impl Token {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let request = ClusterTokenRequest { valid_ms: self.valid_minutes * 60_000 };
        let token = context.client().await?.cluster_token(request).await?.into_inner();
        // The token alone on stdout, so that a script can take it.
        context.ui.show(&token, |token: &ClusterToken| token.token.clone())
    }
}
