/*
 * The balloon: gives pages back as it is told, takes them again, and checks every page that it holds.
 *
 *   pool:  given .......... held .......................     the target moves the border
 *          reads as zeros   stamped anew in each round
 *   free:  reported once, reads as zeros; stamped and held like the rest from then on
 *
 * A page that comes back must be empty, and one that is held must be as it was left, wherever the guest runs by then. Its line of
 * interrupts is one that the old controllers do not have, so it looks at the rings with each tick.
 */
#include "virtio.h"

#define DEVICE_BALLOON 5
#define FEATURE_STATISTICS (1u << 1)
#define FEATURE_REPORTING (1u << 5)
#define R_TARGET R_CONFIG
#define R_ACTUAL (R_CONFIG + 1)
#define WORDS (PAGE_BYTES / 8)
#define QUEUE_SIZE 8u
#define NUMBERS 256u
#define TAG_FREE 4
#define TAG_TOTAL 5

enum queues { INFLATE, DEFLATE, STATISTICS, REPORTING = 4, QUEUES };
struct queue {
    struct descriptor *descriptors;
    volatile struct avail_ring *avail;
    volatile struct used_ring *used;
    u16 seen;
};
struct __attribute__((packed)) figure {
    u16 tag;
    u64 value;
};

static volatile u32 *r;
static struct queue queues[QUEUES];
static u32 *numbers;
static struct figure *figures;
static u64 (*pool)[WORDS], pages, given, memory_end, round_number;

static void set_address(u32 at, const volatile void *address) {
    r[at] = (u32)(u64)address;
    r[at + 1] = (u32)((u64)address >> 32);
}

static void start_queue(u32 index) {
    struct queue *queue = &queues[index];
    char *page = take_pages(2);
    queue->descriptors = (struct descriptor *)page;
    queue->avail = (struct avail_ring *)(page + PAGE_BYTES / 2);
    queue->used = (struct used_ring *)(page + PAGE_BYTES);
    r[R_QUEUE_SELECT] = index;
    r[R_QUEUE_SIZE] = QUEUE_SIZE;
    set_address(R_DESCRIPTORS, queue->descriptors);
    set_address(R_AVAIL, queue->avail);
    set_address(R_USED, queue->used);
    r[R_QUEUE_READY] = 1;
}

static void find_device(const char *command_line) {
    const char *at = 0;
    while (!r && (at = option_text(command_line, "virtio_mmio.device", at))) {
        parse_number(&at);
        if (*at++ != '@') fail("balloon: expected SIZE@ADDRESS:LINE", (u64)*at, 0);
        volatile u32 *found = (volatile u32 *)parse_number(&at);
        if (found[R_MAGIC] == VIRTIO_MAGIC && found[R_DEVICE] == DEVICE_BALLOON) r = found;
    }
    if (!r) fail("balloon: no such device", 0, 0);
}

static void start_device(void) {
    u32 wanted = FEATURE_STATISTICS | FEATURE_REPORTING;
    r[R_STATUS] = 0;
    r[R_STATUS] = STATUS_ACKNOWLEDGE | STATUS_DRIVER;
    r[R_FEATURES_SELECT] = 0;
    if ((r[R_FEATURES] & wanted) != wanted) fail("balloon: features are missing", r[R_FEATURES], wanted);
    r[R_DRIVER_FEATURES_SELECT] = 0;
    r[R_DRIVER_FEATURES] = wanted;
    r[R_DRIVER_FEATURES_SELECT] = 1;
    r[R_DRIVER_FEATURES] = FEATURE_VERSION_1;
    r[R_STATUS] = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
    if (!(r[R_STATUS] & STATUS_FEATURES_OK)) fail("balloon: features refused", wanted, 0);
    start_queue(INFLATE), start_queue(DEFLATE), start_queue(STATISTICS), start_queue(REPORTING);
    r[R_STATUS] = r[R_STATUS] | STATUS_DRIVER_OK;
}

static void post(struct queue *queue, const volatile void *data, u64 bytes, u16 flags) {
    queue->descriptors[0] = (struct descriptor){(u64)data, (u32)bytes, flags, 0};
    queue->avail->ring[queue->avail->index % QUEUE_SIZE] = 0;
    barrier();
    queue->avail->index++;
    __asm__ volatile("mfence" ::: "memory");
    r[R_NOTIFY] = 0;
}

static int has_come_back(struct queue *queue) {
    if (queue->used->index == queue->seen) return 0;
    queue->seen++;
    return 1;
}

static void post_and_wait(struct queue *queue, const volatile void *data, u64 bytes, u16 flags) {
    post(queue, data, bytes, flags);
    while (!has_come_back(queue)) sleep_until(clock_ticks + 1);
}

/* The page's stamp of this round, at a place that changes with the rounds. */
static u64 *place_of(u64 page, u64 round) { return &pool[page][mix(page * 3 + round) % WORDS]; }
static u64 stamp_of(u64 page, u64 round) { return mix(page + mix(round)); }
static void stamp(u64 page, u64 round) { *place_of(page, round) = stamp_of(page, round); }

static void expect_empty(u64 page) {
    for (u64 word = 0; word < WORDS; word++)
        if (pool[page][word]) fail("balloon: a page that comes back is not empty (page, word)", page, pool[page][word]);
}

/* Hands over pages `first` to `end` of the pool, in as many requests as it takes. */
static void hand_over(u32 queue, u64 first, u64 end) {
    while (first < end) {
        u32 count = 0;
        for (; count < NUMBERS && first < end; count++, first++) numbers[count] = (u32)((u64)pool[first] / PAGE_BYTES);
        post_and_wait(&queues[queue], numbers, count * sizeof(u32), 0);
    }
}

static void follow_target(void) {
    u64 target = r[R_TARGET];
    if (target > pages) target = pages;
    if (target == given) return;
    u64 before = given;
    if (target > given) {
        given = target; /* not touched from here on */
        hand_over(INFLATE, before, target);
    } else {
        hand_over(DEFLATE, target, before);
        for (u64 page = target; page < before; page++) {
            expect_empty(page);
            stamp(page, round_number);
        }
        given = target;
    }
    r[R_ACTUAL] = (u32)given;
    put_text("balloon");
    put_field("given", given);
    put_field("held", pages - given);
    put_text("\n");
}

static void walk(void) {
    for (u64 page = given; page < pages; page++) {
        if (*place_of(page, round_number) != stamp_of(page, round_number))
            fail("balloon: a page is not as it was left (page, round)", page, round_number);
        stamp(page, round_number + 1);
    }
    round_number++;
}

static void tell_figures(void) {
    figures[0] = (struct figure){TAG_TOTAL, memory_end - given * PAGE_BYTES};
    figures[1] = (struct figure){TAG_FREE, (pages - given) * PAGE_BYTES};
    post(&queues[STATISTICS], figures, 2 * sizeof(struct figure), 0);
}

static void report_all(void) {
    for (u64 page = 0; page < pages; page++) stamp(page, 0);
    post_and_wait(&queues[REPORTING], pool, pages * PAGE_BYTES, DESCRIPTOR_WRITE);
    put_text("reported");
    put_field("pages", pages);
    put_text("\n");
    for (u64 page = 0; page < pages; page++) expect_empty(page);
}

void run_balloon(const struct boot_info *info) {
    const char *line = info->command_line;
    pages = option_number(line, "pages", 512), memory_end = info->memory_end;
    find_device(line);
    start_device();
    numbers = take_pages(1), figures = take_pages(1), pool = take_pages(pages);
    if (option_number(line, "report", 0)) report_all();
    for (u64 page = 0; page < pages; page++) stamp(page, 0);
    tell_figures();
    put_text("balloon");
    put_field("pages", pages);
    put_text(" ready\n");
    for (u64 said = clock_ticks;;) {
        follow_target();
        walk();
        if (has_come_back(&queues[STATISTICS])) tell_figures();
        if (clock_ticks - said >= TICK_HZ) {
            said = clock_ticks;
            put_text("round ");
            put_number(round_number);
            put_text("\n");
        }
        sleep_until(clock_ticks + 1);
    }
}
