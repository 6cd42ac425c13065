//! `csvctl man`.

use std::path::PathBuf;

use api::Error;
use clap::{Args, CommandFactory};

use crate::cli::Cli;
use crate::context::Context;

/// Write the manual pages into a folder
#[derive(Debug, Args)]
pub(crate) struct Man {
    /// The folder; made when absent
    dir: PathBuf,
}

impl Man {
    pub(crate) fn run(self, context: &Context) -> Result<(), Error> {
        std::fs::create_dir_all(&self.dir)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), &self.dir))
            .map_err(|error| {
                Error::failed(format!("writing manual pages to {}: {error}", self.dir.display()))
            })?;
        context.ui.done(&format!("manual pages written to {}", self.dir.display()))
    }
}
