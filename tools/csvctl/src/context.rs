//! What every command needs: where the daemon is, and how to show things.

use std::path::{Path, PathBuf};

use api::{Client, Error};

use crate::cli::Global;
use crate::remote;
use crate::ui::Ui;

/// Where the daemon is, and how to show things.
#[derive(Debug)]
pub(crate) struct Context {
    socket: PathBuf,
    identity: PathBuf,
    pub(crate) ui: Ui,
}

impl Context {
    pub(crate) fn new(global: &Global) -> Self {
        let (socket, identity) = (global.connect.clone(), global.identity.clone());
        Self { socket, identity, ui: Ui::new(global.json, global.yes) }
    }

    /// A connection to the daemon that the user named.
    pub(crate) async fn client(&self) -> Result<Client, Error> {
        match remote_address(&self.socket) {
            Some(address) => remote::connect(address, &self.identity).await,
            None => api::connect(&self.socket).await,
        }
    }
}

/// `HOST:PORT` has no slash and ends in a number.
fn remote_address(socket: &Path) -> Option<&str> {
    let text = socket.to_str()?;
    let numbered = text.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    (numbered && !text.contains('/') && !socket.exists()).then_some(text)
}
