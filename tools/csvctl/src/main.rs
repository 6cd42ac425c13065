//! The command line of the cluster.
//!
//! ```text
//!   csvctl [--connect SOCKET|HOST:PORT] [--json] [--yes] NOUN VERB ...
//!       cli.rs: what can be typed     commands/NOUN/VERB.rs: one command each     ui.rs: how results look
//! ```
//!
//! **Invariant:** with `--json` exactly one JSON document goes to stdout (streams: one per line), and errors go to
//! stderr as `{"error":{"kind","message","hint"}}`. The exit code is the error's kind.

mod cli;
mod commands;
mod context;
mod files;
mod node_home;
mod remote;
mod ui;
mod units;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::Cli;
use crate::context::Context;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return ui::usage(&error, std::env::args_os()),
    };
    let context = Context::new(&cli.global);
    let outcome = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| api::Error::failed(format!("start of the runtime: {error}")))
        .and_then(|runtime| runtime.block_on(commands::run(cli.command, &context)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            context.ui.error(&error);
            ExitCode::from(error.kind.exit_code())
        }
    }
}
