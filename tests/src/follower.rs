//! `csvctl vm console --follow`, as a person at a terminal runs it.

use std::fs::File;
use std::io::Read;
use std::process::{Child, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::{Ctl, PATIENCE};

/// Who follows the console of a VM. Killed when dropped.
#[derive(Debug)]
pub struct Follower {
    process: Child,
    said: Arc<Said>,
}

/// What came so far, and what became of the two streams. One lock for all.
#[derive(Debug, Default)]
struct Said {
    texts: Mutex<([String; 2], [bool; 2])>,
    more: Condvar,
}

impl Follower {
    /// Starts to follow.
    ///
    /// # Panics
    /// When `csvctl` cannot be started.
    #[must_use]
    pub fn start(ctl: &Ctl, vm: &str) -> Self {
        let mut command = ctl.plain(&["vm", "console", vm, "--follow"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("csvctl can be started");
        let said = Arc::<Said>::default();
        let out = process.stdout.take().expect("it is piped");
        let errors = process.stderr.take().expect("it is piped");
        listen(out, &said, 0);
        listen(errors, &said, 1);
        Self { process, said }
    }

    /// Starts `csvctl vm console` at a terminal; gives the other end of that, where keys are pressed.
    ///
    /// # Panics
    /// When there is no terminal to be had, or `csvctl` cannot be started.
    #[must_use]
    pub fn at_terminal(ctl: &Ctl, vm: &str) -> (Self, File) {
        let keys =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
        grantpt(&keys).expect("it is ours");
        unlockpt(&keys).expect("it is ours");
        let name = ptsname(&keys, Vec::new()).expect("it has a name");
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = File::from(rustix::fs::open(name, flags, Mode::empty()).expect("its other end"));
        let keys = File::from(keys);
        let mut command = ctl.plain(&["vm", "console", vm]);
        command.stdin(terminal.try_clone().expect("a descriptor")).stdout(terminal).stderr(Stdio::piped());
        let mut process = command.spawn().expect("csvctl can be started");
        let said = Arc::<Said>::default();
        listen(keys.try_clone().expect("a descriptor"), &said, 0);
        listen(process.stderr.take().expect("it is piped"), &said, 1);
        (Self { process, said }, keys)
    }

    /// Waits until the console is as wanted.
    ///
    /// # Panics
    /// When it ends before, or that takes longer than [`PATIENCE`].
    pub fn until(&self, what: &str, wanted: impl Fn(&str) -> bool) {
        let found = self.said.wait(|texts, ended| wanted(&texts[0]) || ended[0]);
        assert!(wanted(&found[0]), "{what}: it was not said, but {found:?}");
    }

    /// Waits for the end. Gives the console and what was said beside it.
    ///
    /// # Panics
    /// When it does not end within [`PATIENCE`], or not with success.
    #[must_use]
    pub fn end(mut self) -> (String, String) {
        let found = self.said.wait(|_, ended| *ended == [true; 2]);
        assert!(self.said.has_ended(), "it still follows: {found:?}");
        let status = self.process.wait().expect("it can be waited for");
        assert!(status.success(), "{status}: {found:?}");
        let [console, beside] = found;
        (console, beside)
    }
}

impl Said {
    fn wait(&self, until: impl Fn(&[String; 2], &[bool; 2]) -> bool) -> [String; 2] {
        let guard = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = |(texts, ended): &mut ([String; 2], [bool; 2])| !until(texts, ended);
        let (guard, _) =
            self.more.wait_timeout_while(guard, PATIENCE, waits).unwrap_or_else(PoisonError::into_inner);
        guard.0.clone()
    }

    fn has_ended(&self) -> bool {
        self.texts.lock().unwrap_or_else(PoisonError::into_inner).1 == [true; 2]
    }
}

fn listen(mut from: impl Read + Send + 'static, said: &Arc<Said>, stream: usize) {
    let said = Arc::clone(said);
    std::thread::spawn(move || {
        let mut part = [0; 4096];
        loop {
            let len = from.read(&mut part).unwrap_or(0);
            let mut texts = said.texts.lock().unwrap_or_else(PoisonError::into_inner);
            // The test guests say nothing but ASCII.
            texts.0[stream] += &String::from_utf8_lossy(&part[..len]);
            texts.1[stream] = len == 0;
            said.more.notify_all();
            if len == 0 {
                return;
            }
        }
    });
}

impl Drop for Follower {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
