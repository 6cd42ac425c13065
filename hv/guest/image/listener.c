/*
 * The listener: waits for configuration interrupts of its disks and says what it sees. A disk that has got a medium is
 * read, which shows that it works and what is on it. With `reset=S` it resets the machine when a disk has got S sectors, with
 * `off=S` it switches it off; before either it says so many `words`.
 */
#include "guest.h"

#define RESET_PORT 0x64
#define RESET_VALUE 0xfe
#define SLEEP_PORT 0x600
#define SLEEP_OFF 0x34

static u64 *sector, reset_sectors, off_sectors, words;

static void end(u16 port, u8 value) {
    for (u64 word = 1; word <= words; word++) {
        put_text("word");
        put_field("number", word);
        put_text("\n");
    }
    out8(port, value);
}

static void look(u32 index) {
    struct disk *disk = &disks[index];
    disk->changed = 0;
    u64 before = disk->sectors;
    disk->sectors = disk_capacity(disk);
    put_text("changed");
    put_field("index", index);
    put_field("from", before);
    put_field("sectors", disk->sectors);
    if (disk->sectors) {
        disk_read(disk, 0, sector, SECTOR_BYTES);
        disk_kick(disk);
        disk_wait(disk);
        put_text(" first=");
        put_hex(sector[0]);
    }
    put_text("\n");
    if (reset_sectors && disk->sectors == reset_sectors) end(RESET_PORT, RESET_VALUE);
    if (off_sectors && disk->sectors == off_sectors) end(SLEEP_PORT, SLEEP_OFF);
}

void run_listener(const char *command_line) {
    sector = take_pages(1);
    reset_sectors = option_number(command_line, "reset", 0);
    off_sectors = option_number(command_line, "off", 0);
    words = option_number(command_line, "words", 0);
    disks_start(command_line);
    put_text("listener");
    put_field("disks", disk_count);
    put_text(" ready\n");
    for (;;) {
        for (u32 index = 0; index < disk_count; index++)
            if (disks[index].changed) look(index);
        sleep_until(clock_ticks + 1);
    }
}
