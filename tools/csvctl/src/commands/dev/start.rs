//! `csvctl dev start`.

use api::Error;
use clap::Args;
use serde::Serialize;

use super::DevDir;
use super::folder::Folder;
use super::node;
use super::process::{self, Running};
use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Start {
    /// The node
    node: String,
    #[command(flatten)]
    folder: DevDir,
}

#[derive(Serialize)]
struct Started {
    node: String,
    pid: i32,
}

impl Start {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let folder = Folder::open(&self.folder.dir)?;
        let plan = folder.existing_plan()?;
        let planned = node::named(&plan, &self.node)?;
        let config = folder.node_config(&plan, planned);
        if Running::find(&config.pid_file())?.is_some() {
            return Err(Error::conflict(format!("node {} is already running", self.node))
                .hint("`csvctl dev fault NODE cont` wakes a stopped one"));
        }
        let spinner = context.ui.spinner(&format!("starting node {}", self.node));
        node::unmount_leftovers(&folder, &plan, planned)?;
        process::start(&config, None)?;
        spinner.step(&format!("waiting for node {} to join", self.node));
        node::wait(&config, 1, std::slice::from_ref(&plan.volume)).await?;
        drop(spinner);
        let running = Running::find(&config.pid_file())?
            .ok_or_else(|| Error::failed(format!("node {} has ended again", self.node)))?;
        let started = Started { node: self.node, pid: running.pid() };
        context.ui.show(&started, |started| format!("node {} is up (process {})", started.node, started.pid))
    }
}
