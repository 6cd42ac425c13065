//! `csvctl log`.

use std::path::PathBuf;

use api::pb::{LogRequest, NodeListRequest};
use api::{Client, Error};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::context::Context;
use crate::files::{cannot, make_dir};

#[derive(Debug, Subcommand)]
pub(crate) enum LogCommand {
    /// Copy the logs of all nodes into a folder
    Collect(Collect),
}

impl LogCommand {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Self::Collect(command) => command.run(context).await,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Collect {
    /// The folder; made when absent, with a folder for each node in it
    dir: PathBuf,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Collected {
    dir: PathBuf,
    files: usize,
    bytes: usize,
    /// Nodes that did not answer, and why.
    missing: Vec<String>,
}

impl Collect {
    async fn run(self, context: &Context) -> Result<(), Error> {
        let mut client = context.client().await?;
        let spinner = context.ui.spinner("asking the nodes for their logs");
        let (logs, missing) =
            logs(&mut client, |node| spinner.step(&format!("reading the logs of {node}"))).await?;
        drop(spinner);
        let mut bytes = 0;
        for log in &logs {
            let folder = self.dir.join(&log.node);
            make_dir(&folder)?;
            let path = folder.join(&log.name);
            std::fs::write(&path, &log.text).map_err(|error| cannot("write", &path, &error))?;
            bytes += log.text.len();
        }
        let collected = Collected { dir: self.dir, files: logs.len(), bytes, missing };
        context.ui.show(&collected, |it| {
            let missing: String = it.missing.iter().map(|why| format!("\nmissing: {why}")).collect();
            format!("{} logs in {}{missing}", it.files, it.dir.display())
        })
    }
}

/// One log of one node.
pub(crate) struct Log {
    pub(crate) node: String,
    pub(crate) name: String,
    pub(crate) text: Vec<u8>,
}

/// The logs of all nodes that answer, and which do not. One that does not is no reason to go without the others.
pub(crate) async fn logs(client: &mut Client, tell: impl Fn(&str)) -> Result<(Vec<Log>, Vec<String>), Error> {
    let nodes = client.node_list(NodeListRequest {}).await?.into_inner().nodes;
    let (mut logs, mut missing) = (Vec::new(), Vec::new());
    for node in nodes {
        tell(&node.name);
        match of_node(client, &node.name).await {
            Ok(found) => logs.extend(found),
            Err(error) => missing.push(format!("{}: {}", node.name, error.message)),
        }
    }
    Ok((logs, missing))
}

async fn of_node(client: &mut Client, node: &str) -> Result<Vec<Log>, Error> {
    let request = LogRequest { node: node.to_owned(), ..LogRequest::default() };
    let names = client.log_read(request).await?.into_inner().names;
    let mut logs = Vec::new();
    // The names come from a daemon: none of them may lead out of the folder that they are put into.
    for name in names.into_iter().filter(|name| !name.contains('/') && !name.starts_with('.')) {
        let text = whole(client, node, &name).await?;
        logs.push(Log { node: node.to_owned(), name, text });
    }
    Ok(logs)
}

async fn whole(client: &mut Client, node: &str, name: &str) -> Result<Vec<u8>, Error> {
    let mut text = Vec::new();
    loop {
        let (node, name, from) = (node.to_owned(), name.to_owned(), text.len() as u64);
        let piece = client.log_read(LogRequest { node, name, from }).await?.into_inner();
        text.extend(&piece.data);
        if piece.end || piece.data.is_empty() {
            return Ok(text);
        }
    }
}
