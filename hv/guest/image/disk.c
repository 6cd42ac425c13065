/*
 * virtio-blk over virtio-mmio (version 2): one queue a disk, three descriptors a request, completion by interrupt. Where the device has
 * the ring event index, it interrupts for the last request of those in flight, and is notified when it wants to be.
 */
#include "guest.h"
#include "virtio.h"

#define DEVICE_BLOCK 2
#define FEATURE_READ_ONLY (1u << 5)
#define FEATURE_FLUSH (1u << 9)
#define REQUEST_READ 0
#define REQUEST_WRITE 1
#define REQUEST_FLUSH 4

struct request {
    u32 kind, reserved;
    u64 sector;
    volatile u8 status;
    u8 padding[15];
};

struct disk disks[DISKS_MAX];
u32 disk_count;

static void set_address(struct disk *disk, u32 at, const volatile void *address) {
    disk->registers[at] = (u32)(u64)address;
    disk->registers[at + 1] = (u32)((u64)address >> 32);
}

static void negotiate(struct disk *disk) {
    volatile u32 *r = disk->registers;
    r[R_STATUS] = 0;
    r[R_STATUS] = STATUS_ACKNOWLEDGE;
    r[R_STATUS] = STATUS_ACKNOWLEDGE | STATUS_DRIVER;
    r[R_FEATURES_SELECT] = 0;
    u32 offered = r[R_FEATURES];
    disk->read_only = (offered & FEATURE_READ_ONLY) != 0;
    r[R_DRIVER_FEATURES_SELECT] = 0;
    r[R_DRIVER_FEATURES] = offered & (FEATURE_READ_ONLY | FEATURE_FLUSH | FEATURE_EVENT_INDEX);
    disk->has_event_index = (offered & FEATURE_EVENT_INDEX) != 0;
    r[R_DRIVER_FEATURES_SELECT] = 1;
    r[R_DRIVER_FEATURES] = FEATURE_VERSION_1;
    r[R_STATUS] = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
    if (!(r[R_STATUS] & STATUS_FEATURES_OK)) fail("disk: features refused", (u64)r, offered);
}

static void start_queue(struct disk *disk) {
    volatile u32 *r = disk->registers;
    r[R_QUEUE_SELECT] = 0;
    u32 size = 1;
    while (size < 128 && size * 2 <= r[R_QUEUE_MAX]) size *= 2;
    if (size < 4) fail("disk: queue too small", (u64)r, size);
    disk->queue_size = size;
    char *page = take_pages(3);
    disk->descriptors = (struct descriptor *)page;
    disk->avail = (struct avail_ring *)(page + PAGE_BYTES / 2);
    disk->used = (struct used_ring *)(page + PAGE_BYTES);
    disk->requests = (struct request *)(page + 2 * PAGE_BYTES);
    r[R_QUEUE_SIZE] = size;
    set_address(disk, R_DESCRIPTORS, disk->descriptors);
    set_address(disk, R_AVAIL, disk->avail);
    set_address(disk, R_USED, disk->used);
    r[R_QUEUE_READY] = 1;
    r[R_STATUS] = r[R_STATUS] | STATUS_DRIVER_OK;
}

u64 disk_capacity(struct disk *disk) {
    volatile u32 *r = disk->registers;
    for (;;) {
        u32 generation = r[R_GENERATION];
        u64 sectors = r[R_CONFIG] | (u64)r[R_CONFIG + 1] << 32;
        if (r[R_GENERATION] == generation) return sectors;
    }
}

static void start_disk(u64 registers, u32 line) {
    struct disk *disk = &disks[disk_count];
    disk->registers = (volatile u32 *)registers;
    disk->line = line;
    volatile u32 *r = disk->registers;
    if (r[R_MAGIC] != VIRTIO_MAGIC || r[R_VERSION] != 2) fail("disk: no virtio-mmio version 2 at", registers, r[R_VERSION]);
    if (r[R_DEVICE] != DEVICE_BLOCK) return;
    disk_count++;
    negotiate(disk);
    start_queue(disk);
    disk->sectors = disk_capacity(disk);
    unmask_line(line);
    put_text("disk");
    put_field("index", disk_count - 1);
    put_field("sectors", disk->sectors);
    put_field("read_only", disk->read_only);
    put_text("\n");
}

/* Devices are named on the command line, as for Linux: virtio_mmio.device=SIZE@ADDRESS:LINE */
void disks_start(const char *command_line) {
    const char *at = 0;
    while ((at = option_text(command_line, "virtio_mmio.device", at)) && disk_count < DISKS_MAX) {
        parse_number(&at);
        if (*at++ != '@') fail("disk: expected SIZE@ADDRESS:LINE", (u64)*at, 0);
        u64 registers = parse_number(&at);
        if (*at++ != ':') fail("disk: expected ADDRESS:LINE", registers, 0);
        start_disk(registers, (u32)parse_number(&at));
    }
}

static void submit(struct disk *disk, u32 kind, u64 sector, const void *data, u64 bytes, u16 data_flags) {
    u32 slots = disk->queue_size / 3 < REQUESTS_MAX ? disk->queue_size / 3 : REQUESTS_MAX, slot = 0;
    while (slot < slots && disk->busy[slot]) slot++;
    if (slot == slots) fail("disk: more requests than slots", disk->in_flight, slots);
    disk->busy[slot] = 1;
    disk->in_flight++;

    struct request *request = &disk->requests[slot];
    request->kind = kind, request->sector = sector, request->status = 0xff;
    u16 head = (u16)(slot * 3), status_at = (u16)(head + (bytes ? 2 : 1));
    struct descriptor *d = disk->descriptors;
    d[head] = (struct descriptor){(u64)request, 16, DESCRIPTOR_NEXT, (u16)(head + 1)};
    if (bytes) d[head + 1] = (struct descriptor){(u64)data, (u32)bytes, DESCRIPTOR_NEXT | data_flags, status_at};
    d[status_at] = (struct descriptor){(u64)&request->status, 1, DESCRIPTOR_WRITE, 0};

    disk->avail->ring[disk->avail->index & (disk->queue_size - 1)] = head;
    barrier();
    disk->avail->index++;
}

void disk_read(struct disk *disk, u64 sector, void *into, u64 bytes) {
    submit(disk, REQUEST_READ, sector, into, bytes, DESCRIPTOR_WRITE);
}

void disk_write(struct disk *disk, u64 sector, const void *from, u64 bytes) {
    submit(disk, REQUEST_WRITE, sector, from, bytes, 0);
}

void disk_flush(struct disk *disk) { submit(disk, REQUEST_FLUSH, 0, 0, 0, 0); }

static void full_barrier(void) { __asm__ volatile("mfence" ::: "memory"); }

/* Where the device wants to hear of requests lies behind its ring. */
static int device_wants_to_hear(struct disk *disk) {
    if (!disk->has_event_index) return 1;
    u16 index = disk->avail->index, from = *(volatile u16 *)&disk->used->ring[disk->queue_size];
    return (u16)(index - from - 1) < (u16)(index - disk->told);
}

void disk_kick(struct disk *disk) {
    full_barrier();
    if (device_wants_to_hear(disk)) disk->registers[R_NOTIFY] = 0;
    disk->told = disk->avail->index;
}

static void collect(struct disk *disk) {
    while (disk->used_seen != disk->used->index) {
        barrier();
        u32 head = disk->used->ring[disk->used_seen & (disk->queue_size - 1)].id, slot = head / 3;
        disk->used_seen++;
        if (head % 3 || slot >= REQUESTS_MAX || !disk->busy[slot]) fail("disk: completion of no request", head, 0);
        struct request *request = &disk->requests[slot];
        if (request->status) fail("disk: request failed (kind and status, sector)", request->kind << 8 | request->status, request->sector);
        disk->busy[slot] = 0;
        disk->in_flight--;
    }
}

/* Asks for an interrupt when all is done; what was done before the device could see that is taken at once. */
static void ask_for_interrupt(struct disk *disk) {
    if (!disk->has_event_index) return;
    disk->avail->ring[disk->queue_size] = (u16)(disk->used_seen + disk->in_flight - 1);
    full_barrier();
    collect(disk);
}

void disk_wait(struct disk *disk) {
    for (;;) {
        interrupts_off();
        collect(disk);
        ask_for_interrupt(disk);
        if (!disk->in_flight) break;
        sleep_until_interrupt();
    }
    interrupts_on();
}

void disk_interrupt(u32 line) {
    for (u32 i = 0; i < disk_count; i++) {
        if (disks[i].line != line) continue;
        u32 pending = disks[i].registers[R_INTERRUPT];
        if (pending) disks[i].registers[R_INTERRUPT_ACK] = pending;
        if (pending & INTERRUPT_CONFIG) disks[i].changed = 1;
    }
}
