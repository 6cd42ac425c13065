/* What the parts of the guest know of each other, and the few instructions that C has no words for. */
#ifndef GUEST_H
#define GUEST_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define PAGE_BYTES 4096ul
#define SECTOR_BYTES 512ul

/* --- instructions --- */
static inline void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static inline u8 in8(u16 port) {
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline void fill_words(u64 *to, u64 value, u64 count) {
    __asm__ volatile("rep stosq" : "+D"(to), "+c"(count) : "a"(value) : "memory");
}
static inline u64 read_tsc(void) {
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (u64)high << 32 | low;
}
static inline u64 read_msr(u32 index) {
    u32 low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
    return (u64)high << 32 | low;
}
static inline void write_msr(u32 index, u64 value) {
    __asm__ volatile("wrmsr" ::"c"(index), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}
/* Order of writes to memory that a device reads: x86 keeps it, the compiler must too. */
static inline void barrier(void) { __asm__ volatile("" ::: "memory"); }
static inline void interrupts_off(void) { __asm__ volatile("cli" ::: "memory"); }
static inline void interrupts_on(void) { __asm__ volatile("sti" ::: "memory"); }
/* STI lets interrupts in only after the next instruction, so none can slip in before HLT. */
static inline void sleep_until_interrupt(void) { __asm__ volatile("sti; hlt" ::: "memory"); }

/* --- console.c --- */
void console_start(void);
void put_text(const char *text);
void put_number(u64 value);
void put_hex(u64 value);
void put_field(const char *name, u64 value);
/* Ends the guest with a line `FAIL what a b`. */
void fail(const char *what, u64 a, u64 b) __attribute__((noreturn));

/* --- boot.c --- */
struct boot_info {
    const char *command_line;
    u64 memory_end;
    void *module; /* the initial RAM disk, if there is one */
    u64 module_bytes;
};
void boot_read(u64 start_info, struct boot_info *info);
/* Finds `name=` on the command line; `from` is 0 or the result of the call before. Gives the text behind it, or 0. */
const char *option_text(const char *command_line, const char *name, const char *from);
u64 option_number(const char *command_line, const char *name, u64 otherwise);
u64 parse_number(const char **text);
/* Zeroed pages that are never given back. */
void *take_pages(u64 count);

/* --- interrupts.c --- */
void interrupts_start(void);
void unmask_line(u32 line);
/* What a second processor needs: the same gates, its own APIC switched on. */
void interrupts_join(void);
/* Interrupts between processors: those above the lines of the controllers. */
#define IPI_VECTOR 48u
#define IPI_KINDS 16u
extern volatile u64 ipi_received[IPI_KINDS];
void ipi_send(u32 processor, u32 kind);
/* INIT and SIPI: the processor begins at `page` in real mode. */
void processor_start(u32 processor, u64 page);
#define TICK_HZ 100u
extern volatile u64 clock_ticks; /* TICK_HZ a second */
/* Sleeps until that tick; returns at once when it is over. */
void sleep_until(u64 tick);

/* --- disk.c --- */
#define DISKS_MAX 8
#define REQUESTS_MAX 32
struct disk {
    volatile u32 *registers;
    u64 sectors;
    u32 line;
    u32 read_only;
    u32 in_flight;
    u32 queue_size;
    struct descriptor *descriptors;
    volatile struct avail_ring *avail;
    volatile struct used_ring *used;
    struct request *requests;
    u16 used_seen;
    u16 told;             /* the device knows of requests up to here */
    u32 has_event_index; /* either side is told from where on it wants to hear */
    volatile u32 changed; /* a configuration interrupt came */
    u8 busy[REQUESTS_MAX];
};
extern struct disk disks[DISKS_MAX];
extern u32 disk_count;
void disks_start(const char *command_line);
/* Capacity now, read between two equal generations. */
u64 disk_capacity(struct disk *disk);
void disk_interrupt(u32 line);
/* Queues a request; the device learns of it with disk_kick. */
void disk_read(struct disk *disk, u64 sector, void *into, u64 bytes);
void disk_write(struct disk *disk, u64 sector, const void *from, u64 bytes);
void disk_flush(struct disk *disk);
void disk_kick(struct disk *disk);
/* Sleeps until all queued requests are done; any failure ends the guest. */
void disk_wait(struct disk *disk);

/* --- echo.c --- */
void echo_interrupt(u32 line);

/* --- record.c --- */
struct sector {
    u64 magic;
    u64 lba;
    u64 sequence;
    u32 generation;
    u32 seed;
    u64 pattern;
    u64 checksum;
    u64 payload[58];
};
_Static_assert(sizeof(struct sector) == SECTOR_BYTES, "a sector describes itself");
u64 mix(u64 x);
void record_fill(struct sector *sectors, u64 count, u64 lba, u64 sequence, u32 generation, u32 seed);
void record_check(const struct sector *sectors, u64 count, u64 lba, u64 sequence, u32 generation, u32 seed);
u64 span_sum(u64 sum, const u64 *words, u64 count);

/* --- roles: what the guest does, chosen by `role=`; none returns --- */
void run_sector_writer(const char *command_line) __attribute__((noreturn));
void run_dirtier(const struct boot_info *info) __attribute__((noreturn));
void run_clock(void) __attribute__((noreturn));
void run_reader(const char *command_line) __attribute__((noreturn));
void run_ping_pong(void) __attribute__((noreturn));
void run_listener(const char *command_line) __attribute__((noreturn));
void run_echo(const char *command_line) __attribute__((noreturn));
void run_balloon(const struct boot_info *info) __attribute__((noreturn));
void run_registers(const char *command_line) __attribute__((noreturn));

#endif
