//! `csvctl file grants`.

use api::Error;
use api::pb::{FileGrantList, FileRequest};

use crate::context::Context;
use crate::ui;

pub(crate) async fn run(request: FileRequest, context: &Context) -> Result<(), Error> {
    let grants = context.client().await?.file_grants(request).await?.into_inner();
    context.ui.show(&grants, text)
}

fn text(list: &FileGrantList) -> String {
    let rows = list.grants.iter().map(|grant| {
        [
            grant.client.clone(),
            grant.node.clone(),
            grant.held.clone(),
            grant.wanted.clone(),
            format!("{} ms", grant.for_ms),
            if grant.recalled { "recalled".to_owned() } else { String::new() },
        ]
    });
    ui::table(["client", "node", "held", "wanted", "for", ""], rows)
}
