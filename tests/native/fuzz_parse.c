/*
 * Feeds request_parse() messages: valid ones, mutated ones, and noise.
 *
 * Each message lies in memory of exactly its size, so the address sanitizer sees any read behind
 * it. What is accepted is compared with `expected`, which says it anew, byte by byte, from the
 * kernel's protocol and not from gate.c.
 *
 *     cc -g -fsanitize=address,undefined -fno-sanitize-recover -I ../../quorumfs/fastpath \
 *         fuzz_parse.c ../../quorumfs/fastpath/gate.c -o fuzz_parse
 *     ./fuzz_parse [MESSAGES [SEED]]     # 2e9 messages take some hours
 *     ./fuzz_parse FILE                  # one message, as a fuzzer has kept it
 *
 * With clang and -fsanitize=fuzzer (which needs -DLIBFUZZER) libFuzzer drives it instead.
 */

#include "gate.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define INODE 2
#define HEAD 40      /* struct fuse_in_header */
#define READ_BODY 40 /* struct fuse_read_in */
#define WRITE_BODY 40
#define READ_OPCODE 15
#define WRITE_OPCODE 16

static uint64_t number_at(const uint8_t *message, size_t place, size_t width)
{
    uint64_t number = 0;
    for (size_t i = 0; i < width; i++)
        number |= (uint64_t)message[place + i] << 8 * i;
    return number;
}

static void fail(const char *why, const uint8_t *message, size_t length)
{
    fprintf(stderr, "%s; a message of %zu bytes:", why, length);
    for (size_t i = 0; i < length && i < HEAD + WRITE_BODY; i++)
        fprintf(stderr, " %02x", message[i]);
    fprintf(stderr, "\n");
    abort();
}

/* What a message has to be taken for, by the layout of the protocol (linux/fuse.h, 7.31). */
static struct request expected(const uint8_t *message, size_t length)
{
    struct request other = {.kind = REQUEST_OTHER}, found = other;
    uint64_t flags, opened;

    if (length < HEAD + READ_BODY)
        return other;
    if (number_at(message, 0, 4) != length || number_at(message, 16, 8) != INODE)
        return other;
    found.unique = number_at(message, 8, 8);
    found.handle = number_at(message, HEAD, 8);
    found.offset = number_at(message, HEAD + 8, 8);
    found.length = number_at(message, HEAD + 16, 4);
    flags = number_at(message, HEAD + 20, 4);
    opened = number_at(message, HEAD + 32, 4);
    if (found.length < 1 || found.length > 1048576)
        return other;
    switch (number_at(message, 4, 4)) {
    case READ_OPCODE: /* flag 2: a lock owner is named */
        if (length != HEAD + READ_BODY || (flags != 0 && flags != 2))
            return other;
        found.kind = REQUEST_READ;
        return found;
    case WRITE_OPCODE: /* flag 1: from the page cache; 2: a lock owner; 4: drop privileges */
        if (length != HEAD + WRITE_BODY + (size_t)found.length || flags > 3)
            return other;
        if (opened & 010000) /* O_DSYNC */
            return other;
        found.kind = REQUEST_WRITE;
        found.data = message + HEAD + WRITE_BODY;
        return found;
    }
    return other;
}

static uint64_t accepted[3];

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length)
{
    struct request found, wanted;
    uint8_t *message = calloc(length, 1);

    if (length)
        memcpy(message, bytes, length);
    memset(&found, 0x55, sizeof(found)); /* what is left there from the request before */
    enum request_kind kind = request_parse(message, length, INODE, &found);
    wanted = expected(message, length);
    if (kind != wanted.kind || found.kind != wanted.kind)
        fail("another kind", message, length);
    if (kind != REQUEST_OTHER &&
        (found.length != wanted.length || found.unique != wanted.unique ||
         found.handle != wanted.handle || found.offset != wanted.offset ||
         found.data != wanted.data))
        fail("another request", message, length);
    if (kind == REQUEST_WRITE) { /* all of the data is inside the message */
        volatile uint8_t last = ((const uint8_t *)found.data)[found.length - 1];
        (void)last;
    }
    accepted[kind]++;
    free(message);
    return 0;
}

#ifndef LIBFUZZER

static uint64_t dice;

static uint64_t roll(void) /* xorshift64* */
{
    dice ^= dice >> 12;
    dice ^= dice << 25;
    dice ^= dice >> 27;
    return dice * UINT64_C(2685821657736338717);
}

static uint64_t below(uint64_t limit)
{
    return roll() % limit;
}

static void put(uint8_t *message, size_t place, size_t width, uint64_t number)
{
    for (size_t i = 0; i < width; i++)
        message[place + i] = number >> 8 * i;
}

/* Numbers at which something changes. */
static uint64_t extreme(void)
{
    static const uint64_t numbers[] = {
        0, 1, 2, 39, 40, 79, 80, 81, 4095, 4096, 1048575, 1048576, 1048577, INT32_MAX,
        UINT64_C(1) << 31, UINT32_MAX, UINT64_C(1) << 32, INT64_MAX, UINT64_C(1) << 63,
        UINT64_MAX - 4095, UINT64_MAX};
    return numbers[below(sizeof(numbers) / sizeof(*numbers))] + (below(4) ? 0 : below(3) - 1);
}

#define MOST (HEAD + WRITE_BODY + 1048576 + 1)

/* A well-formed read or write, or one that is just too long; returns its length. */
static size_t valid(uint8_t *message)
{
    int writes = below(2);
    /* Long ones are rare, because they are slow. */
    uint64_t size = below(4096) ? 1 + below(64) : 1048577 - below(4);
    size_t length = HEAD + READ_BODY + (writes ? size : 0);

    memset(message, 0, HEAD + READ_BODY);
    put(message, 0, 4, length);
    put(message, 4, 4, writes ? WRITE_OPCODE : READ_OPCODE);
    put(message, 8, 8, roll());
    put(message, 16, 8, INODE);
    put(message, 24, 8, roll()); /* who asks */
    put(message, HEAD, 8, below(2) ? below(8) : roll());
    put(message, HEAD + 8, 8, below(2) ? roll() >> below(64) : extreme());
    put(message, HEAD + 16, 4, size);
    put(message, HEAD + 20, 4, writes ? below(4) : 2 * below(2));
    put(message, HEAD + 24, 8, roll()); /* the lock's owner */
    put(message, HEAD + 32, 4, roll() & ~UINT64_C(010000));
    return length;
}

static size_t mutated(uint8_t *message, size_t length)
{
    static const struct { uint8_t place, width; } fields[] = {
        {0, 4}, {4, 4}, {8, 8}, {16, 8}, {36, 2}, {38, 2}, {HEAD, 8}, {HEAD + 8, 8},
        {HEAD + 16, 4}, {HEAD + 20, 4}, {HEAD + 24, 8}, {HEAD + 32, 4}, {HEAD + 36, 4}};

    switch (below(6)) {
    case 0: /* a bit of the heads flips */
        message[below(HEAD + READ_BODY)] ^= 1 << below(8);
        return length;
    case 1: /* the message is cut, and may say so */
        length = below(length + 1);
        if (length >= 4 && below(2))
            put(message, 0, 4, length);
        return length;
    case 2: { /* more comes behind it, and it may say so */
        size_t more = 1 + below(64);
        if (length + more <= MOST)
            length += more;
        if (below(2))
            put(message, 0, 4, length);
        return length;
    }
    case 3: { /* a field is extreme */
        size_t field = below(sizeof(fields) / sizeof(*fields));
        put(message, fields[field].place, fields[field].width, extreme());
        return length;
    }
    case 4: /* one flag more */
        put(message, HEAD + 20 + 12 * below(2), 4, UINT64_C(1) << below(32));
        return length;
    default: /* the other kind of request, in the same shape */
        put(message, 4, 4, READ_OPCODE + below(2));
        return length;
    }
}

int main(int count, char **arguments)
{
    static uint8_t message[MOST + 64];
    uint64_t messages = 300000;
    char *end = "";

    if (count > 1)
        messages = strtod(arguments[1], &end);
    if (*end) {
        FILE *file = fopen(arguments[1], "rb");
        if (!file) {
            perror(arguments[1]);
            return 1;
        }
        LLVMFuzzerTestOneInput(message, fread(message, 1, sizeof(message), file));
        return 0;
    }
    dice = (count > 2 ? strtoull(arguments[2], NULL, 10) : 1) | UINT64_C(1) << 63;
    for (uint64_t i = 0; i < messages; i++) {
        size_t length = valid(message);
        if (below(8)) {
            for (uint64_t times = 1 + below(3); times; times--)
                length = mutated(message, length);
        } else if (!below(8)) {
            length = below(2 * (HEAD + READ_BODY));
            for (size_t place = 0; place < length; place++)
                message[place] = roll();
        }
        LLVMFuzzerTestOneInput(message, length);
    }
    printf("%llu others, %llu reads, %llu writes\n", (unsigned long long)accepted[REQUEST_OTHER],
           (unsigned long long)accepted[REQUEST_READ], (unsigned long long)accepted[REQUEST_WRITE]);
    /* Fuzzing that never gets past the first look would show nothing. */
    return accepted[REQUEST_READ] <= messages / 50 || accepted[REQUEST_WRITE] <= messages / 50;
}

#endif
