/*
 * The fast path: Python decides, C carries out.
 *
 * A read or a write that needs no decision is carried out here, by a thread without the
 * interpreter. What needs one goes the long way, through Python. The two never work on the same
 * state at the same time:
 *
 *   The gate is OPEN while Python sleeps, and only then. The trio thread opens the gate as the last
 *   act before it waits for events, and closes it as the first act when the wait is over. What
 *   Python decides on therefore never changes while the gate is open, and C never touches anything
 *   while the gate is closed.
 *
 * Before Python opens the gate it fills in `struct gate`: the descriptors of the replicas, a view
 * of the map, and the ranges that C must leave alone. C serves a request iff the long way would do
 * the same without waiting for anything, and leaves behind exactly what the long way would: the
 * journal, the counters, and which handles wrote. Python folds these into its own state when it
 * closes the gate, before it does anything else.
 *
 * A request may be under way when Python closes the gate. Python waits for its end for as long as
 * a request takes as a rule, and then takes it over: the request becomes one of Python's own, with
 * a lock on its range, deadlines, a verdict and a reply, and nothing of it is C's any more but the
 * one system call that has not returned. A store that stops answering thus holds one thread, and
 * the request has its timeout as on the long way.
 *
 * This file is what both sides agree on. gate.c decides, without I/O: the tests and the simulation
 * call it too. loop.c has the threads. Lengths and offsets are bytes.
 */

#ifndef QUORUMFS_GATE_H
#define QUORUMFS_GATE_H

#include <stddef.h>
#include <stdint.h>

enum {
    GATE_REPLICAS = 32,  /* as many as a set may have */
    GATE_PLANES = 5,     /* as many as the map of so many replicas has */
    GATE_RANGES = 64,    /* looked through for every request; with more, Python keeps it closed */
    GATE_JOURNAL = 4096, /* changed chunks until Python is woken to fold them */
    GATE_HANDLES = 1024, /* open files that C serves; others go the long way */
    GATE_BOUNDS = 14,    /* of the histograms of durations: as many as Python has */
    GATE_REGIONS = 16,   /* written to last: as many as Python has */
    GATE_TIMED = 16,     /* of so many requests one is timed: two looks at the clock take 1-2 % */
};

/* The largest request: what the kernel was told when the connection was negotiated. */
#define REQUEST_MAX (UINT32_C(1) << 20)

/* Which requests a range of the disk keeps out. */
enum { KEEPS_OUT_WRITES = 1, KEEPS_OUT_READS = 2 };

struct gate_range {
    uint64_t start, end;
    uint32_t keeps_out;
    uint32_t unused;
};

/*
 * A histogram, in memory of Python's own: how many requests took more than the bound before and
 * not more than this one; the last one has no bound. A request that was not timed counts as the
 * last one that was.
 */
struct gate_durations {
    uint64_t counts[GATE_BOUNDS + 1], total_ns;
    uint64_t last_place, last_ns, untimed; /* what C goes on with */
};

/* Bytes of a region of a device. */
#define GATE_REGION (UINT64_C(1) << 20)

/* Where a device was written to last, in memory of Python's own: numbers of regions plus 1, the
 * latest one first; 0: there are no more. */
struct gate_regions {
    uint64_t number[GATE_REGIONS];
};

struct gate_replica {
    int32_t fd;
    uint32_t slot;   /* the place of its counters */
    uint32_t memory; /* whether the file is in memory: a read of it never waits for a device */
    uint32_t unused;
    struct gate_durations *durations; /* of reads or of writes */
    struct gate_regions *regions;     /* NULL: nobody asks for them */
};

struct gate_counters {
    uint64_t reads, bytes_read, writes, bytes_written;
};

/* A plane of the map: the long way knows what its bits mean. */
struct gate_plane {
    const uint8_t *states; /* a byte per chunk */
    uint8_t mask, wanted;  /* a write needs (state & mask) == wanted in each of its chunks */
    uint8_t unused[6];
};

struct gate {
    /* Filled in by Python before the gate is opened. */
    uint64_t size; /* of the disk */
    uint64_t chunk_size;
    uint64_t bounds_ns[GATE_BOUNDS]; /* of the histograms, rising */
    struct gate_plane plane[GATE_PLANES];
    uint32_t planes;     /* 0: all chunks may be written to */
    uint32_t keep_zeros; /* whether aligned blocks of zeros go the long way, to become holes */
    uint32_t readers; /* replicas that a read asks, and that have to agree; 0: no read is served */
    uint32_t writers; /* replicas that a write goes to; 0: no write is served */
    uint32_t ranges;
    uint32_t journalled; /* entries of the journal: Python resets it when it has folded them */
    struct gate_replica reader[GATE_REPLICAS], writer[GATE_REPLICAS];
    struct gate_range range[GATE_RANGES];

    /* Left behind by C. */
    uint64_t requests;
    struct gate_counters counters[GATE_REPLICAS];
    uint64_t journal[GATE_JOURNAL]; /* chunks written to; one may come more than once */
    uint8_t wrote[GATE_HANDLES];    /* by handle: 1 after a write */
};

enum request_kind { REQUEST_OTHER, REQUEST_READ, REQUEST_WRITE };

struct request {
    enum request_kind kind;
    uint32_t length;
    uint64_t unique; /* the kernel's name for the request */
    uint64_t handle;
    uint64_t offset;
    const void *data; /* of a write, inside the message */
};

/*
 * The request in a message of the kernel, of `length` bytes. REQUEST_OTHER: anything but a plain
 * read or write of the file `inode`, in the exact shape that is known here. Nothing behind the
 * message is read.
 */
enum request_kind request_parse(const void *message, size_t length, uint64_t inode,
                                struct request *request);

/* Whether C may serve a request that is well formed. */
int gate_admits(const struct gate *gate, const struct request *request);

/* Whether the next request of this kind is to be timed. */
int gate_times(const struct gate *gate, enum request_kind kind);

/*
 * Leave behind what a request that was served leaves behind. Each replica took `took_ns` of it;
 * NULL: it was not timed.
 */
void gate_note(struct gate *gate, const struct request *request, const uint64_t *took_ns);

#endif
