/*
 * The holder of registers: fills everything that a processor holds with a pattern, lets time pass, and compares.
 *
 *   hold.S: 14 general registers and 16 SSE registers stay loaded for `spin` loops      here: bases, debug addresses, CR2
 */
#include "guest.h"

#define GENERAL 14
#define WORDS (GENERAL + 32)
#define MSR_FS_BASE 0xc0000100u
#define MSR_GS_BASE 0xc0000101u
#define MSR_KERNEL_GS_BASE 0xc0000102u
#define ROUNDS_PER_LINE 8ul

void hold(const u64 *pattern, u64 *found, u64 spins);
static u64 pattern[WORDS] __attribute__((aligned(16))), found[WORDS] __attribute__((aligned(16)));
static const u32 bases[] = {MSR_FS_BASE, MSR_GS_BASE, MSR_KERNEL_GS_BASE};

static u64 base_of(u64 round, u32 i) { return mix(round * 4 + i) >> 20; }

static void set_others(u64 round) {
    for (u32 i = 0; i < 3; i++) write_msr(bases[i], base_of(round, i));
    __asm__ volatile("mov %0, %%dr0; mov %1, %%dr3; mov %2, %%cr2" ::"r"(base_of(round, 4)), "r"(base_of(round, 5)), "r"(base_of(round, 6)));
}

static void check_others(u64 round) {
    for (u32 i = 0; i < 3; i++)
        if (read_msr(bases[i]) != base_of(round, i)) fail("registers: a base was lost (MSR, found)", bases[i], read_msr(bases[i]));
    u64 dr0, dr3, cr2;
    __asm__ volatile("mov %%dr0, %0; mov %%dr3, %1; mov %%cr2, %2" : "=r"(dr0), "=r"(dr3), "=r"(cr2));
    if (dr0 != base_of(round, 4) || dr3 != base_of(round, 5)) fail("registers: a debug address was lost", dr0, dr3);
    if (cr2 != base_of(round, 6)) fail("registers: CR2 was lost (wanted, found)", base_of(round, 6), cr2);
}

void run_registers(const char *command_line) {
    u64 spins = option_number(command_line, "spin", 20000);
    /* SSE state is saved and restored by whoever wants it: nobody here. */
    u64 cr4;
    __asm__ volatile("mov %%cr4, %0; or $0x600, %0; mov %0, %%cr4" : "=r"(cr4));
    put_text("registers ready\n");
    for (u64 round = 1;; round++) {
        for (u32 i = 0; i < WORDS; i++) pattern[i] = mix(round * WORDS + i);
        set_others(round);
        hold(pattern, found, spins);
        for (u32 i = 0; i < WORDS; i++)
            if (found[i] != pattern[i]) fail("registers: a register was lost (number, found)", i, found[i]);
        check_others(round);
        if (round % ROUNDS_PER_LINE) continue;
        put_text("held ");
        put_number(round);
        put_text("\n");
    }
}
