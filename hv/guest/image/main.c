/* One image, many guests: `role=` on the command line says which. */
#include "guest.h"

static int is_word(const char *text, const char *word) {
    while (*word && *text == *word) text++, word++;
    return !*word && (!*text || *text == ' ');
}

void guest_main(u64 start_info) {
    struct boot_info info = {0};
    console_start();
    boot_read(start_info, &info);
    interrupts_start();
    const char *role = option_text(info.command_line, "role", 0);
    if (!role || is_word(role, "sector-writer")) run_sector_writer(info.command_line);
    if (is_word(role, "dirtier")) run_dirtier(&info);
    if (is_word(role, "clock")) run_clock();
    if (is_word(role, "reader")) run_reader(info.command_line);
    if (is_word(role, "ping-pong")) run_ping_pong();
    if (is_word(role, "listener")) run_listener(info.command_line);
    if (is_word(role, "echo")) run_echo(info.command_line);
    if (is_word(role, "balloon")) run_balloon(&info);
    if (is_word(role, "registers")) run_registers(info.command_line);
    fail("option: no such role", 0, 0);
}
