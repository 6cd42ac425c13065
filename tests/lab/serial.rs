//! A machine's serial port: everything it says is kept, commands are given to the shell behind it. The kernel writes to another one.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::tool::{Doing, LabError};

/// How long QEMU may take to make the socket.
const SOCKET_WITHIN: Duration = Duration::from_secs(20);
/// Lines of the machine that an error shows.
const LINES_SHOWN: usize = 40;

/// The port's two directions.
#[derive(Debug)]
pub(crate) struct Serial {
    name: String,
    port: UnixStream,
    /// What the kernel has said.
    kernel_log: PathBuf,
    heard: Arc<Heard>,
    commands: u32,
}

#[derive(Debug, Default)]
struct Heard {
    /// Protects the text and whether more may come.
    said: Mutex<Said>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Said {
    text: String,
    ended: bool,
}

impl Serial {
    /// Connects to the socket that QEMU makes, and listens from then on. A copy of all goes to `log`.
    pub(crate) fn connect(
        name: &str,
        socket: &Path,
        log: &Path,
        kernel_log: &Path,
    ) -> Result<Self, LabError> {
        let port = connect(socket)?;
        let heard = Arc::<Heard>::default();
        let mut from = port.try_clone().doing("a second handle of the serial port")?;
        let mut log = std::fs::File::create(log).doing("making a machine's log")?;
        let ears = Arc::clone(&heard);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = from.read(&mut buffer) {
                drop(log.write_all(&buffer[..len]));
                ears.lock().text += &String::from_utf8_lossy(&buffer[..len]);
                ears.more.notify_all();
            }
            ears.lock().ended = true;
            ears.more.notify_all();
        });
        Ok(Self { name: name.into(), port, kernel_log: kernel_log.to_owned(), heard, commands: 0 })
    }

    /// Waits until the machine has said `what`, and gives everything up to it.
    pub(crate) fn wait_for(&self, what: &str, limit: Duration) -> Result<String, LabError> {
        let waits = |said: &mut Said| !said.ended && !said.text.contains(what);
        let waited = self.heard.more.wait_timeout_while(self.heard.lock(), limit, waits);
        let (said, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match said.text.find(what) {
            Some(at) => Ok(said.text[..at + what.len()].to_owned()),
            None => Err(self.failed(&said, &format!("did not say `{what}` within {limit:?}"))),
        }
    }

    /// Runs a command in the machine's shell and gives its output; any exit code but 0 is an error. It has nobody who types.
    pub(crate) fn run(&mut self, command: &str, limit: Duration) -> Result<String, LabError> {
        self.commands += 1;
        let number = self.commands;
        let (begin, mark) = (format!("begin-{number}-.\r\n"), format!("done-{number}-"));
        let from = self.heard.lock().text.len();
        // Put together in the machine, so that the echo of the command, which may come twice, is taken for neither.
        let line = format!(
            "echo \"begin\"-{number}-.; {{ {command} ; }} < /dev/null 2>&1; echo \"done\"-{number}-$?.\n"
        );
        self.port.write_all(line.as_bytes()).doing(format_args!("writing to {}", self.name))?;
        let ends = |said: &Said| {
            let rest = said.text.get(from..)?;
            let rest = &rest[rest.find(&begin)? + begin.len()..];
            let at = rest.find(&mark)?;
            let code = rest[at + mark.len()..].split_once('.')?.0;
            Some((rest[..at].to_owned(), code.to_owned()))
        };
        let waits = |said: &mut Said| !said.ended && ends(said).is_none();
        let waited = self.heard.more.wait_timeout_while(self.heard.lock(), limit, waits);
        let (said, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match ends(&said) {
            Some((output, code)) if code == "0" => Ok(output.replace('\r', "")),
            Some((_, code)) => Err(self.failed(&said, &format!("`{command}` ended with {code}"))),
            None => Err(self.failed(&said, &format!("`{command}` did not end within {limit:?}"))),
        }
    }

    fn failed(&self, said: &Said, what: &str) -> LabError {
        let kernel = std::fs::read(&self.kernel_log).unwrap_or_default();
        let (shell, kernel) = (last_lines(&said.text), last_lines(&String::from_utf8_lossy(&kernel)));
        let name = &self.name;
        LabError::new(format!("machine {name}: {what}; its last lines:\n{shell}\nits kernel's:\n{kernel}"))
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES_SHOWN)..].join("\n")
}

impl Heard {
    fn lock(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn connect(socket: &Path) -> Result<UnixStream, LabError> {
    let started = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(port) => return Ok(port),
            Err(error) if started.elapsed() > SOCKET_WITHIN => {
                return Err(LabError::new(format!("no serial port at {}: {error}", socket.display())));
            }
            // The socket comes into being without an event that one could wait for.
            Err(_) => thread::yield_now(),
        }
    }
}
