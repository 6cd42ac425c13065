//! The 16550A on COM1. Output goes into the console's ring; input waits in the receive FIFO until the guest reads it.
//!
//! ```text
//!   who types --as much as fits--> FIFO (64 bytes), line 4 when the guest wants to hear of it --> guest
//!        ^---- waits for room ------'
//! ```
//! **Invariant:** nothing that was taken is lost unless the guest clears its FIFO, and nothing is taken that has no room: what does
//! not fit stays with whoever types.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vm_superio::Serial;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, SerialState};

use crate::console::Console;
use crate::devices::Interrupt;
use crate::state;

/// First of the eight ports of COM1.
pub(crate) const COM1: u16 = 0x3f8;
/// Its interrupt line.
pub(crate) const COM1_LINE: u32 = 4;

const DATA: u8 = 0;
const FIFO_CONTROL: u8 = 2;
const MODEM_CONTROL: u8 = 4;
/// Of FIFO control: what was received and not read is dropped.
const CLEAR_RECEIVED: u8 = 1 << 1;
/// Of line status.
const DATA_READY: u8 = 1;
/// Of modem control: the port hears itself alone.
const LOOP_BACK: u8 = 1 << 4;
/// Of interrupt identification: something was received; nothing has happened.
const RECEIVED: u8 = 1 << 2;
const NOTHING: u8 = 1;

#[derive(Debug)]
struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.trigger();
        Ok(())
    }
}

#[derive(Debug)]
struct Output(Arc<Console>);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.append(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Uart = Serial<Line, NoEvents, Output>;

/// COM1.
pub(crate) struct SerialPort {
    uart: Mutex<Uart>,
    /// There is room for input that was not there before.
    room: Condvar,
    console: Arc<Console>,
    interrupt: Arc<dyn Interrupt>,
}

impl SerialPort {
    pub(crate) fn new(console: Arc<Console>, interrupt: Arc<dyn Interrupt>) -> Self {
        let uart = Serial::new(Line(Arc::clone(&interrupt)), Output(Arc::clone(&console)));
        Self { uart: Mutex::new(uart), room: Condvar::new(), console, interrupt }
    }

    pub(crate) fn read(&self, register: u8) -> u8 {
        let mut uart = self.lock();
        let full = uart.fifo_capacity() == 0;
        let value = uart.read(register);
        if full && register == DATA {
            self.room.notify_all();
        }
        value
    }

    pub(crate) fn write(&self, register: u8, value: u8) {
        let mut uart = self.lock();
        // The only failures are a full loop-back FIFO and a broken output; a real UART drops the byte, too.
        drop(uart.write(register, value));
        match register {
            FIFO_CONTROL if value & CLEAR_RECEIVED != 0 => self.clear_received(&mut uart),
            MODEM_CONTROL if value & LOOP_BACK == 0 => self.room.notify_all(),
            _ => {}
        }
    }

    /// The library's port does not know of this.
    fn clear_received(&self, uart: &mut Uart) {
        let mut state = uart.state();
        state.in_buffer.clear();
        state.line_status &= !DATA_READY;
        state.interrupt_identification &= !RECEIVED;
        if state.interrupt_identification == 0 {
            state.interrupt_identification = NOTHING;
        }
        *uart = self.of_state(&state).expect("an empty FIFO is not too long");
        self.room.notify_all();
    }

    /// Puts input into the FIFO as far as there is room, for which it waits up to `limit`; gives how many bytes were taken.
    pub(crate) fn receive(&self, bytes: &[u8], limit: Duration) -> usize {
        if bytes.is_empty() {
            return 0;
        }
        let no_room =
            |uart: &mut Uart| uart.fifo_capacity() == 0 || uart.state().modem_control & LOOP_BACK != 0;
        let waited = self.room.wait_timeout_while(self.lock(), limit, no_room);
        let (mut uart, _) = waited.unwrap_or_else(PoisonError::into_inner);
        // Fails only where there is no room still.
        uart.enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    fn of_state(&self, state: &SerialState) -> Option<Uart> {
        let (line, output) = (Line(Arc::clone(&self.interrupt)), Output(Arc::clone(&self.console)));
        Serial::from_state(state, line, NoEvents, output).ok()
    }

    pub(crate) fn save(&self) -> state::Serial {
        let uart = self.lock().state();
        state::Serial {
            divisor_low: uart.baud_divisor_low.into(),
            divisor_high: uart.baud_divisor_high.into(),
            interrupt_enable: uart.interrupt_enable.into(),
            interrupt_identification: uart.interrupt_identification.into(),
            line_control: uart.line_control.into(),
            line_status: uart.line_status.into(),
            modem_control: uart.modem_control.into(),
            modem_status: uart.modem_status.into(),
            scratch: uart.scratch.into(),
            received: uart.in_buffer,
        }
    }

    pub(crate) fn restore(&self, saved: &state::Serial) -> Result<(), state::StateError> {
        let uart = SerialState {
            baud_divisor_low: state::byte(saved.divisor_low)?,
            baud_divisor_high: state::byte(saved.divisor_high)?,
            interrupt_enable: state::byte(saved.interrupt_enable)?,
            interrupt_identification: state::byte(saved.interrupt_identification)?,
            line_control: state::byte(saved.line_control)?,
            line_status: state::byte(saved.line_status)?,
            modem_control: state::byte(saved.modem_control)?,
            modem_status: state::byte(saved.modem_status)?,
            scratch: state::byte(saved.scratch)?,
            in_buffer: saved.received.clone(),
        };
        *self.lock() = self
            .of_state(&uart)
            .ok_or(state::StateError::Invalid("the serial port's input is longer than its FIFO"))?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const INTERRUPT_ENABLE: u8 = 1;
    const LINE_STATUS: u8 = 5;
    const FIFO_BYTES: usize = 64;
    /// Only a hang reaches it.
    const LONG: Duration = Duration::from_secs(60);

    #[derive(Debug, Default)]
    struct Counted(AtomicU32);

    impl Interrupt for Counted {
        fn trigger(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn port() -> (SerialPort, Arc<Counted>) {
        let interrupt = Arc::new(Counted::default());
        (SerialPort::new(Arc::new(Console::new(64)), interrupt.clone()), interrupt)
    }

    fn count(interrupt: &Counted) -> u32 {
        interrupt.0.load(Ordering::SeqCst)
    }

    fn read_all(port: &SerialPort) -> Vec<u8> {
        let mut bytes = Vec::new();
        while port.read(LINE_STATUS) & DATA_READY != 0 {
            bytes.push(port.read(DATA));
        }
        bytes
    }

    #[test]
    fn a_guest_hears_of_input_once_it_wants_to_and_reads_it_in_order() {
        let (port, interrupt) = port();
        assert_eq!(port.receive(b"root", Duration::ZERO), 4);
        assert_eq!((count(&interrupt), port.read(LINE_STATUS) & DATA_READY), (0, 1), "it may look by itself");
        port.write(INTERRUPT_ENABLE, 1);
        assert_eq!(count(&interrupt), 1, "as soon as it is enabled, as what waits is still there");
        assert_eq!(port.read(FIFO_CONTROL) & 0xf, 4, "the reason is received data");
        assert_eq!(read_all(&port), b"root");
        assert_eq!(port.receive(b"x", Duration::ZERO), 1);
        assert_eq!((count(&interrupt), read_all(&port)), (2, b"x".to_vec()));
    }

    #[test]
    fn what_has_no_room_stays_with_who_types_and_goes_on_when_there_is_some() {
        let (port, _) = port();
        let long: Vec<u8> = (0..=255).collect();
        assert_eq!(port.receive(&long, Duration::ZERO), FIFO_BYTES);
        assert_eq!(port.receive(&long, Duration::ZERO), 0);
        std::thread::scope(|scope| {
            let typing = scope.spawn(|| port.receive(b"more", LONG));
            assert_eq!(port.read(DATA), 0);
            let taken = typing.join().expect("it does not panic");
            assert!((1..=4).contains(&taken));
        });
        assert_eq!(read_all(&port)[..FIFO_BYTES - 1], long[1..FIFO_BYTES]);
        assert_eq!(port.receive(b"", Duration::ZERO), 0);
    }

    #[test]
    fn a_guest_that_clears_its_fifo_has_no_input_and_room_for_new() {
        let (port, _) = port();
        port.write(INTERRUPT_ENABLE, 1);
        assert_eq!(port.receive(&[7; FIFO_BYTES], Duration::ZERO), FIFO_BYTES);
        std::thread::scope(|scope| {
            let typing = scope.spawn(|| port.receive(b"new", LONG));
            port.write(FIFO_CONTROL, 1 | CLEAR_RECEIVED);
            assert_eq!(typing.join().expect("it does not panic"), 3);
        });
        assert_eq!(read_all(&port), b"new");
        port.write(FIFO_CONTROL, 1 | CLEAR_RECEIVED);
        assert_eq!(port.read(FIFO_CONTROL) & 0xf, NOTHING, "there is no reason any more");
    }

    #[test]
    fn a_port_that_hears_itself_alone_takes_no_input() {
        let (port, _) = port();
        port.write(MODEM_CONTROL, LOOP_BACK);
        port.write(DATA, b'l');
        assert_eq!(port.receive(b"typed", Duration::ZERO), 0);
        assert_eq!(read_all(&port), b"l");
        std::thread::scope(|scope| {
            let typing = scope.spawn(|| port.receive(b"typed", LONG));
            port.write(MODEM_CONTROL, 0);
            assert_eq!(typing.join().expect("it does not panic"), 5);
        });
        assert_eq!(read_all(&port), b"typed");
    }

    #[test]
    fn input_that_was_not_read_goes_along_with_a_move() {
        let (port, other) = (port().0, port());
        port.write(INTERRUPT_ENABLE, 1);
        assert_eq!(port.receive(b"half", Duration::ZERO), 4);
        let (other, interrupt) = other;
        other.restore(&port.save()).expect("it was just saved");
        assert_eq!((count(&interrupt), read_all(&other)), (1, b"half".to_vec()));
    }
}
