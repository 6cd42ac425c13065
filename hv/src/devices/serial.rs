//! The 8250 UART on COM1. Output goes into the console's ring; there is no input yet.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    console: Arc<Console>,
    interrupt: Arc<dyn Interrupt>,
}

impl SerialPort {
    pub(crate) fn new(console: Arc<Console>, interrupt: Arc<dyn Interrupt>) -> Self {
        let uart = Serial::new(Line(Arc::clone(&interrupt)), Output(Arc::clone(&console)));
        Self { uart: Mutex::new(uart), console, interrupt }
    }

    pub(crate) fn read(&self, register: u8) -> u8 {
        self.lock().read(register)
    }

    pub(crate) fn write(&self, register: u8, value: u8) {
        // The only failures are a full loop-back FIFO and a broken output; a real UART drops the byte, too.
        drop(self.lock().write(register, value));
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
        let line = Line(Arc::clone(&self.interrupt));
        let output = Output(Arc::clone(&self.console));
        *self.lock() = Serial::from_state(&uart, line, NoEvents, output)
            .map_err(|_| state::StateError::Invalid("the serial port's input is longer than its FIFO"))?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
