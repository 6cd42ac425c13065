//! An hv process and its control socket.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};

use hv::control::{
    Abandon, Activate, Console, ConsoleReply, Control, ControlReply, DiskAdd, DiskLimit, DiskRemove,
    DiskResize, Pause, Refused, Resume, Save, SaveReply, Status, StatusReply, Stop, VmRunState, control,
    control_reply,
};
use hv_guest::Ack;
use hv_runner::config::RunnerConfig;
use prost::Message;
use wire::{BlockingCallbacks, BlockingConnection, Local, service};

/// False, with a line that says so, where there is no KVM.
pub(crate) fn kvm_is_here() -> bool {
    let here = std::path::Path::new("/dev/kvm").exists();
    if !here {
        println!("skipped: /dev/kvm is missing");
    }
    here
}

fn spawn(config: &RunnerConfig) -> Child {
    let file = config.control_socket.with_extension("json");
    std::fs::write(&file, serde_json::to_vec(config).unwrap()).unwrap();
    Command::new(env!("CARGO_BIN_EXE_hv"))
        .arg("--config")
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Runs hv where it must not start; gives error and hint.
pub(crate) fn refused(config: &RunnerConfig) -> (String, String) {
    let output = spawn(config).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "not ready: {output:?}");
    let errors = String::from_utf8(output.stderr).unwrap();
    let line: serde_json::Value = serde_json::from_str(errors.lines().last().unwrap()).unwrap();
    (line["error"].as_str().unwrap().to_owned(), line["hint"].as_str().unwrap().to_owned())
}

fn connect(config: &RunnerConfig) -> BlockingConnection {
    let callbacks = BlockingCallbacks { pushed: Box::new(|_, _| ()), closed: Box::new(|_| ()) };
    let local = Local { cluster: uuid::Uuid::nil(), node: config.node, name: "test".into() };
    BlockingConnection::connect(&config.control_socket, &local, callbacks).unwrap()
}

/// A process that is ready. Killed when dropped.
pub(crate) struct Hv {
    child: Child,
    control: BlockingConnection,
}

impl Hv {
    pub(crate) fn start(config: &RunnerConfig) -> Self {
        let mut child = spawn(config);
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        if ready.is_empty() {
            let mut errors = String::new();
            child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
            panic!("hv did not start: {errors}");
        }
        let wanted = if config.restore_from.is_some() { "incoming" } else { "running" };
        assert_eq!(ready.trim(), format!(r#"{{"state":"{wanted}"}}"#));
        Self { child, control: connect(config) }
    }

    fn ask(&self, op: control::Op) -> control_reply::Result {
        let body = Control { op: Some(op) }.encode_to_vec();
        let reply = self.control.call(service::HV, body.into()).unwrap();
        ControlReply::decode(reply).unwrap().result.unwrap()
    }

    fn done(&self, op: control::Op) -> Result<(), Refused> {
        match self.ask(op) {
            control_reply::Result::Ok(_) => Ok(()),
            control_reply::Result::Refused(refused) => Err(refused),
            other => panic!("unexpected answer {other:?}"),
        }
    }

    pub(crate) fn pause(&self) -> Result<(), Refused> {
        self.done(control::Op::Pause(Pause {}))
    }
    pub(crate) fn resume(&self) -> Result<(), Refused> {
        self.done(control::Op::Resume(Resume {}))
    }
    pub(crate) fn abandon(&self) -> Result<(), Refused> {
        self.done(control::Op::Abandon(Abandon::default()))
    }
    pub(crate) fn activate(&self) -> Result<(), Refused> {
        self.done(control::Op::Activate(Activate {}))
    }

    pub(crate) fn add_disk(&self, slot: u32, path: &str) -> Result<(), Refused> {
        self.done(control::Op::DiskAdd(DiskAdd {
            slot,
            volume: "vol1".into(),
            path: path.into(),
            read_only: false,
        }))
    }
    pub(crate) fn remove_disk(&self, slot: u32) -> Result<(), Refused> {
        self.done(control::Op::DiskRemove(DiskRemove { slot }))
    }
    pub(crate) fn resize_disk(&self, slot: u32, size_bytes: u64) -> Result<(), Refused> {
        self.done(control::Op::DiskResize(DiskResize { slot, size_bytes }))
    }
    pub(crate) fn limit_disk(&self, slot: u32, iops: u64, bytes_per_second: u64) -> Result<(), Refused> {
        self.done(control::Op::DiskLimit(DiskLimit { slot, iops, bytes_per_second }))
    }

    pub(crate) fn save(&self, path: &str) -> Result<SaveReply, Refused> {
        match self.ask(control::Op::Save(Save { volume: "vol1".into(), path: path.into() })) {
            control_reply::Result::Save(save) => Ok(save),
            control_reply::Result::Refused(refused) => Err(refused),
            other => panic!("unexpected answer {other:?}"),
        }
    }

    pub(crate) fn status(&self) -> StatusReply {
        self.status_within(0)
    }

    /// Answered when the guest ends, or after that time.
    pub(crate) fn status_within(&self, wait_ms: u64) -> StatusReply {
        match self.ask(control::Op::Status(Status { wait_ms })) {
            control_reply::Result::Status(status) => status,
            other => panic!("unexpected answer {other:?}"),
        }
    }

    /// Asks for a status that waits, over a connection of its own.
    pub(crate) fn begin_waiting(&self, config: &RunnerConfig) -> std::thread::JoinHandle<()> {
        let control = connect(config);
        std::thread::spawn(move || {
            let body =
                Control { op: Some(control::Op::Status(Status { wait_ms: u64::MAX })) }.encode_to_vec();
            // Its answer, or the end of the connection.
            drop(control.call(service::HV, body.into()));
        })
    }

    /// A part of the console as it is told, of boot `boot`.
    pub(crate) fn console_of(&self, boot: u64, from: u64) -> ConsoleReply {
        match self.ask(control::Op::Console(Console { from, follow: false, boot })) {
            control_reply::Result::Console(console) => console,
            other => panic!("unexpected answer {other:?}"),
        }
    }

    pub(crate) fn console(&self) -> String {
        self.console_from(0, false).0
    }

    fn console_from(&self, from: u64, follow: bool) -> (String, u64) {
        match self.ask(control::Op::Console(Console { from, follow, boot: 0 })) {
            control_reply::Result::Console(console) => {
                (String::from_utf8_lossy(&console.data).into_owned(), console.next)
            }
            other => panic!("unexpected answer {other:?}"),
        }
    }

    /// Waits until the guest has acknowledged more than `sequence`.
    pub(crate) fn wait_ack_beyond(&self, sequence: u64) -> Ack {
        let last = |said: &str| hv_guest::last_ack(said.as_bytes()).filter(|ack| ack.sequence > sequence);
        last(&self.wait(|said| last(said).is_some())).expect("just seen")
    }

    /// Waits until the guest has said `what`.
    pub(crate) fn wait_console(&self, what: &str) {
        self.wait(|said| said.contains(what));
    }

    fn wait(&self, until: impl Fn(&str) -> bool) -> String {
        let (mut said, mut next) = self.console_from(0, false);
        let mut silent = 0;
        while silent < 60 {
            assert!(!said.contains("FAIL"), "the guest failed:\n{said}");
            if until(&said) {
                return said;
            }
            let status = self.status();
            assert_eq!(status.state(), VmRunState::Running, "{status:?}\n{said}");
            let (more, end) = self.console_from(next, true);
            silent = if more.is_empty() { silent + 1 } else { 0 };
            (said, next) = (said + &more, end);
        }
        panic!("the guest has not said what was waited for:\n{said}");
    }

    pub(crate) fn acked(&self) -> Ack {
        hv_guest::last_ack(self.console().as_bytes()).unwrap()
    }

    /// Memory of the process that is not the guest's RAM, in KiB.
    pub(crate) fn private_memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        field("RssAnon:") + field("RssFile:")
    }

    /// A field of the status of each of its threads.
    pub(crate) fn thread_status(&self, field: &str) -> Vec<String> {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let of = |thread: std::fs::DirEntry| {
            let status = std::fs::read_to_string(thread.path().join("status")).ok()?;
            status.lines().find_map(|line| line.strip_prefix(field)).map(|value| value.trim().to_owned())
        };
        threads.flatten().filter_map(of).collect()
    }

    pub(crate) fn stop(mut self, force: bool) -> ExitStatus {
        self.done(control::Op::Stop(Stop { force })).unwrap();
        self.child.wait().unwrap()
    }

    pub(crate) fn wait_end(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Hv {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
