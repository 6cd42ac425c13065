/*
 * The clock checker: no clock of the guest may ever go back, and the time it lost while it did not run is said.
 *
 * Read in turn: the TSC, KVM's clock (system time = base + scaled TSC since), the ticks of the PIT. Every second it says
 * "clock tsc=T ns=N ticks=K". A step of KVM's clock above 100 ms is said as "gap ms=M": the guest was stopped.
 */
#include "guest.h"

#define MSR_CLOCK 0x4b564d01u
#define LEAF_SIGNATURE 0x40000000u
#define LEAF_FEATURES 0x40000001u
#define FEATURE_CLOCK (1u << 3)
#define SIGNATURE_KVM 0x4b4d564bu
#define GAP_NS 100000000ul

struct clock_page {
    u32 version, pad;
    u64 tsc, system_ns;
    u32 multiplier;
    signed char shift;
    u8 flags, pad2[2];
};
static volatile struct clock_page *page;

static void cpuid(u32 leaf, u32 *a, u32 *b) {
    u32 c = 0, d;
    *a = leaf;
    __asm__ volatile("cpuid" : "+a"(*a), "=b"(*b), "+c"(c), "=d"(d));
}

static void start_clock(void) {
    u32 a, b;
    cpuid(LEAF_SIGNATURE, &a, &b);
    if (b != SIGNATURE_KVM || a < LEAF_FEATURES) return;
    cpuid(LEAF_FEATURES, &a, &b);
    if (!(a & FEATURE_CLOCK)) return;
    page = take_pages(1);
    write_msr(MSR_CLOCK, (u64)page | 1);
}

/* As the interface says: an odd version, or one that changes, is an update under way. */
static u64 clock_ns(void) {
    for (;;) {
        u32 version = page->version;
        barrier();
        u64 delta = read_tsc() - page->tsc;
        delta = page->shift < 0 ? delta >> -page->shift : delta << page->shift;
        u64 ns = page->system_ns + (u64)(((unsigned __int128)delta * page->multiplier) >> 32);
        barrier();
        if (!(version & 1) && page->version == version) return ns;
    }
}

void run_clock(void) {
    start_clock();
    put_text("clock ready");
    put_field("kvm", page != 0);
    put_text("\n");
    u64 tsc = read_tsc(), ns = page ? clock_ns() : 0, ticks = clock_ticks, said = ticks;
    for (;;) {
        u64 tsc_now = read_tsc();
        if (tsc_now < tsc) fail("clock: the TSC went back (from, to)", tsc, tsc_now);
        tsc = tsc_now;
        u64 ns_now = page ? clock_ns() : 0;
        if (ns_now < ns) fail("clock: KVM's clock went back (from, to)", ns, ns_now);
        if (ns_now - ns > GAP_NS) {
            put_text("gap");
            put_field("ms", (ns_now - ns) / 1000000);
            put_text("\n");
        }
        ns = ns_now;
        u64 ticks_now = clock_ticks;
        if (ticks_now < ticks) fail("clock: ticks went back (from, to)", ticks, ticks_now);
        ticks = ticks_now;
        if (ticks - said < TICK_HZ) continue;
        said = ticks;
        put_text("clock");
        put_field("tsc", tsc);
        put_field("ns", ns);
        put_field("ticks", ticks);
        put_text("\n");
    }
}
