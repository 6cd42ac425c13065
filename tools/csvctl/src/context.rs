//! What every command needs: where the daemon is, and how to show things.

use std::path::{Path, PathBuf};

use api::{Client, Error};

use crate::cli::Global;
use crate::ui::Ui;

/// Where the daemon is, and how to show things.
#[derive(Debug)]
pub(crate) struct Context {
    socket: PathBuf,
    pub(crate) ui: Ui,
}

impl Context {
    pub(crate) fn new(global: &Global) -> Self {
        Self { socket: global.connect.clone(), ui: Ui::new(global.json, global.yes) }
    }

    /// A connection to the daemon that the user named.
    pub(crate) async fn client(&self) -> Result<Client, Error> {
        if is_remote(&self.socket) {
            return Err(Error::usage(format!(
                "connect to {}: only Unix sockets can be connected to",
                self.socket.display()
            ))
            .hint("run csvctl on the node itself, with the path of its csvd.sock"));
        }
        api::connect(&self.socket).await
    }
}

/// `HOST:PORT` has no slash and ends in a number.
fn is_remote(socket: &Path) -> bool {
    socket.to_str().is_some_and(|text| {
        !text.contains('/')
            && text.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok())
            && !socket.exists()
    })
}
