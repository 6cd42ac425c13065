/* What the loader left: the command line and the memory map. And memory for the guest's tables. */
#include "guest.h"

struct start_info {
    u32 magic, version, flags, modules;
    u64 module_list, command_line, rsdp, memory_map;
    u32 memory_map_entries, reserved;
};
struct memory_map_entry {
    u64 start, bytes;
    u32 kind, reserved;
};
struct module_entry {
    u64 start, bytes, command_line, reserved;
};
#define START_INFO_MAGIC 0x336ec578u
#define KIND_RAM 1

extern char image_end[];
static u64 next_page, memory_end;

void boot_read(u64 start_info, struct boot_info *info) {
    const struct start_info *start = (const struct start_info *)start_info;
    if (start->magic != START_INFO_MAGIC) fail("boot: no PVH start info", start_info, start->magic);
    info->command_line = start->command_line ? (const char *)start->command_line : "";
    const struct memory_map_entry *map = (const struct memory_map_entry *)start->memory_map;
    next_page = ((u64)image_end + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1);
    for (u32 i = 0; i < start->memory_map_entries; i++)
        if (map[i].kind == KIND_RAM && map[i].start <= next_page && next_page < map[i].start + map[i].bytes)
            memory_end = map[i].start + map[i].bytes;
    if (memory_end > 0xc0000000ul) memory_end = 0xc0000000ul;
    if (!memory_end) fail("boot: no RAM behind the image", next_page, start->memory_map_entries);
    if (start->modules) {
        const struct module_entry *first = (const struct module_entry *)start->module_list;
        info->module = (void *)first->start, info->module_bytes = first->bytes;
        /* Loaders put it at the end of RAM: the pages that are given out end before it. */
        if (first->start >= next_page && first->start < memory_end) memory_end = first->start;
    }
    info->memory_end = memory_end;
}

void *take_pages(u64 count) {
    u64 start = next_page;
    if (count > (memory_end - start) / PAGE_BYTES) fail("boot: out of memory for pages", count, start);
    next_page += count * PAGE_BYTES;
    fill_words((u64 *)start, 0, count * PAGE_BYTES / 8);
    return (void *)start;
}

const char *option_text(const char *command_line, const char *name, const char *from) {
    const char *at = from ? from : command_line;
    for (int fresh = !from || at == command_line; *at; at++) {
        if (fresh) {
            const char *word = at, *wanted = name;
            while (*wanted && *word == *wanted) word++, wanted++;
            if (!*wanted && *word == '=') return word + 1;
        }
        fresh = *at == ' ';
    }
    return 0;
}

u64 parse_number(const char **text) {
    const char *at = *text;
    u64 value = 0, base = 10;
    if (at[0] == '0' && at[1] == 'x') base = 16, at += 2;
    for (;; at++) {
        u64 digit;
        if (*at >= '0' && *at <= '9') digit = (u64)(*at - '0');
        else if (base == 16 && *at >= 'a' && *at <= 'f') digit = (u64)(*at - 'a') + 10;
        else break;
        value = value * base + digit;
    }
    if (*at == 'K' || *at == 'k') value <<= 10, at++;
    else if (*at == 'M') value <<= 20, at++;
    *text = at;
    return value;
}

u64 option_number(const char *command_line, const char *name, u64 otherwise) {
    const char *text = option_text(command_line, name, 0);
    return text ? parse_number(&text) : otherwise;
}
