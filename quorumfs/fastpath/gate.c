/* What C decides, without I/O. See gate.h. */

#include "gate.h"

#include <assert.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <string.h>

#define PUBLIC __attribute__((visibility("default")))

/* Blocks that a file system can make a hole of. */
#define BLOCK 4096

/* Flags that change nothing here. A write that must drop privileges is not among them. */
#define READ_FLAGS FUSE_READ_LOCKOWNER
#define WRITE_FLAGS (FUSE_WRITE_CACHE | FUSE_WRITE_LOCKOWNER)

PUBLIC enum request_kind request_parse(const void *message, size_t length, uint64_t inode,
                                       struct request *request)
{
    struct fuse_in_header head;
    struct fuse_read_in read;
    struct fuse_write_in write;
    const char *rest = (const char *)message + sizeof(head);

    request->kind = REQUEST_OTHER;
    if (length < sizeof(head))
        return REQUEST_OTHER;
    memcpy(&head, message, sizeof(head));
    if (head.len != length || head.nodeid != inode)
        return REQUEST_OTHER;
    length -= sizeof(head);

    if (head.opcode == FUSE_READ && length == sizeof(read)) {
        memcpy(&read, rest, sizeof(read));
        if (read.read_flags & ~READ_FLAGS || !read.size || read.size > REQUEST_MAX)
            return REQUEST_OTHER;
        *request = (struct request){.kind = REQUEST_READ,
                                    .length = read.size,
                                    .unique = head.unique,
                                    .handle = read.fh,
                                    .offset = read.offset};
    } else if (head.opcode == FUSE_WRITE && length >= sizeof(write)) {
        memcpy(&write, rest, sizeof(write));
        if (write.write_flags & ~WRITE_FLAGS || write.flags & O_DSYNC || !write.size ||
            write.size > REQUEST_MAX || write.size != length - sizeof(write))
            return REQUEST_OTHER;
        *request = (struct request){.kind = REQUEST_WRITE,
                                    .length = write.size,
                                    .unique = head.unique,
                                    .handle = write.fh,
                                    .offset = write.offset,
                                    .data = rest + sizeof(write)};
    }
    return request->kind;
}

static int kept_out(const struct gate *gate, const struct request *request)
{
    uint32_t kind = request->kind == REQUEST_READ ? KEEPS_OUT_READS : KEEPS_OUT_WRITES;
    uint64_t end = request->offset + request->length;

    for (uint32_t i = 0; i < gate->ranges; i++) {
        const struct gate_range *range = &gate->range[i];
        if (range->keeps_out & kind && range->start < end && request->offset < range->end)
            return 1;
    }
    return 0;
}

/* A block that begins with a zero, and equals itself one byte on, is all zeros. */
static int is_zeros(const uint8_t *data, uint32_t length)
{
    return !data[0] && !memcmp(data, data + 1, length - 1);
}

static int may_write(const struct gate *gate, const struct request *request)
{
    uint64_t first = request->offset / gate->chunk_size;
    uint64_t last = (request->offset + request->length - 1) / gate->chunk_size;

    if (!gate->writers || gate->journalled + (last - first + 1) > GATE_JOURNAL)
        return 0;
    if (gate->keep_zeros && !((request->offset | request->length) % BLOCK) &&
        is_zeros(request->data, request->length))
        return 0;
    for (uint32_t i = 0; i < gate->planes; i++) {
        const struct gate_plane *plane = &gate->plane[i];
        for (uint64_t chunk = first; chunk <= last; chunk++)
            if ((plane->states[chunk] & plane->mask) != plane->wanted)
                return 0;
    }
    return 1;
}

PUBLIC int gate_admits(const struct gate *gate, const struct request *request)
{
    if (request->offset > gate->size || request->length > gate->size - request->offset)
        return 0;
    if (request->handle >= GATE_HANDLES || kept_out(gate, request))
        return 0;
    return request->kind == REQUEST_READ ? gate->readers != 0 : may_write(gate, request);
}

PUBLIC int gate_times(const struct gate *gate, enum request_kind kind)
{
    return !(kind == REQUEST_READ ? gate->reader : gate->writer)->durations->untimed;
}

static void note_duration(const struct gate *gate, struct gate_durations *durations,
                          const uint64_t *took_ns)
{
    if (took_ns) {
        uint64_t place = 0;
        while (place < GATE_BOUNDS && *took_ns > gate->bounds_ns[place])
            place++;
        durations->last_place = place;
        durations->last_ns = *took_ns;
    }
    durations->counts[durations->last_place]++;
    durations->total_ns += durations->last_ns;
    durations->untimed = (durations->untimed + 1) % GATE_TIMED;
}

static void note_regions(struct gate_regions *regions, const struct request *request)
{
    uint64_t last = (request->offset + request->length - 1) / GATE_REGION;
    for (uint64_t region = request->offset / GATE_REGION; region <= last; region++) {
        uint64_t moved = region + 1;
        for (uint32_t i = 0; i < GATE_REGIONS; i++) {
            uint64_t number = regions->number[i];
            regions->number[i] = moved;
            if (number == region + 1 || number == 0)
                break;
            moved = number;
        }
    }
}

PUBLIC void gate_note(struct gate *gate, const struct request *request, const uint64_t *took_ns)
{
    gate->requests++;
    if (request->kind == REQUEST_READ) {
        for (uint32_t i = 0; i < gate->readers; i++) {
            struct gate_counters *counters = &gate->counters[gate->reader[i].slot];
            counters->reads++;
            counters->bytes_read += request->length;
            note_duration(gate, gate->reader[i].durations, took_ns ? &took_ns[i] : NULL);
        }
        return;
    }
    for (uint32_t i = 0; i < gate->writers; i++) {
        struct gate_counters *counters = &gate->counters[gate->writer[i].slot];
        counters->writes++;
        counters->bytes_written += request->length;
        note_duration(gate, gate->writer[i].durations, took_ns ? &took_ns[i] : NULL);
        if (gate->writer[i].regions)
            note_regions(gate->writer[i].regions, request);
    }
    gate->wrote[request->handle] = 1;
    uint64_t last = (request->offset + request->length - 1) / gate->chunk_size;
    for (uint64_t chunk = request->offset / gate->chunk_size; chunk <= last; chunk++) {
        /* Most writes go on where the last one was. */
        if (gate->journalled && gate->journal[gate->journalled - 1] == chunk)
            continue;
        assert(gate->journalled < GATE_JOURNAL);
        gate->journal[gate->journalled++] = chunk;
    }
}
