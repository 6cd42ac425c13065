//! A QEMU process and its machine protocol: one JSON object a line; events come in between, with the time.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Failure;

/// Longest wait for an answer or an event.
const WITHIN: Duration = Duration::from_secs(40);

/// A process; ended when dropped.
pub(crate) struct Qemu {
    child: Child,
    to: UnixStream,
    from: BufReader<UnixStream>,
    /// Events that nobody has waited for yet.
    events: Vec<Value>,
    pub(crate) serial: PathBuf,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Qemu {
    /// Starts it; `name` tells its files from those of others.
    pub(crate) fn start(folder: &Path, name: &str, arguments: &[String]) -> Result<Self, Failure> {
        let (socket, serial) = (folder.join(format!("{name}.qmp")), folder.join(format!("{name}.serial")));
        drop(std::fs::remove_file(&socket));
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-accel", "kvm", "-cpu", "host,arch-capabilities=off", "-nodefaults", "-display", "none"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .arg("-serial")
            .arg(format!("file:{}", serial.display()))
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()?;
        let begun = Instant::now();
        let to = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(_) if begun.elapsed() < WITHIN && child.try_wait()?.is_none() => std::thread::yield_now(),
                Err(error) => return Err(format!("QEMU does not answer: {error}").into()),
            }
        };
        to.set_read_timeout(Some(WITHIN))?;
        let from = BufReader::new(to.try_clone()?);
        let mut qemu = Self { child, to, from, events: Vec::new(), serial };
        qemu.line()?;
        qemu.ask("qmp_capabilities", &json!({}))?;
        Ok(qemu)
    }

    fn line(&mut self) -> Result<Value, Failure> {
        let mut line = String::new();
        if self.from.read_line(&mut line)? == 0 {
            return Err("QEMU has ended".into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// One command and its answer.
    pub(crate) fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value, Failure> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.to, "{request}")?;
        loop {
            let mut answer = self.line()?;
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if answer.get("error").is_some() {
                return Err(format!("{command}: {}", answer["error"]).into());
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Forgets the events that came before the last answer.
    pub(crate) fn forget_events(&mut self) {
        self.events.clear();
    }

    /// Waits for an event and gives its time in seconds.
    pub(crate) fn event(&mut self, name: &str) -> Result<f64, Failure> {
        let time = &self.next_event(name)?["timestamp"];
        let seconds = time["seconds"].as_f64().ok_or("an event without its time")?;
        Ok(seconds + time["microseconds"].as_f64().unwrap_or(0.0) / 1e6)
    }

    /// Waits until a move's status changes, and gives the new one.
    pub(crate) fn migration_status(&mut self) -> Result<String, Failure> {
        let event = self.next_event("MIGRATION")?;
        Ok(event["data"]["status"].as_str().ok_or("an event without a status")?.to_owned())
    }

    /// Waits for an event. Reading ends with an error when nothing comes for too long.
    fn next_event(&mut self, name: &str) -> Result<Value, Failure> {
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return Ok(self.events.remove(at));
            }
            let line = self.line()?;
            if line.get("event").is_some() {
                self.events.push(line);
            }
        }
    }

    /// What the guest has said.
    pub(crate) fn said(&self) -> Result<String, Failure> {
        Ok(String::from_utf8_lossy(&std::fs::read(&self.serial)?).into_owned())
    }
}
