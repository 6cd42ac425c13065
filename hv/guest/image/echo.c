/*
 * The echo: reads its serial port by interrupts, and says each line that it was given, with its length.
 *
 *   line 4 --interrupt--> FIFO read until it is empty --> ring --> "heard N TEXT"
 *
 * With `deaf=N` it listens only after so many hundredths of a second: what is typed meanwhile waits.
 */
#include "guest.h"

#define COM1 0x3f8
#define INTERRUPT_ENABLE (COM1 + 1)
#define LINE_STATUS (COM1 + 5)
#define MODEM_CONTROL (COM1 + 4)
#define ENABLE_RECEIVED 1
#define DATA_READY 1
#define OUT2 8
#define LINE 4u
#define RING_BYTES 65536u
#define TEXT_BYTES 256u

static volatile u8 ring[RING_BYTES];
static volatile u32 written;
static u32 taken;

void echo_interrupt(u32 line) {
    if (line != LINE) return;
    while (in8(LINE_STATUS) & DATA_READY) {
        ring[written % RING_BYTES] = in8(COM1);
        written++;
    }
}

static void say(const char *text, u32 bytes) {
    put_text("heard ");
    put_number(bytes);
    put_text(" ");
    put_text(text);
    put_text("\n");
}

void run_echo(const char *command_line) {
    static char text[TEXT_BYTES + 1];
    u32 bytes = 0;
    u64 deaf = option_number(command_line, "deaf", 0);
    put_text("echo ready\n");
    sleep_until(clock_ticks + deaf);
    out8(MODEM_CONTROL, 3 | OUT2);
    unmask_line(LINE);
    out8(INTERRUPT_ENABLE, ENABLE_RECEIVED);
    for (;;) {
        interrupts_off();
        if (taken == written) {
            sleep_until_interrupt();
            continue;
        }
        interrupts_on();
        if (written - taken > RING_BYTES) fail("echo: more was typed than it could keep", written, taken);
        u8 byte = ring[taken++ % RING_BYTES];
        if (byte == '\r' || byte == '\n' || bytes == TEXT_BYTES) {
            text[bytes] = 0;
            say(text, bytes);
            bytes = 0;
            if (byte == '\r' || byte == '\n') continue;
        }
        text[bytes++] = (char)byte;
    }
}
