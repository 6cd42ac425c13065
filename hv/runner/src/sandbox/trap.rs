//! A forbidden call of a confined thread: its number and the kind of thread go to the log, then the process ends as by the
//! kernel's own hand.
#![expect(unsafe_code, reason = "a signal handler, which may call the kernel alone")]

use std::cell::Cell;
use std::io;
use std::mem;
use std::ptr;

use threads::Kind;

/// How the line begins that a process says last.
pub const FORBIDDEN_CALL: &str = "a forbidden system call";

thread_local! {
    /// Constant-initialised, so that a handler may read it at any time.
    static KIND: Cell<Option<Kind>> = const { Cell::new(None) };
}

/// What the handler calls the thread.
pub(super) fn this_thread_is(kind: Kind) {
    KIND.set(Some(kind));
}

/// Has forbidden calls of all threads told.
pub(super) fn install() -> io::Result<()> {
    // SAFETY: a structure of numbers; all zeros are a value of it.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = tell;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the structure is complete, and the handler calls what handlers may call.
    if unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn tell(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel hands a handler with SA_SIGINFO the registers that were interrupted.
    let registers = unsafe { &(*context).uc_mcontext.gregs };
    let call = registers[usize::try_from(libc::REG_RAX).unwrap_or(0)];
    let kind = KIND.try_with(Cell::get).ok().flatten();
    let mut line = Line::default();
    line.text(FORBIDDEN_CALL);
    line.text(", number ");
    line.number(call.unsigned_abs());
    line.text(", of a thread of kind ");
    line.text(kind.map_or("free", name));
    line.text("\n");
    // SAFETY: calls on numbers and on bytes of this stack. The second signal is held back until the handler is left; then it
    // finds no handler, and ends the process.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.used);
        libc::signal(libc::SIGSYS, libc::SIG_DFL);
        libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), libc::SIGSYS);
    }
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Vcpu => "vcpu",
        Kind::Device => "device",
        Kind::Memory => "memory",
        Kind::Ring => "ring",
        Kind::Calls => "calls",
        Kind::Tasks => "tasks",
        Kind::Ways => "ways",
        Kind::Network => "network",
        Kind::Link => "link",
        Kind::Frames => "frames",
        Kind::Accept => "accept",
        Kind::Control => "control",
        Kind::Images => "images",
        Kind::Watch => "watch",
        Kind::Main => "main",
    }
}

/// Text without memory of the heap.
#[derive(Debug)]
struct Line {
    bytes: [u8; 128],
    used: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 128], used: 0 }
    }
}

impl Line {
    fn text(&mut self, text: &str) {
        for (to, from) in self.bytes.iter_mut().skip(self.used).zip(text.bytes()) {
            *to = from;
            self.used += 1;
        }
    }

    fn number(&mut self, number: u64) {
        if number >= 10 {
            self.number(number / 10);
        }
        let digit = u8::try_from(number % 10).unwrap_or(0);
        if let Ok(digit) = std::str::from_utf8(&[b'0' + digit]) {
            self.text(digit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_text_and_numbers_and_never_too_long() {
        let mut line = Line::default();
        line.text("call ");
        line.number(1_054);
        assert_eq!(&line.bytes[..line.used], b"call 1054");
        line.text(&"x".repeat(300));
        assert_eq!(line.used, line.bytes.len());
    }
}
