/*
 * Sectors that say what they are. The same arithmetic is in record.rs, which judges a disk from outside.
 */
#include "guest.h"

#define RECORD_MAGIC 0x3130434552565343ul /* "CSVREC01" */
#define PAYLOAD_WORDS 58

/* The finaliser of splitmix64: every bit of the input moves half of the output's bits. */
u64 mix(u64 x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ul;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebul;
    return x ^ (x >> 31);
}

static u64 pattern_of(u64 lba, u64 sequence, u32 generation, u32 seed) {
    return mix(lba + mix(sequence + mix((u64)generation << 32 | seed)));
}

void record_fill(struct sector *sectors, u64 count, u64 lba, u64 sequence, u32 generation, u32 seed) {
    for (u64 i = 0; i < count; i++) {
        struct sector *s = &sectors[i];
        s->magic = RECORD_MAGIC, s->lba = lba + i, s->sequence = sequence;
        s->generation = generation, s->seed = seed;
        s->pattern = pattern_of(lba + i, sequence, generation, seed);
        s->checksum = mix(s->pattern ^ RECORD_MAGIC);
        fill_words(s->payload, s->pattern, PAYLOAD_WORDS);
    }
}

void record_check(const struct sector *sectors, u64 count, u64 lba, u64 sequence, u32 generation, u32 seed) {
    for (u64 i = 0; i < count; i++) {
        const struct sector *s = &sectors[i];
        u64 pattern = pattern_of(lba + i, sequence, generation, seed);
        if (s->magic != RECORD_MAGIC || s->lba != lba + i) fail("disk: not the sector that was written", lba + i, s->lba);
        if (s->sequence != sequence) fail("disk: lost or stale write (wanted, found)", sequence, s->sequence);
        if (s->pattern != pattern || s->checksum != mix(pattern ^ RECORD_MAGIC)) fail("disk: bad checksum at", lba + i, s->pattern);
        for (u32 word = 0; word < PAYLOAD_WORDS; word++)
            if (s->payload[word] != pattern) fail("disk: bad payload at (lba, word)", lba + i, word);
    }
}

u64 span_sum(u64 sum, const u64 *words, u64 count) {
    for (u64 i = 0; i < count; i++) sum = (sum << 5 | sum >> 59) + words[i];
    return sum;
}
