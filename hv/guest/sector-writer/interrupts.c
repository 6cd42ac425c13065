/*
 * Interrupts: the two 8259 controllers in virtual-wire mode, the PIT as the clock.
 *
 *   device -> 8259 -> LINT0 of the local APIC (ExtINT) -> vector 32 + line -> on_interrupt
 */
#include "guest.h"

#define PIC1 0x20
#define PIC2 0xa0
#define END_OF_INTERRUPT 0x20
#define FIRST_LINE_VECTOR 32
#define VECTORS 48
#define PIT_HZ 1193182u
#define TICK_HZ 100u
#define LOCAL_APIC 0xfee00000ul

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
volatile u64 clock_ticks;

static void load_gates(void) {
    for (u32 i = 0; i < VECTORS; i++) {
        u64 stub = (u64)interrupt_stubs + i * 16;
        gates[i] = (struct gate){(u16)stub, 8, 0x8e00, (u16)(stub >> 16), (u32)(stub >> 32), 0};
    }
    struct __attribute__((packed)) {
        u16 limit;
        u64 base;
    } pointer = {sizeof(gates) - 1, (u64)gates};
    __asm__ volatile("lidt %0" ::"m"(pointer));
}

static void start_controllers(void) {
    out8(PIC1, 0x11), out8(PIC2, 0x11); /* edge triggered, cascade, ICW4 follows */
    out8(PIC1 + 1, FIRST_LINE_VECTOR), out8(PIC2 + 1, FIRST_LINE_VECTOR + 8);
    out8(PIC1 + 1, 4), out8(PIC2 + 1, 2);
    out8(PIC1 + 1, 1), out8(PIC2 + 1, 1);
    out8(PIC1 + 1, (u8)line_mask), out8(PIC2 + 1, (u8)(line_mask >> 8));
    *(volatile u32 *)(LOCAL_APIC + 0xf0) = 0x1ff;  /* on, spurious vector 255 */
    *(volatile u32 *)(LOCAL_APIC + 0x350) = 0x700; /* LINT0: ExtINT */
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

void on_interrupt(const struct frame *frame) {
    if (frame->vector < FIRST_LINE_VECTOR) {
        put_text("exception");
        put_field("vector", frame->vector);
        put_field("code", frame->code);
        put_text("\n");
        fail("exception at", frame->rip, frame->vector);
    }
    u32 line = (u32)frame->vector - FIRST_LINE_VECTOR;
    if (line == 0) clock_ticks++;
    else disk_interrupt(line);
    if (line >= 8) out8(PIC2, END_OF_INTERRUPT);
    out8(PIC1, END_OF_INTERRUPT);
}
