//! Nodes as an administrator sets them up one by one: `cluster create`, `cluster token`, `node join`, each with a folder
//! and an address of its own, as if on hosts of their own.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::{Ctl, binary};

/// A node's folder and, while it runs, its daemon. Dropping it ends the daemon and everything that it started.
#[derive(Debug)]
pub struct Host {
    folder: TempDir,
    name: String,
    address: String,
    /// Variables of the daemon's environment.
    environment: Vec<(String, String)>,
    daemon: Option<Child>,
}

impl Host {
    /// Founds a cluster and starts its first node.
    ///
    /// # Panics
    /// With the error of `csvctl` when that fails.
    #[must_use]
    pub fn found(cluster: &str, node: &str, options: &[&str]) -> Self {
        let host = Self::new(node);
        let mut arguments = vec!["cluster", "create", "--name", cluster];
        arguments.extend(options);
        host.set_up(&arguments).started()
    }

    /// Joins a node with a token and starts it.
    ///
    /// # Panics
    /// As [`Host::found`].
    #[must_use]
    pub fn join(node: &str, token: &str) -> Self {
        Self::new(node).set_up(&["node", "join", "--token", token]).started()
    }

    /// Joins a node with further options and starts it.
    ///
    /// # Panics
    /// As [`Host::found`].
    #[must_use]
    pub fn join_as(node: &str, token: &str, options: &[&str]) -> Self {
        Self::new(node).set_up(&[&["node", "join", "--token", token], options].concat()).started()
    }

    /// A host without a node.
    ///
    /// # Panics
    /// When this machine has no folder or port to give.
    #[must_use]
    pub fn new(node: &str) -> Self {
        let folder = TempDir::with_prefix("csv-host-").expect("a temporary folder");
        // An address of 127/8 that nobody else is likely to use: its port is free again when a node starts anew.
        let random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), node).to_le_bytes();
        let ip = std::net::Ipv4Addr::new(127, random[0].max(1), random[1], random[2].clamp(1, 254));
        let port = TcpListener::bind((ip, 0)).and_then(|it| it.local_addr()).expect("a free port").port();
        let (name, address) = (node.to_owned(), format!("{ip}:{port}"));
        Self { folder, name, address, environment: Vec::new(), daemon: None }
    }

    /// Runs a command that makes this host a node, with the options that all of them take.
    ///
    /// # Panics
    /// With its error when it fails.
    #[must_use]
    pub fn set_up(self, command: &[&str]) -> Self {
        Ctl::local().must(&self.arguments(command));
        self
    }

    /// The arguments of a command that makes this host a node, without starting it.
    #[must_use]
    pub fn arguments(&self, command: &[&str]) -> Vec<String> {
        let dir = self.dir().to_str().expect("a UTF-8 path");
        let own = ["--node", &self.name, "--listen", &self.address, "--dir", dir, "--no-start"];
        command.iter().chain(&own).map(|word| (*word).to_owned()).collect()
    }

    #[must_use]
    fn started(mut self) -> Self {
        self.start();
        self
    }

    /// Starts the daemon and waits until it answers.
    ///
    /// # Panics
    /// With what it printed when it does not.
    pub fn start(&mut self) {
        let mut daemon = Command::new(binary("csvd"))
            .arg("--config")
            .arg(self.dir().join("csvd.toml"))
            .arg("--new-session")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("csvd can be started");
        let mut line = String::new();
        let out = daemon.stdout.take().expect("piped");
        BufReader::new(out).read_line(&mut line).expect("readable");
        if line.trim() != "ready" {
            let mut why = String::new();
            drop(daemon.stderr.take().expect("piped").read_to_string(&mut why));
            drop(daemon.wait());
            panic!("{} did not start: {why}", self.name);
        }
        self.daemon = Some(daemon);
        self.ctl().must(&["cluster", "wait"]);
    }

    /// Gives the daemon a variable of its environment, from its next start on.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Rehearses a fault, see `csvctl dev fault`.
    pub fn fault(&self, what: &str) {
        let dir = self.dir().to_str().expect("a UTF-8 path");
        Ctl::local().must(&["dev", "fault", &self.name, what, "--dir", dir]);
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `csvctl` connected to this node.
    #[must_use]
    pub fn ctl(&self) -> Ctl {
        Ctl::to(self.dir().join("csvd.sock"))
    }

    /// The node's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.folder.path()
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where it mounts a volume.
    #[must_use]
    pub fn mount(&self, volume: &str) -> PathBuf {
        self.dir().join("mnt").join(volume)
    }

    /// A token of this node.
    ///
    /// # Panics
    /// When it makes none.
    #[must_use]
    pub fn token(&self) -> String {
        let token = self.ctl().must(&["cluster", "token"]);
        token["token"].as_str().expect("a token").to_owned()
    }

    /// Stops every process of the node in its tracks.
    pub fn freeze(&self) {
        self.signal("STOP");
    }

    /// Lets them go on.
    pub fn thaw(&self) {
        self.signal("CONT");
    }

    fn signal(&self, signal: &str) {
        if let Some(daemon) = &self.daemon {
            signal_group(signal, daemon.id());
        }
    }

    /// A power cut: every process of the node ends at once.
    pub fn kill(&mut self) {
        self.end("KILL");
    }

    /// An end in order.
    pub fn stop(&mut self) {
        self.end("TERM");
    }

    fn end(&mut self, signal: &str) {
        let Some(mut daemon) = self.daemon.take() else { return };
        // The daemon leads a process group, which holds its VMs too. In order, it ends them itself.
        let whom = if signal == "KILL" { format!("-{}", daemon.id()) } else { daemon.id().to_string() };
        drop(Command::new("kill").args(["-s", signal, "--", &whom]).stderr(Stdio::null()).status());
        drop(daemon.wait());
        self.unmount();
    }

    /// What the daemon had no time for.
    fn unmount(&self) {
        for mount in std::fs::read_dir(self.dir().join("mnt")).into_iter().flatten().flatten() {
            drop(Command::new("umount").arg("-l").arg(mount.path()).stderr(Stdio::null()).status());
        }
    }
}

/// The daemon leads a process group, which holds its VMs too.
fn signal_group(signal: &str, group: u32) {
    let group = format!("-{group}");
    drop(Command::new("kill").args(["-s", signal, "--", &group]).stderr(Stdio::null()).status());
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
    }
}
