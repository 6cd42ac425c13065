//! A node's folder on a host of its own: configuration, certificates, and the daemon that works in it.
//!
//! ```text
//!   /var/lib/csvd/csvd.toml              who this node is and whom it knows
//!                 ca.crt ca.key          the cluster's authority: every member can let others join
//!                 node.crt node.key      who this node can prove to be
//!   /run/csvd/csvd.sock                  the admin socket
//! ```
//! **Invariant:** `csvd.toml` is written last: a folder that has it is complete, and is never written over.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use api::Error;
use api::config::{NodeConfig, TlsConfig};
use api::pb::WaitRequest;
use clap::Args;

use crate::commands::dev::process;
use crate::files::{make_dir, write_private};

/// Where a node's folder is unless something else is said.
const DIR: &str = "/var/lib/csvd";
/// Where its admin socket is then.
const SOCKET: &str = "/run/csvd/csvd.sock";
/// Longest time for a new node to take part.
const READY_WITHIN_MS: u64 = 60_000;

/// What every new node is told.
#[derive(Debug, Args)]
pub(crate) struct NewNode {
    /// Name of this node in the cluster
    #[arg(long, value_name = "NAME")]
    pub(crate) node: String,
    /// Address on which the other nodes reach this one
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) listen: SocketAddr,
    /// Folder of everything that the node keeps
    #[arg(long, value_name = "DIR", default_value = DIR)]
    dir: PathBuf,
    /// Write the files and leave it to you to start `csvd --config DIR/csvd.toml`
    #[arg(long)]
    pub(crate) no_start: bool,
}

/// The texts of the certificate files.
pub(crate) struct Certificates<'a> {
    pub(crate) ca_cert: &'a str,
    pub(crate) ca_key: &'a str,
    pub(crate) cert: &'a str,
    pub(crate) key: &'a str,
}

impl NewNode {
    /// The folder, as an absolute path. It must not hold a node yet, and the address must be one that others can use.
    pub(crate) fn check(&self) -> Result<PathBuf, Error> {
        if self.listen.ip().is_unspecified() || self.listen.port() == 0 {
            return Err(Error::usage(format!("--listen {}: the other nodes cannot reach that", self.listen))
                .hint("give the address and the port that they shall connect to"));
        }
        let dir = std::path::absolute(&self.dir)
            .map_err(|error| Error::usage(format!("folder {}: {error}", self.dir.display())))?;
        if dir.join("csvd.toml").exists() {
            return Err(Error::conflict(format!("{} already holds a node", dir.display()))
                .hint("start it with `csvd --config`, or choose another folder with --dir"));
        }
        Ok(dir)
    }
}

/// Where the admin socket of a node in `dir` is, as its configuration names it.
pub(crate) fn socket_of(dir: &Path) -> Option<PathBuf> {
    (dir == Path::new(DIR)).then(|| PathBuf::from(SOCKET))
}

/// Where the certificate files of a node in `dir` are.
pub(crate) fn tls_of(dir: &Path) -> TlsConfig {
    TlsConfig {
        ca: dir.join("ca.crt"),
        cert: dir.join("node.crt"),
        key: dir.join("node.key"),
        ca_key: Some(dir.join("ca.key")),
    }
}

/// Writes a node's folder.
pub(crate) fn furnish(config: &NodeConfig, certificates: &Certificates<'_>) -> Result<(), Error> {
    let text = toml::to_string(config)
        .map_err(|error| Error::failed(format!("encoding the configuration: {error}")))?;
    if let Some(parent) = config.admin_socket().parent() {
        make_dir(parent)?;
    }
    write_private(&config.tls.ca, certificates.ca_cert)?;
    if let Some(ca_key) = &config.tls.ca_key {
        write_private(ca_key, certificates.ca_key)?;
    }
    write_private(&config.tls.cert, certificates.cert)?;
    write_private(&config.tls.key, certificates.key)?;
    write_private(&config.dir.join("csvd.toml"), &text)
}

/// Starts the daemon and waits until it takes part.
pub(crate) async fn start(config: &NodeConfig) -> Result<(), Error> {
    process::start(config, None)?;
    let request = WaitRequest { timeout_ms: READY_WITHIN_MS, nodes_up: 1, volumes: Vec::new() };
    let ready = process::await_ready(config, request).await;
    ready.map_err(|error| error.hint(format!("its log is {}", config.log_file().display())))
}
