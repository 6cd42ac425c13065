/*
 * The sector-writer: a guest whose disks and memory can be judged from outside.
 *
 *   batch:  write records -> FLUSH -> "ack"   read some back   read disk 0   check one RAM page   sleep
 *
 * Sequence n writes record (n * STRIDE) mod range, so "ack seq=N" tells everything that must be on the disk.
 * Invariant: "ack gen=G seq=N" is printed only after the FLUSH behind sequence N has completed.
 */
#include "guest.h"

#define STRIDE 1000003ul /* prime, larger than any range: walks all records before it comes back */
#define RANGE_MAX 1000000ul
#define BATCH_MAX 16ul
#define CHUNK_BYTES 16384ul
#define TICKS_PER_LINE 100ul

static struct {
    u64 verify, write;              /* disk numbers */
    u64 range, sectors, batch;      /* records, sectors of one, records between flushes */
    u64 ack_every, reads, pages, pace, span;
    u32 generation, seed;
} option;

static u64 sequence, random_state, acked_batches;
static u64 *shadow;                 /* record -> last sequence written */
static char *buffers;
static u64 (*ram)[PAGE_BYTES / 8];  /* stamped pages */
static u64 *ram_round, ram_next;
static u64 *chunk_sums, chunk_count, chunk_next, span_total, passes;

static void read_options(const char *line) {
    option.verify = option_number(line, "verify", 0);
    option.write = option_number(line, "write", 1);
    option.range = option_number(line, "range", 4096);
    option.sectors = option_number(line, "sectors", 8);
    option.batch = option_number(line, "batch", 8);
    option.ack_every = option_number(line, "ack", 4);
    option.reads = option_number(line, "reads", 2);
    option.pages = option_number(line, "pages", 256);
    option.pace = option_number(line, "pace", 5);
    option.span = option_number(line, "span", 1024) * 1024;
    option.generation = (u32)option_number(line, "gen", 1);
    option.seed = (u32)option_number(line, "seed", 1);
    if (!option.range || option.range > RANGE_MAX) fail("option: range", option.range, RANGE_MAX);
    if (!option.batch || option.batch > BATCH_MAX || option.batch > option.range) fail("option: batch", option.batch, BATCH_MAX);
    if (!option.sectors || option.sectors > 8) fail("option: sectors", option.sectors, 8);
    if (option.reads > BATCH_MAX) fail("option: reads", option.reads, BATCH_MAX);
    if (!option.ack_every) option.ack_every = 1;
}

static u64 random_number(void) {
    random_state += 0x9e3779b97f4a7c15ul;
    return mix(random_state);
}

static u64 pages_for(u64 bytes) { return (bytes + PAGE_BYTES - 1) / PAGE_BYTES; }

static void stamp(u64 page) { fill_words(ram[page], mix(page + mix(ram_round[page] + option.seed)), PAGE_BYTES / 8); }

static void check_stamp(u64 page) {
    u64 wanted = mix(page + mix(ram_round[page] + option.seed));
    for (u64 i = 0; i < PAGE_BYTES / 8; i++)
        if (ram[page][i] != wanted) fail("memory: stamp lost (page, round)", page, ram_round[page]);
}

static void prepare(void) {
    buffers = take_pages(BATCH_MAX + CHUNK_BYTES / PAGE_BYTES);
    ram = take_pages(option.pages);
    ram_round = take_pages(pages_for(option.pages * 8));
    for (u64 page = 0; page < option.pages; page++) stamp(page);
    if (option.write < disk_count) {
        struct disk *disk = &disks[option.write];
        if (disk->read_only) fail("disk: cannot write to a read-only disk", option.write, 0);
        if (disk->sectors < option.range * option.sectors) fail("disk: smaller than the range (has, needs)", disk->sectors, option.range * option.sectors);
        shadow = take_pages(pages_for(option.range * 8));
    }
    if (option.verify < disk_count) {
        u64 bytes = disks[option.verify].sectors * SECTOR_BYTES;
        chunk_count = (option.span < bytes ? option.span : bytes) / CHUNK_BYTES;
        if (chunk_count) chunk_sums = take_pages(pages_for(chunk_count * 8));
    }
}

static u64 record_of(u64 n) { return n * STRIDE % option.range; }

static void write_batch(struct disk *disk) {
    for (u64 i = 0; i < option.batch; i++) {
        u64 record = record_of(++sequence);
        struct sector *buffer = (struct sector *)(buffers + i * PAGE_BYTES);
        record_fill(buffer, option.sectors, record * option.sectors, sequence, option.generation, option.seed);
        disk_write(disk, record * option.sectors, buffer, option.sectors * SECTOR_BYTES);
        shadow[record] = sequence;
    }
    disk_kick(disk);
    disk_wait(disk);
    disk_flush(disk);
    disk_kick(disk);
    disk_wait(disk);
    if (++acked_batches % option.ack_every) return;
    put_text("ack");
    put_field("gen", option.generation);
    put_field("seq", sequence);
    put_text("\n");
}

/* One writer and no request in flight: a record holds exactly what was written last. */
static void read_back(struct disk *disk) {
    u64 records[BATCH_MAX], count = 0;
    for (u64 i = 0; i < option.reads; i++) {
        u64 record = record_of(1 + random_number() % sequence);
        records[count] = record;
        disk_read(disk, record * option.sectors, buffers + count++ * PAGE_BYTES, option.sectors * SECTOR_BYTES);
    }
    if (!count) return;
    disk_kick(disk);
    disk_wait(disk);
    for (u64 i = 0; i < count; i++)
        record_check((struct sector *)(buffers + i * PAGE_BYTES), option.sectors, records[i] * option.sectors, shadow[records[i]], option.generation, option.seed);
}

/* The first pass learns, later passes compare. */
static void verify_chunk(struct disk *disk) {
    u64 *chunk = (u64 *)(buffers + BATCH_MAX * PAGE_BYTES);
    disk_read(disk, chunk_next * (CHUNK_BYTES / SECTOR_BYTES), chunk, CHUNK_BYTES);
    disk_kick(disk);
    disk_wait(disk);
    u64 sum = span_sum(chunk_next, chunk, CHUNK_BYTES / 8);
    if (passes == 0) chunk_sums[chunk_next] = sum;
    else if (chunk_sums[chunk_next] != sum) fail("disk: content changed under a reader (chunk, sum)", chunk_next, sum);
    span_total = mix(span_total + sum);
    if (++chunk_next < chunk_count) return;
    put_text("verify");
    put_field("disk", option.verify);
    put_field("pass", ++passes);
    put_field("bytes", chunk_count * CHUNK_BYTES);
    put_text(" sum=");
    put_hex(span_total);
    put_text("\n");
    chunk_next = 0, span_total = 0;
}

static void turn_ram_page(void) {
    check_stamp(ram_next);
    ram_round[ram_next]++;
    stamp(ram_next);
    if (++ram_next == option.pages) ram_next = 0;
}

static void say_ticks(void) {
    static u64 said;
    u64 now = clock_ticks / TICKS_PER_LINE;
    if (now == said) return;
    said = now;
    put_text("tick ");
    put_number(now);
    put_text("\n");
}

void run_sector_writer(const char *command_line) {
    read_options(command_line);
    random_state = option.seed;
    disks_start(command_line);
    prepare();
    put_text("sector-writer");
    put_field("gen", option.generation);
    put_field("seed", option.seed);
    put_field("range", option.range);
    put_field("sectors", option.sectors);
    put_field("batch", option.batch);
    put_field("pages", option.pages);
    put_text(" ready\n");
    for (;;) {
        u64 next = clock_ticks + option.pace;
        if (option.write < disk_count) {
            write_batch(&disks[option.write]);
            read_back(&disks[option.write]);
        }
        if (chunk_count) verify_chunk(&disks[option.verify]);
        if (option.pages) turn_ram_page();
        say_ticks();
        sleep_until(next);
    }
}
