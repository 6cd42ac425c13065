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
            grant.next.clone(),
        ]
    });
    let grants = ui::table(["client", "node", "held", "wanted", "for", "", "next"], rows);
    if list.locks.is_empty() {
        return grants;
    }
    let rows = list.locks.iter().map(|lock| {
        [
            lock.client.clone(),
            lock.node.clone(),
            lock.pid.to_string(),
            format!("{} {}", lock.family, lock.mode),
            if lock.end == u64::MAX {
                format!("{}..", lock.start)
            } else {
                format!("{}..={}", lock.start, lock.end)
            },
            if lock.waits { "waits" } else { "has it" }.to_owned(),
            format!("{} ms", lock.for_ms),
            lock.next.clone(),
        ]
    });
    let locks = ui::table(["client", "node", "process", "lock", "bytes", "", "for", "next"], rows);
    format!("{grants}\n{locks}")
}
