//! `csvctl cluster settings`.

use api::Error;
use api::pb::SettingsRequest;
use clap::Args;

use crate::context::Context;
use crate::ui;

#[derive(Debug, Args)]
pub(crate) struct Settings {}

impl Settings {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let list = context.client().await?.settings(SettingsRequest {}).await?.into_inner();
        context.ui.show(&list, |list| {
            let rows = list.settings.iter().map(|setting| {
                let set = if setting.is_default { "default" } else { "" };
                [setting.name.clone(), setting.value.clone(), set.to_owned(), setting.about.clone()]
            });
            ui::table(["setting", "value", "", "what it does"], rows)
        })
    }
}
