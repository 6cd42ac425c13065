/*
 * Two processors that take turns by interrupts between them: a ball that comes twice, or not at all, is noticed.
 *
 *   0: ball = n, IPI "ping" -> 1: checks that the ball is the next one, IPI "pong" -> 0: ...
 */
#include "guest.h"

#define AP_PAGE 0x8000ul
#define OTHER 1u
#define PING 0u
#define PONG 1u
#define BALLS_PER_LINE 64ul
#define TICKS_WITHOUT_ANSWER (60ul * TICK_HZ)

extern char ap_start[], ap_end[];
void ap_main(void);
static volatile u64 ball, lost, alive;

static void wait_for(u32 kind, u64 count) {
    for (;;) {
        interrupts_off();
        if (ipi_received[kind] >= count) break;
        sleep_until_interrupt();
    }
    interrupts_on();
}

/* The second processor. It says nothing: the console is the first one's. */
void ap_main(void) {
    interrupts_join();
    alive = 1;
    for (u64 expected = 1;; expected++) {
        wait_for(PING, expected);
        if (ball != expected || ipi_received[PING] != expected) lost = expected;
        ipi_send(0, PONG);
    }
}

static void start_other(void) {
    for (u64 i = 0; i < (u64)(ap_end - ap_start); i++) ((volatile char *)AP_PAGE)[i] = ap_start[i];
    processor_start(OTHER, AP_PAGE);
    for (u64 limit = clock_ticks + TICKS_WITHOUT_ANSWER; !alive; sleep_until(clock_ticks + 1))
        if (clock_ticks > limit) fail("processor: the second one does not start", 0, 0);
}

void run_ping_pong(void) {
    start_other();
    put_text("ping-pong ready\n");
    for (u64 n = 1;; n++) {
        ball = n;
        barrier();
        ipi_send(OTHER, PING);
        wait_for(PONG, n);
        if (lost || ipi_received[PONG] != n) fail("processor: a ball was lost or came twice (ball, pongs)", n, ipi_received[PONG]);
        if (n % BALLS_PER_LINE) continue;
        put_text("balls ");
        put_number(n);
        put_text("\n");
    }
}
