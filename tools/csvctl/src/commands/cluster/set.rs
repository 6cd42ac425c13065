//! `csvctl cluster set`.

use api::Error;
use api::pb::SetRequest;
use clap::Args;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Set {
    /// Name of the setting
    name: String,
    /// Its value
    #[arg(required_unless_present = "default")]
    value: Option<String>,
    /// Give it its default again
    #[arg(long, conflicts_with = "value")]
    default: bool,
}

impl Set {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let request = SetRequest { name: self.name, value: self.value };
        let setting = context.client().await?.set(request).await?.into_inner();
        context.ui.show(&setting, |setting| format!("{} is {}", setting.name, setting.value))
    }
}
