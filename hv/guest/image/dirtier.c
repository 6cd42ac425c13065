/*
 * The dirtier: writes to a working set of pages at a set rate, and checks every page that it comes back to.
 *
 *   walk:  check the page's last stamp -> stamp it with the next round -> next page       sleep when ahead of the rate
 *
 * A page that a move loses, or brings in an older state, is noticed when the walk comes back to it. One pass over the set
 * ends with "pass N pages=P". Every second it says "dirtied KiB=K ms=M", from which its slowdown can be told.
 */
#include "guest.h"

#define WORDS (PAGE_BYTES / 8)
#define PAGES_PER_LOOK 16ul
#define TICK_MS (1000u / TICK_HZ)

static u64 seed, noise;

/* Where in the page this round's stamp goes: all of a page is used in the course of time. */
static u64 place_of(u64 page, u64 round) { return mix(page * 3 + round) % WORDS; }
static u64 stamp_of(u64 page, u64 round) { return mix(page + mix(round + seed)); }

static void fill(u64 (*set)[WORDS], u64 pages) {
    for (u64 page = 0; page < pages; page++) {
        if (noise)
            for (u64 word = 0; word < WORDS; word++) set[page][word] = mix(page * WORDS + word + seed);
        set[page][place_of(page, 0)] = stamp_of(page, 0);
    }
}

static void turn(u64 (*set)[WORDS], u64 page, u64 round) {
    u64 found = set[page][place_of(page, round)], wanted = stamp_of(page, round);
    if (found != wanted) fail("memory: a page is not as it was left (page, round)", page, round);
    set[page][place_of(page, round + 1)] = stamp_of(page, round + 1);
}

static void say(u64 pages, u64 ticks) {
    put_text("dirtied");
    put_field("KiB", pages * (PAGE_BYTES / 1024));
    put_field("ms", ticks * TICK_MS);
    put_text("\n");
}

/* Pages that may have been written by now at `rate` KiB a second; without a rate no bound. */
static u64 allowed(u64 rate, u64 ticks) { return rate ? rate * ticks * 1024 / TICK_HZ / PAGE_BYTES : ~0ul; }

/* The set: pages of its own, or the initial RAM disk, whose content the loader has brought: this KVM fills 4 MiB/s. */
static void *find_set(const struct boot_info *info, u64 bytes) {
    if (!option_number(info->command_line, "module", 0)) {
        if (bytes >= info->memory_end) fail("option: set does not fit into memory", bytes, info->memory_end);
        return take_pages(bytes / PAGE_BYTES);
    }
    u64 start = ((u64)info->module + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1);
    if (start + bytes > (u64)info->module + info->module_bytes)
        fail("option: set does not fit into the initial RAM disk", bytes, info->module_bytes);
    return (void *)start;
}

void run_dirtier(const struct boot_info *info) {
    const char *line = info->command_line;
    u64 set_bytes = option_number(line, "set", 8) << 20, rate = option_number(line, "rate", 0);
    u64 pages = set_bytes / PAGE_BYTES, round = 0, written = 0, said = 0, page = 0;
    seed = option_number(line, "seed", 1), noise = option_number(line, "noise", 0);
    if (!pages) fail("option: set is empty", 0, 0);
    u64(*set)[WORDS] = find_set(info, set_bytes);
    fill(set, pages);
    put_text("dirtier");
    put_field("pages", pages);
    put_field("rate", rate);
    put_text(" ready\n");
    for (u64 start = clock_ticks, last = start;;) {
        while (written + PAGES_PER_LOOK > allowed(rate, clock_ticks - start)) sleep_until(clock_ticks + 1);
        for (u64 i = 0; i < PAGES_PER_LOOK; i++) {
            turn(set, page, round);
            written++;
            if (++page < pages) continue;
            page = 0, round++;
            put_text("pass ");
            put_number(round);
            put_field("pages", pages);
            put_text("\n");
        }
        if (clock_ticks - last < TICK_HZ) continue;
        say(written - said, clock_ticks - last);
        last = clock_ticks, said = written;
    }
}
