//! An embedded cluster of three real nodes in a folder of its own.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::Ctl;

/// Twice the usual times: other tests keep the cores and the disk busy, and a node that nobody has touched must not be held for
/// dead because it was not heard for 0.6 s.
const PATIENT_BASE_MS: &str = "200";

/// A running embedded cluster. Dropping it stops and removes everything.
#[derive(Debug)]
pub struct Cluster {
    folder: TempDir,
    info: Value,
    /// Its end was seen to.
    kept: bool,
}

impl Cluster {
    /// Starts three nodes with one volume, `vol1`, on a sparse LUN of `lun_size` (as `csvctl` takes it, such as `2G`).
    ///
    /// # Panics
    /// When the cluster does not come up; the message has the reason that `csvctl` gave.
    #[must_use]
    pub fn start(lun_size: &str) -> Self {
        Self::start_in(TempDir::with_prefix("csv-").expect("a temporary folder"), lun_size)
    }

    /// The same with the times that users get, for measurements: on a machine where nothing else runs.
    ///
    /// # Panics
    /// As [`Cluster::start`].
    #[must_use]
    pub fn with_usual_times(lun_size: &str) -> Self {
        let folder = TempDir::with_prefix("csv-").expect("a temporary folder");
        let mut cluster = Self { folder, info: Value::Null, kept: false };
        cluster.info = cluster.up(lun_size, &[]);
        cluster
    }

    /// The same in a folder that already exists; it is removed afterwards.
    ///
    /// # Panics
    /// As [`Cluster::start`].
    #[must_use]
    pub fn start_in(folder: TempDir, lun_size: &str) -> Self {
        let mut cluster = Self { folder, info: Value::Null, kept: false };
        cluster.info = cluster.up(lun_size, &["--base-ms", PATIENT_BASE_MS]);
        cluster
    }

    /// The same on a LUN that somebody serves at `uri`.
    ///
    /// # Panics
    /// As [`Cluster::start`].
    #[must_use]
    pub fn on(uri: &str) -> Self {
        let folder = TempDir::with_prefix("csv-").expect("a temporary folder");
        let mut cluster = Self { folder, info: Value::Null, kept: false };
        cluster.info = cluster.up("0", &["--base-ms", PATIENT_BASE_MS, "--lun", uri]);
        cluster
    }

    /// Ends all nodes in order; [`Cluster::restart`] starts them again.
    ///
    /// # Panics
    /// When they do not end.
    pub fn stop(&self) {
        Ctl::local().must(&["dev", "down", "--dir", self.dir().to_str().expect("a UTF-8 path")]);
    }

    /// Starts all nodes of a stopped cluster.
    ///
    /// # Panics
    /// As [`Cluster::start`].
    pub fn restart(&mut self) {
        self.info = Ctl::local().must(&["dev", "up", "--dir", self.dir().to_str().expect("a UTF-8 path")]);
    }

    fn up(&self, lun_size: &str, options: &[&str]) -> Value {
        let dir = self.dir().to_str().expect("a UTF-8 path").to_owned();
        let up = ["dev", "up", "--dir", &dir, "--lun-size", lun_size, "--volume", "vol1"];
        Ctl::local().must(&[&up, options].concat())
    }

    /// The cluster's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.folder.path()
    }

    /// The nodes are ended and their folder, with their logs, is left behind.
    #[must_use]
    pub fn keep(mut self) -> PathBuf {
        self.folder.disable_cleanup(true);
        let dir = self.dir().to_path_buf();
        drop(Ctl::local().run(&["dev", "down", "--dir", dir.to_str().expect("a UTF-8 path")]));
        self.kept = true;
        dir
    }

    /// What `dev up` printed.
    #[must_use]
    pub fn info(&self) -> &Value {
        &self.info
    }

    /// Name of node `number`, counted from 1.
    #[must_use]
    pub fn name(&self, number: usize) -> String {
        self.text(number, "name")
    }

    /// `csvctl` connected to node `number`.
    #[must_use]
    pub fn ctl(&self, number: usize) -> Ctl {
        Ctl::to(self.text(number, "socket"))
    }

    /// Where node `number` mounts the volume.
    #[must_use]
    pub fn mount(&self, number: usize) -> PathBuf {
        self.text(number, "mount").into()
    }

    /// The LUN's file.
    #[must_use]
    pub fn lun(&self) -> PathBuf {
        let uri = self.info["lun"].as_str().expect("dev up names the LUN");
        uri.strip_prefix("file:").unwrap_or(uri).into()
    }

    fn text(&self, number: usize, field: &str) -> String {
        self.info["nodes"][number - 1][field]
            .as_str()
            .unwrap_or_else(|| panic!("node {number} has no {field}: {}", self.info))
            .into()
    }

    /// Rehearses a fault, see `csvctl dev fault`.
    pub fn fault(&self, number: usize, what: &str) {
        let dir = self.dir().to_str().expect("a UTF-8 path");
        Ctl::local().must(&["dev", "fault", &self.name(number), what, "--dir", dir]);
    }

    /// The next move that comes to this step on node `number` waits there, see `csvctl dev fault NODE hold`.
    pub fn hold(&self, number: usize, step: &str) {
        let dir = self.dir().to_str().expect("a UTF-8 path");
        Ctl::local().must(&["dev", "fault", &self.name(number), "hold", "--at", step, "--dir", dir]);
    }

    /// The next message of this name that a move of node `number` sends is lost, see `csvctl dev fault NODE lose`.
    pub fn lose(&self, number: usize, message: &str) {
        let dir = self.dir().to_str().expect("a UTF-8 path");
        Ctl::local().must(&["dev", "fault", &self.name(number), "lose", "--at", message, "--dir", dir]);
    }

    /// Starts a killed node again.
    pub fn start_node(&self, number: usize) {
        let dir = self.dir().to_str().expect("a UTF-8 path");
        Ctl::local().must(&["dev", "start", &self.name(number), "--dir", dir]);
    }

    /// Waits until `wanted` accepts the console of a VM, as node `number` shows it, and gives the console's text.
    ///
    /// # Panics
    /// After `limit`, with the console's last lines.
    pub fn console(
        &self,
        number: usize,
        vm: &str,
        limit: Duration,
        mut wanted: impl FnMut(&str) -> bool,
    ) -> String {
        let started = Instant::now();
        loop {
            let console = self
                .ctl(number)
                .run(&["vm", "console", vm])
                .map_or_else(|error| error.to_string(), |found| console_text(&found));
            if wanted(&console) {
                return console;
            }
            let tail: Vec<_> = console.lines().rev().take(8).collect();
            if started.elapsed() >= limit {
                let shown = self.ctl(number).run(&["vm", "show", vm]);
                let events = self.ctl(number).run(&["events"]);
                panic!(
                    "{vm} did not print what was expected within {limit:?}; last lines: {tail:?}; the VM: {shown:?}; \
                     events: {events:?}"
                );
            }
            self.wait_for_console(number, vm);
        }
    }

    /// Blocks until the VM prints something, or a second has passed.
    fn wait_for_console(&self, number: usize, vm: &str) {
        // `--follow` returns with what comes next; without output it ends by its own limit.
        drop(self.ctl(number).run(&["vm", "console", vm, "--follow", "--limit-ms", "1000"]));
    }
}

/// The text of a `vm console` document.
fn console_text(document: &Value) -> String {
    document["text"].as_str().unwrap_or("").to_owned()
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if std::thread::panicking() && std::env::var_os("KEEP_CLUSTER").is_some() {
            self.folder.disable_cleanup(true);
            return;
        }
        let dir = self.dir().to_str().expect("a UTF-8 path");
        drop(Ctl::local().run(&["dev", "down", "--dir", dir, "--destroy"]));
    }
}
