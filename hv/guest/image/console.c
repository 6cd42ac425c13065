/* Lines on COM1, and the one way out when something is wrong. */
#include "guest.h"

#define COM1 0x3f8
#define LINE_STATUS (COM1 + 5)
#define TRANSMITTER_EMPTY 0x20
#define FIFO_BYTES 16
#define EXIT_PORT 0xf4

static u32 fifo_free;

void console_start(void) {
    out8(COM1 + 1, 0);    /* no interrupts */
    out8(COM1 + 3, 0x80); /* divisor: 115200 */
    out8(COM1 + 0, 1);
    out8(COM1 + 1, 0);
    out8(COM1 + 3, 3);    /* 8N1 */
    out8(COM1 + 2, 7);    /* FIFO on and empty */
    out8(COM1 + 4, 3);
    fifo_free = 0;
}

static void put_byte(char byte) {
    if (fifo_free == 0) {
        while (!(in8(LINE_STATUS) & TRANSMITTER_EMPTY)) {
        }
        fifo_free = FIFO_BYTES;
    }
    fifo_free--;
    out8(COM1, (u8)byte);
}

void put_text(const char *text) {
    for (; *text; text++) put_byte(*text);
}

void put_number(u64 value) {
    char digits[21];
    u32 at = 20;
    digits[at] = 0;
    do {
        digits[--at] = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    put_text(&digits[at]);
}

void put_hex(u64 value) {
    for (int shift = 60; shift >= 0; shift -= 4) put_byte("0123456789abcdef"[(value >> shift) & 15]);
}

void put_field(const char *name, u64 value) {
    put_text(" ");
    put_text(name);
    put_text("=");
    put_number(value);
}

void fail(const char *what, u64 a, u64 b) {
    interrupts_off();
    put_text("FAIL ");
    put_text(what);
    put_text(" ");
    put_hex(a);
    put_text(" ");
    put_hex(b);
    put_text("\n");
    out32(EXIT_PORT, 1);
    for (;;) __asm__ volatile("ud2");
}
