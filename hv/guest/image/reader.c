/*
 * The reader: does nothing but write to and read from ports and device registers, whose values it knows.
 *
 * Almost every instruction leaves for the VMM. A pause that does not complete such an instruction either loses the value,
 * or does the access again. The serial port in loop mode notices both: what is written comes back once, in order.
 */
#include "guest.h"

#define COM1 0x3f8
#define MODEM_CONTROL (COM1 + 4)
#define LINE_STATUS (COM1 + 5)
#define NORMAL 0x03
#define LOOP 0x13
#define DATA_READY 0x01
#define MAGIC 0x74726976u
#define READS_PER_LINE 256ul

static u64 registers_of_a_device(const char *line) {
    const char *at = option_text(line, "virtio_mmio.device", 0);
    if (!at) return 0;
    parse_number(&at);
    if (*at++ != '@') fail("reader: expected SIZE@ADDRESS:LINE", (u64)*at, 0);
    return parse_number(&at);
}

static void through_the_loop(u8 first) {
    for (u8 i = 0; i < 4; i++) out8(COM1, (u8)(first + i));
    for (u8 i = 0; i < 4; i++) {
        u8 found = in8(COM1);
        if (found == (u8)(first + i)) continue;
        out8(MODEM_CONTROL, NORMAL);
        fail("reader: a port was read or written twice, or a value lost (wanted, found)", first + i, found);
    }
    if (!(in8(LINE_STATUS) & DATA_READY)) return;
    out8(MODEM_CONTROL, NORMAL);
    fail("reader: a port was written twice", first, 0);
}

static u32 read_register(u64 address, u32 before) {
    u32 value = before;
    __asm__ volatile("movl (%1), %0" : "+a"(value) : "r"(address) : "memory");
    return value;
}

void run_reader(const char *line) {
    u64 device = registers_of_a_device(line);
    put_text("reader");
    put_field("device", device);
    put_text(" ready\n");
    for (u64 n = 1;; n++) {
        out8(MODEM_CONTROL, LOOP);
        through_the_loop((u8)mix(n));
        out8(MODEM_CONTROL, NORMAL);
        u32 magic = device ? read_register(device, (u32)n) : MAGIC;
        if (magic != MAGIC) fail("reader: a register's value was lost (wanted, found)", MAGIC, magic);
        if (n % READS_PER_LINE) continue;
        put_text("reads ");
        put_number(n);
        put_text("\n");
    }
}
