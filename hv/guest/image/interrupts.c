/*
 * Interrupts: the two 8259 controllers in virtual-wire mode, the PIT as the clock.
 *
 *   device -> 8259 -> LINT0 of the local APIC (ExtINT) -> vector 32 + line -> on_interrupt
 *   processor -> command register of its APIC -> the other's APIC -> vector 48 + kind -> on_interrupt
 */
#include "guest.h"

#define PIC1 0x20
#define PIC2 0xa0
#define END_OF_INTERRUPT 0x20
#define FIRST_LINE_VECTOR 32
#define VECTORS (IPI_VECTOR + IPI_KINDS)
#define PIT_HZ 1193182u
#define LOCAL_APIC 0xfee00000ul
#define APIC_EOI 0xb0
#define APIC_SPURIOUS 0xf0
#define APIC_COMMAND 0x300
#define APIC_DESTINATION 0x310
#define APIC_LINT0 0x350
#define COMMAND_INIT 0x4500u
#define COMMAND_START 0x4600u
#define COMMAND_FIXED 0x4000u
#define COMMAND_PENDING 0x1000u

struct gate {
    u16 offset_low, selector, type, offset_middle;
    u32 offset_high, reserved;
};
struct frame {
    u64 registers[15];
    u64 vector, code, rip, cs, flags, rsp, ss;
};

extern char interrupt_stubs[];
static struct gate gates[VECTORS];
static u16 line_mask = 0xfffb; /* all masked, but for the cascade */
volatile u64 clock_ticks, ipi_received[IPI_KINDS];

static volatile u32 *apic(u32 at) { return (volatile u32 *)(LOCAL_APIC + at); }

static void load_table(void) {
    struct __attribute__((packed)) {
        u16 limit;
        u64 base;
    } pointer = {sizeof(gates) - 1, (u64)gates};
    __asm__ volatile("lidt %0" ::"m"(pointer));
}

static void load_gates(void) {
    for (u32 i = 0; i < VECTORS; i++) {
        u64 stub = (u64)interrupt_stubs + i * 16;
        gates[i] = (struct gate){(u16)stub, 8, 0x8e00, (u16)(stub >> 16), (u32)(stub >> 32), 0};
    }
    load_table();
}

static void start_controllers(void) {
    out8(PIC1, 0x11), out8(PIC2, 0x11); /* edge triggered, cascade, ICW4 follows */
    out8(PIC1 + 1, FIRST_LINE_VECTOR), out8(PIC2 + 1, FIRST_LINE_VECTOR + 8);
    out8(PIC1 + 1, 4), out8(PIC2 + 1, 2);
    out8(PIC1 + 1, 1), out8(PIC2 + 1, 1);
    out8(PIC1 + 1, (u8)line_mask), out8(PIC2 + 1, (u8)(line_mask >> 8));
    *apic(APIC_SPURIOUS) = 0x1ff; /* on, spurious vector 255 */
    *apic(APIC_LINT0) = 0x700;    /* ExtINT */
}

void interrupts_join(void) {
    load_table();
    *apic(APIC_SPURIOUS) = 0x1ff;
}

static void command(u32 processor, u32 what) {
    while (*apic(APIC_COMMAND) & COMMAND_PENDING) {
    }
    *apic(APIC_DESTINATION) = processor << 24;
    *apic(APIC_COMMAND) = what;
}

void ipi_send(u32 processor, u32 kind) { command(processor, COMMAND_FIXED | (IPI_VECTOR + kind)); }

void processor_start(u32 processor, u64 page) {
    command(processor, COMMAND_INIT);
    sleep_until(clock_ticks + 2);
    command(processor, COMMAND_START | (u32)(page / PAGE_BYTES));
}

void unmask_line(u32 line) {
    line_mask &= (u16)~(1u << line);
    out8(PIC1 + 1, (u8)line_mask), out8(PIC2 + 1, (u8)(line_mask >> 8));
}

void interrupts_start(void) {
    load_gates();
    start_controllers();
    out8(0x43, 0x34); /* channel 0, both bytes, rate generator */
    out8(0x40, (u8)(PIT_HZ / TICK_HZ)), out8(0x40, (u8)((PIT_HZ / TICK_HZ) >> 8));
    unmask_line(0);
    interrupts_on();
}

void sleep_until(u64 tick) {
    for (;;) {
        interrupts_off();
        if (clock_ticks >= tick) break;
        sleep_until_interrupt();
    }
    interrupts_on();
}

void on_interrupt(const struct frame *frame) {
    if (frame->vector < FIRST_LINE_VECTOR) {
        put_text("exception");
        put_field("vector", frame->vector);
        put_field("code", frame->code);
        put_text("\n");
        fail("exception at", frame->rip, frame->vector);
    }
    if (frame->vector >= IPI_VECTOR) {
        ipi_received[frame->vector - IPI_VECTOR]++;
        *apic(APIC_EOI) = 0;
        return;
    }
    u32 line = (u32)frame->vector - FIRST_LINE_VECTOR;
    if (line == 0) clock_ticks++;
    else disk_interrupt(line), echo_interrupt(line);
    if (line >= 8) out8(PIC2, END_OF_INTERRUPT);
    out8(PIC1, END_OF_INTERRUPT);
}
