/*
 * Drives the loop of the fast path: a guest on one side, a stand-in for Python on the other.
 *
 *     /dev/fuse  a socket pair: a message is one read, and a reply is one writev
 *     replicas   files in memory; the calls of the loop on them are wrapped (ld --wrap), so that
 *                they are late, stuck, cut short or fail, as the scenario says
 *     guest      sends requests, overlapping ones one after the other, and checks the replies
 *     stand-in   what path.py does: opens and closes the gate, folds what C left behind, serves
 *                the long way, takes over what is stuck
 *
 * While the gate is closed every byte of it is poison, and has to be so still when it is filled in
 * anew. Now and then the guest waits for all its replies, and then all that C counted and all
 * replicas are compared with what was served and written.
 *
 *     wraps=$(printf -- '-Wl,--wrap=%s ' read writev pwrite preadv2 lseek pthread_create \
 *         gate_admits gate_note)
 *     cc -g -O1 -pthread -fsanitize=thread $wraps -I ../../quorumfs/fastpath drive_loop.c \
 *         ../../quorumfs/fastpath/{gate,loop}.c -o drive_loop
 *     TSAN_OPTIONS=halt_on_error=1 ./drive_loop [ROUNDS [SEED [SCENARIO]]]
 *
 * Statics in loop.c mean one loop per process, so each scenario has its own.
 */

#define _GNU_SOURCE

#include "loop.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define INODE 2
#define SIZE (1 << 20)
#define LENGTH_MAX 8192
#define SECTOR 512
#define REPLICAS 3
#define IN_FLIGHT_MAX 40
#define HANDLES 4
#define POISON 0xA5
#define FOR_EVER_S 60 /* a round of the slowest sanitizer on the slowest machine takes less */

enum kind { OTHER, READ, WRITE };

struct scenario {
    const char *name;
    int requests;  /* in a round */
    int in_flight; /* at most */
    int asleep;    /* the stand-in sleeps until something rings, and no timer wakes it */
    int late, stuck, fails, cut, ends; /* calls on replicas, of 1000; `ends`: the file is short */
    int hangs;     /* a call hangs until so many other requests were served */
    int starved;   /* so many threads of 1000 cannot be begun */
    int bursts;    /* so many requests at once that the queue is full */
    int gone;      /* unmounted amid requests */
    int broken;    /* the errno with which the kernel's end fails, if not by an unmount */
};

static const struct scenario scenarios[] = {
    {.name = "calm", .requests = 300, .in_flight = 8},
    {.name = "calm and asleep", .requests = 300, .in_flight = 8, .asleep = 1},
    {.name = "late", .requests = 100, .in_flight = 8, .late = 200},
    {.name = "stuck", .requests = 60, .in_flight = 8, .late = 50, .stuck = 60},
    {.name = "stuck one by one", .requests = 40, .in_flight = 1, .asleep = 1, .stuck = 150},
    {.name = "failing", .requests = 150, .in_flight = 8, .fails = 60, .cut = 60, .ends = 60},
    {.name = "all at once", .requests = 60, .in_flight = 12, .late = 50, .stuck = 40,
     .fails = 40, .cut = 40, .ends = 20},
    {.name = "hanging", .requests = 60, .in_flight = 8, .hangs = 30},
    {.name = "hanging without threads", .requests = 60, .in_flight = 8, .hangs = 10,
     .starved = 997},
    {.name = "full queue", .requests = 60, .in_flight = IN_FLIGHT_MAX, .bursts = 1},
    {.name = "unmounted amid requests", .requests = 60, .in_flight = 8, .late = 100, .stuck = 40,
     .gone = 1},
    {.name = "connection lost", .requests = 40, .in_flight = 8, .broken = EIO},
};

static struct scenario scenario;
static int rounds = 3;

static void fail(const char *why)
{
    fprintf(stderr, "%s: %s\n", scenario.name, why);
    _exit(1);
}

#define MUST(what)                                                                                \
    do {                                                                                          \
        if (!(what))                                                                              \
            fail("line " STRING(__LINE__) ": " #what);                                            \
    } while (0)
#define STRING(line) STRING_OF(line)
#define STRING_OF(line) #line

/* Dice, one for each thread */

static uint64_t seed = 1;
static _Atomic uint64_t threads;
static __thread uint64_t dice;

static uint64_t below(uint64_t limit)
{
    if (!dice)
        dice = (seed + 1) * UINT64_C(0x9E3779B97F4A7C15) + ++threads * 0x10001;
    dice ^= dice >> 12;
    dice ^= dice << 25;
    dice ^= dice >> 27;
    return (dice * UINT64_C(2685821657736338717) >> 11) % limit;
}

static int happens(int of_thousand)
{
    return below(1000) < (uint64_t)of_thousand;
}

static void pass_us(uint64_t us)
{
    struct timespec time = {.tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000};
    clock_nanosleep(CLOCK_MONOTONIC, 0, &time, NULL);
}

/* What the guest has under way, and what C did; under one lock */

struct op {
    enum kind kind;
    uint32_t length;
    uint64_t unique, offset, handle; /* unique: 0 while nothing is under way */
    uint8_t data[LENGTH_MAX];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct op ops[IN_FLIGHT_MAX];
static uint64_t served;                  /* by C, since all was compared */
static uint8_t served_chunks[SIZE / SECTOR], served_handles[GATE_HANDLES];
static struct gate_counters served_by[REPLICAS];

static struct op *op_of(uint64_t unique)
{
    for (int i = 0; i < IN_FLIGHT_MAX; i++)
        if (ops[i].unique == unique)
            return &ops[i];
    return NULL;
}

/* The scenario's size of a chunk; the gate's own is poison now and then. */
static uint64_t chunk_size = SECTOR;

static int fuse_fd, guest_fd, bell, nudge;
static int replica_fd[REPLICAS];
static _Atomic uint64_t messages_read, replies_got, served_in_all, long_in_all, taken_in_all,
    failed_in_all, hung_in_all;
static _Atomic int gone;
static _Atomic int alone; /* the guest has nothing but one request to wait for */

/* Calls of the loop */

static __thread struct server *me; /* the thread's server; NULL: the thread is another */
static __thread int partly;        /* a write was cut short */
static __thread int ends_before;   /* the file was said to be short */
static __thread int taken_before;  /* the request was taken over when a call returned */
static __thread int asked, asked_replicas[2 * REPLICAS];

ssize_t __real_read(int fd, void *into, size_t room);
ssize_t __real_writev(int fd, const struct iovec *parts, int count);
ssize_t __real_pwrite(int fd, const void *data, size_t length, off_t offset);
ssize_t __real_preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags);
off_t __real_lseek(int fd, off_t offset, int whence);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                          void *(*run)(void *), void *argument);

struct start {
    void *(*run)(void *);
    struct server *server;
};

static void *run_as(void *argument)
{
    struct start start = *(struct start *)argument;
    free(argument);
    me = start.server;
    return start.run(start.server);
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                          void *(*run)(void *), void *argument)
{
    struct start *start;

    if (argument && argument != loop_servers() && happens(scenario.starved))
        return EAGAIN;
    start = malloc(sizeof(*start));
    *start = (struct start){run, argument};
    return __real_pthread_create(thread, attributes, run_as, start);
}

/* The last request of each server that the stand-in has taken over, and its last replica. */
static _Atomic uint64_t taken_from[SERVERS];
static _Atomic int asked_last[SERVERS];

ssize_t __wrap_read(int fd, void *into, size_t room)
{
    ssize_t length = __real_read(fd, into, room);

    if (!me || fd != fuse_fd)
        return length;
    if (partly && taken_from[me - loop_servers()] != me->request.unique)
        fail("a write that was cut short is not finished at once");
    partly = taken_before = asked = 0;
    if (length > 0)
        messages_read++;
    if (length == 0 || (length < 0 && errno == ECONNRESET)) {
        errno = scenario.broken ? scenario.broken : ENODEV;
        return -1;
    }
    return length;
}

ssize_t __wrap_writev(int fd, const struct iovec *parts, int count)
{
    struct fuse_out_header head;
    memcpy(&head, parts[0].iov_base, sizeof(head));
    if (me) { /* before the reply: then the guest may use the place for another request */
        pthread_mutex_lock(&lock);
        struct op *op = op_of(head.unique);
        if (!op && !gone)
            fail("a reply to a request that is not under way");
        if (head.error)
            fail("C replied an error");
        if (op) {
            served++;
            served_in_all++;
            for (int i = 0; i < asked; i++) {
                struct gate_counters *by = &served_by[asked_replicas[i]];
                if (op->kind == READ)
                    by->reads++, by->bytes_read += op->length;
                else
                    by->writes++, by->bytes_written += op->length;
            }
            if (op->kind == WRITE) {
                served_handles[op->handle] = 1;
                for (uint64_t chunk = op->offset / chunk_size;
                     chunk <= (op->offset + op->length - 1) / chunk_size; chunk++)
                    served_chunks[chunk] = 1;
            }
        }
        pthread_mutex_unlock(&lock);
    }
    ssize_t written = __real_writev(fd, parts, count);
    if (written < 0 && !gone)
        fail("a reply was lost");
    return written;
}

static int is_taken(void)
{
    return (atomic_load(&me->phase) & 0xFF) == TAKEN;
}

static int replica_of(int fd)
{
    for (int i = 0; i < REPLICAS; i++)
        if (replica_fd[i] == fd)
            return i;
    fail("a call on what is no replica");
    return -1;
}

/* What comes before a call on a replica. */
static void before_call(int fd, int counts)
{
    static _Atomic int hanging;
    int replica = replica_of(fd);

    if (taken_before)
        fail("a system call after the request was taken over");
    if (counts)
        asked_replicas[asked++] = replica;
    asked_last[me - loop_servers()] = replica;
    if (happens(scenario.late))
        pass_us(below(400));
    if (happens(scenario.stuck)) {
        if (below(2)) /* as long as it takes */
            while (!is_taken())
                pass_us(100);
        else /* perhaps just about as long as it takes */
            pass_us(1500 + below(3000));
    }
    if (scenario.hangs && !gone && happens(50) && !atomic_exchange(&hanging, 1)) {
        uint64_t others = replies_got + scenario.hangs;
        hung_in_all++;
        while (replies_got < others && !alone && !gone)
            pass_us(100);
        hanging = 0;
    }
}

static void after_call(void)
{
    int error = errno;
    taken_before = is_taken();
    errno = error;
}

off_t __wrap_lseek(int fd, off_t offset, int whence)
{
    before_call(fd, 0);
    off_t end = __real_lseek(fd, offset, whence);
    ends_before = happens(scenario.ends);
    if (ends_before)
        end -= SECTOR;
    if (happens(scenario.fails / 2)) {
        end = -1;
        errno = EIO;
    }
    after_call();
    return end;
}

ssize_t __wrap_pwrite(int fd, const void *data, size_t length, off_t offset)
{
    size_t whole = length;
    ssize_t written;

    if (ends_before)
        fail("a write to a replica that lost its end");
    before_call(fd, 1);
    if (happens(scenario.fails)) {
        written = -1;
        errno = below(2) ? EIO : EAGAIN;
    } else {
        if (happens(scenario.cut))
            length = below(length + 1);
        written = __real_pwrite(fd, data, length, offset);
        partly |= written != (ssize_t)whole;
    }
    after_call();
    return written;
}

ssize_t __wrap_preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags)
{
    struct iovec part = parts[0];
    ssize_t length;

    before_call(fd, 1);
    if (happens(scenario.fails)) {
        length = -1;
        errno = below(2) ? EIO : EAGAIN;
    } else {
        if (happens(scenario.cut))
            part.iov_len = below(part.iov_len + 1);
        length = __real_preadv2(fd, &part, count, offset, flags);
    }
    after_call();
    return length;
}

/* What C decides and notes takes a moment, in which Python may come and has to wait. */

int __real_gate_admits(const struct gate *gate, const struct request *request);
void __real_gate_note(struct gate *gate, const struct request *request, const uint64_t *took_ns);

int __wrap_gate_admits(const struct gate *gate, const struct request *request)
{
    if (happens(scenario.late / 4))
        pass_us(below(1000));
    return __real_gate_admits(gate, request);
}

void __wrap_gate_note(struct gate *gate, const struct request *request, const uint64_t *took_ns)
{
    if (happens(scenario.late / 4))
        pass_us(below(1000));
    __real_gate_note(gate, request, took_ns);
}

/* The guest */

static uint8_t content[SIZE]; /* what the guest has to find */
static pthread_cond_t compared = PTHREAD_COND_INITIALIZER;
static int to_compare; /* the guest waits for that */

static void nudge_the_stand_in(void)
{
    uint64_t one = 1;
    MUST(write(nudge, &one, sizeof(one)) == sizeof(one));
}

static int in_the_way(const struct op *new)
{
    for (int i = 0; i < IN_FLIGHT_MAX; i++) {
        const struct op *op = &ops[i];
        if (op->unique && op->kind != OTHER && (op->kind == WRITE || new->kind == WRITE) &&
            op->offset < new->offset + new->length && new->offset < op->offset + op->length)
            return 1;
    }
    return 0;
}

/* Send the request; whether there was room for it. */
static int send_op(const struct op *op)
{
    static uint8_t message[sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in) +
                           LENGTH_MAX];
    struct fuse_in_header head = {.unique = op->unique, .nodeid = INODE};
    struct fuse_read_in read = {.fh = op->handle, .offset = op->offset, .size = op->length};
    struct fuse_write_in write = {.fh = op->handle, .offset = op->offset, .size = op->length};
    size_t length = sizeof(head);

    if (op->kind == OTHER) {
        head.opcode = FUSE_STATFS;
    } else if (op->kind == READ) {
        head.opcode = FUSE_READ;
        memcpy(message + length, &read, sizeof(read));
        length += sizeof(read);
    } else {
        head.opcode = FUSE_WRITE;
        if (!below(16))
            write.flags = O_DSYNC; /* goes the long way */
        memcpy(message + length, &write, sizeof(write));
        memcpy(message + length + sizeof(write), op->data, op->length);
        length += sizeof(write) + op->length;
    }
    head.len = length;
    memcpy(message, &head, sizeof(head));
    if (send(guest_fd, message, length, MSG_DONTWAIT) == (ssize_t)length)
        return 1;
    MUST(errno == EAGAIN);
    return 0;
}

/* Begin another request, if there is room for it; whether there was. */
static int begin_op(enum kind kind)
{
    static uint64_t unique;
    struct op *op = op_of(0), new = {.kind = kind, .unique = unique + 1};
    int sent = 0;

    new.length = below(8) ? SECTOR * (1 + below(LENGTH_MAX / SECTOR)) : 1 + below(LENGTH_MAX);
    new.offset = below(8) ? SECTOR * below(SIZE / SECTOR) : below(SIZE);
    if (new.offset + new.length > SIZE)
        new.offset = SIZE - new.length;
    new.handle = below(16) ? below(HANDLES) : GATE_HANDLES + below(2);
    if (kind == WRITE && below(8))
        for (uint32_t i = 0; i < new.length; i++)
            new.data[i] = below(256);
    pthread_mutex_lock(&lock);
    if (op && !in_the_way(&new)) {
        *op = new;
        if (!(sent = send_op(op)))
            op->unique = 0;
    }
    pthread_mutex_unlock(&lock);
    unique += sent;
    return sent;
}

/* Take a reply, which there is. */
static void take_reply(void)
{
    static uint8_t message[sizeof(struct fuse_out_header) + LENGTH_MAX];
    struct fuse_out_header head;
    struct fuse_write_out written;
    ssize_t length = recv(guest_fd, message, sizeof(message), 0);

    MUST(length >= (ssize_t)sizeof(head));
    memcpy(&head, message, sizeof(head));
    MUST(head.len == length);
    pthread_mutex_lock(&lock);
    struct op *op = op_of(head.unique);
    if (!op)
        fail("a request has two replies");
    if (op->kind == OTHER) {
        MUST(head.error == -ENOSYS);
    } else if (op->kind == READ) {
        MUST(!head.error && length == (ssize_t)(sizeof(head) + op->length));
        if (memcmp(message + sizeof(head), content + op->offset, op->length))
            fail("a read shows what was not written");
    } else {
        if (head.error) { /* the stand-in says so, and has written all the same */
            MUST(head.error == -ENOSPC && length == sizeof(head));
        } else {
            MUST(length == sizeof(head) + sizeof(written));
            memcpy(&written, message + sizeof(head), sizeof(written));
            MUST(written.size == op->length);
        }
        memcpy(content + op->offset, op->data, op->length);
    }
    op->unique = 0;
    replies_got++;
    pthread_mutex_unlock(&lock);
}

static int under_way(void)
{
    int count = 0;
    for (int i = 0; i < IN_FLIGHT_MAX; i++)
        count += ops[i].unique != 0;
    return count;
}

static void await_compared(void)
{
    pthread_mutex_lock(&lock);
    to_compare = 1;
    nudge_the_stand_in();
    while (to_compare)
        pthread_cond_wait(&compared, &lock);
    pthread_mutex_unlock(&lock);
}

static void *run_guest(void *unused)
{
    struct pollfd readable = {.fd = guest_fd, .events = POLLIN};

    (void)unused;
    for (int round = 0; round < rounds; round++) {
        int left = scenario.requests, last = round == rounds - 1;
        while (left || under_way()) {
            if (last && !left && scenario.gone)
                break;
            int more = left && under_way() < scenario.in_flight;
            /* Sometimes the next one waits until some others were answered. */
            if (more && (below(8) || !under_way())) {
                enum kind kind = scenario.bursts ? OTHER : below(20) ? READ + below(2) : OTHER;
                if (begin_op(kind))
                    left--;
                if (!scenario.asleep && !below(32))
                    nudge_the_stand_in();
            }
            more = left && under_way() < scenario.in_flight;
            alone = !left && under_way() == 1;
            if (poll(&readable, 1, more ? 0 : -1) > 0)
                take_reply();
        }
        if (under_way())
            gone = 1;
        else
            await_compared();
    }
    gone = 1;
    MUST(!close(guest_fd));
    return NULL;
}

/* The stand-in */

static struct gate *gate;
static uint8_t states[SIZE / SECTOR];
static uint64_t folded; /* what C left behind, since all was compared */
static uint8_t folded_chunks[SIZE / SECTOR], folded_handles[GATE_HANDLES];
static struct gate_counters folded_by[REPLICAS];
static struct gate_durations reads_took[REPLICAS], writes_took[REPLICAS];

static struct {
    int held;  /* calls elsewhere that have not returned */
    int stale; /* it was given up, and gets a copy when its call has returned */
} replicas[REPLICAS];

static struct taken {
    int known, replica, waits; /* waits: the request is answered when the call has returned */
    enum request_kind kind;
    uint64_t unique, offset;
    uint32_t length;
    uint8_t data[LENGTH_MAX];
} taken[SERVERS];

static int all_returned(void)
{
    for (int i = 0; i < SERVERS; i++)
        if (taken[i].known)
            return 0;
    return 1;
}

static int good_replica(void)
{
    for (int i = 0; i < REPLICAS; i++)
        if (!replicas[i].stale)
            return i;
    fail("no replica is left");
    return -1;
}

static void write_long(int replica, const void *data, uint32_t length, uint64_t offset)
{
    MUST(__real_pwrite(replica_fd[replica], data, length, offset) == length);
}

static void say_written(uint64_t unique, uint32_t length)
{
    struct fuse_write_out written = {.size = length};
    int error = below(8) ? 0 : ENOSPC;
    loop_reply(unique, error, &written, error ? 0 : sizeof(written));
}

static void serve_long(const uint8_t *message, size_t length)
{
    static uint8_t answer[LENGTH_MAX];
    struct fuse_in_header head;
    struct fuse_read_in read;
    struct fuse_write_in write;

    long_in_all++;
    memcpy(&head, message, sizeof(head));
    MUST(head.len == length);
    if (head.opcode == FUSE_READ) {
        memcpy(&read, message + sizeof(head), sizeof(read));
        ssize_t got = pread(replica_fd[good_replica()], answer, read.size, read.offset);
        MUST(got == (ssize_t)read.size);
        loop_reply(head.unique, 0, answer, read.size);
    } else if (head.opcode == FUSE_WRITE) {
        memcpy(&write, message + sizeof(head), sizeof(write));
        for (int i = 0; i < REPLICAS; i++)
            if (!replicas[i].stale)
                write_long(i, message + sizeof(head) + sizeof(write), write.size, write.offset);
        say_written(head.unique, write.size);
    } else {
        MUST(head.opcode == FUSE_STATFS);
        loop_reply(head.unique, ENOSYS, NULL, 0);
    }
}

/* Give a copy to what was given up, when no replica lacks anything that is under way. */
static void give_copies(void)
{
    static uint8_t all[SIZE];

    if (!all_returned())
        return;
    for (int i = 0; i < REPLICAS; i++) {
        if (!replicas[i].stale)
            continue;
        MUST(pread(replica_fd[good_replica()], all, SIZE, 0) == SIZE);
        write_long(i, all, SIZE, 0);
        replicas[i].stale = 0;
    }
}

/* The call of a server has returned. */
static void call_returned(struct taken *one, int outcome)
{
    MUST(one->known);
    one->known = 0;
    replicas[one->replica].held--;
    if (one->kind == REQUEST_WRITE && one->waits) {
        if (outcome) /* tried again, or repaired */
            write_long(one->replica, one->data, one->length, one->offset);
        say_written(one->unique, one->length);
    }
}

static void take_over(struct server *server, struct taken *one, uint32_t place)
{
    const struct request *request = &server->request;

    taken_in_all++;
    taken_from[server - loop_servers()] = request->unique;
    one->known = 1;
    one->kind = request->kind;
    one->unique = request->unique;
    one->offset = request->offset;
    one->length = request->length;
    if (request->kind == REQUEST_READ) {
        MUST(place < gate->readers);
        one->replica = gate->reader[place].slot;
        replicas[one->replica].held++;
        loop_requeue(server);
        return;
    }
    MUST(place < gate->writers);
    memcpy(one->data, request->data, request->length);
    one->replica = gate->writer[place].slot;
    replicas[one->replica].held++;
    for (uint32_t later = place + 1; later < gate->writers; later++)
        write_long(gate->writer[later].slot, one->data, one->length, one->offset);
    int stale = 0;
    for (int i = 0; i < REPLICAS; i++)
        stale += replicas[i].stale;
    one->waits = stale || below(2);
    if (!one->waits) { /* the replica is given up, and its call may still happen */
        replicas[one->replica].stale = 1;
        say_written(one->unique, one->length);
    }
}

static void look_at_servers(void)
{
    for (uint32_t number = 0; number < SERVERS; number++) {
        struct server *server = &loop_servers()[number];
        struct taken *one = &taken[number];
        uint32_t word = atomic_load(&server->phase);
        enum phase phase = word & 0xFF;
        if (phase == FAILED) {
            MUST(!one->known);
            failed_in_all++;
            take_over(server, one, word >> 8);
            MUST(one->replica == asked_last[number]);
            call_returned(one, server->outcome);
            loop_release(server);
            continue;
        }
        if ((phase == TAKEN || phase == RETURNED) && !one->known)
            take_over(server, one, word >> 8);
        if (phase == RETURNED) {
            MUST(one->replica == asked_last[number]);
            call_returned(one, server->outcome);
            loop_release(server);
        }
    }
}

/* Whether a request that was taken over has its call returned, within a moment. */
static int returns_within_ms(int ms)
{
    for (int looks = ms * 10; looks; looks--) {
        for (uint32_t number = 0; number < SERVERS; number++)
            if ((atomic_load(&loop_servers()[number].phase) & 0xFF) == RETURNED)
                return 1;
        pass_us(100);
    }
    return 0;
}

static int is_poison(const uint8_t *byte, size_t length)
{
    return *byte == POISON && !memcmp(byte, byte + 1, length - 1);
}

/* Fill in the gate; whether C may serve anything. */
static int publish(void)
{
    uint32_t count = 0;

    if (!is_poison((uint8_t *)gate, sizeof(*gate)))
        fail("the gate was touched while it was closed");
    *gate = (struct gate){
        .size = SIZE,
        .chunk_size = chunk_size,
        .planes = 1,
        .plane = {{.states = states, .mask = 3, .wanted = 1}}};
    gate->keep_zeros = below(2);
    for (size_t chunk = 0; chunk < SIZE / chunk_size; chunk++)
        states[chunk] = below(64) ? 1 : below(4);
    for (int i = 0; i < REPLICAS; i++) {
        if (replicas[i].stale)
            continue;
        struct gate_replica replica = {.fd = replica_fd[i], .slot = i, .memory = 1};
        replica.durations = &reads_took[i];
        if (!replicas[i].held && (!count || below(2)))
            gate->reader[gate->readers++] = replica;
        replica.durations = &writes_took[i];
        gate->writer[count++] = replica;
    }
    gate->writers = count;
    for (int i = 0; i < REPLICAS; i++)
        if (!replicas[i].stale && replicas[i].held)
            gate->writers = 0;
    for (int i = 0; i < SERVERS; i++)
        if (taken[i].known && taken[i].kind == REQUEST_WRITE && taken[i].waits)
            gate->range[gate->ranges++] = (struct gate_range){
                .start = taken[i].offset, .end = taken[i].offset + taken[i].length,
                .keeps_out = KEEPS_OUT_READS | KEEPS_OUT_WRITES};
    if (!below(4)) {
        uint64_t start = below(SIZE);
        gate->range[gate->ranges++] = (struct gate_range){
            .start = start, .end = start + below(SIZE / 8), .keeps_out = 1 + below(3)};
    }
    return gate->readers || gate->writers;
}

static uint64_t counted(const struct gate_durations *durations)
{
    uint64_t all = 0;
    for (int i = 0; i <= GATE_BOUNDS; i++)
        all += durations->counts[i];
    return all;
}

/* Take what C left behind; the gate was just closed. */
static void fold(void)
{
    MUST(gate->journalled <= GATE_JOURNAL);
    for (uint32_t i = 0; i < gate->journalled; i++) {
        MUST(gate->journal[i] < SIZE / chunk_size);
        folded_chunks[gate->journal[i]] = 1;
    }
    folded += gate->requests;
    for (int i = 0; i < REPLICAS; i++) {
        folded_by[i].reads += gate->counters[i].reads;
        folded_by[i].bytes_read += gate->counters[i].bytes_read;
        folded_by[i].writes += gate->counters[i].writes;
        folded_by[i].bytes_written += gate->counters[i].bytes_written;
    }
    for (int i = 0; i < GATE_HANDLES; i++)
        folded_handles[i] |= gate->wrote[i];
}

/* Compare all there is, if the guest waits for that. */
static void compare(void)
{
    static uint8_t all[SIZE];

    pthread_mutex_lock(&lock);
    if (to_compare && all_returned()) {
        MUST(folded == served);
        MUST(!memcmp(folded_by, served_by, sizeof(served_by)));
        for (int i = 0; i < REPLICAS; i++) {
            MUST(counted(&reads_took[i]) == served_by[i].reads);
            MUST(counted(&writes_took[i]) == served_by[i].writes);
        }
        memset(reads_took, 0, sizeof(reads_took));
        memset(writes_took, 0, sizeof(writes_took));
        MUST(!memcmp(folded_handles, served_handles, sizeof(served_handles)));
        if (memcmp(folded_chunks, served_chunks, sizeof(served_chunks)))
            fail("the journal names other chunks than those that C wrote to");
        for (int i = 0; i < REPLICAS; i++) {
            MUST(pread(replica_fd[i], all, SIZE, 0) == SIZE);
            if (memcmp(all, content, SIZE))
                fail("a replica has other data than what was written");
        }
        folded = served = 0;
        memset(folded_by, 0, sizeof(folded_by));
        memset(served_by, 0, sizeof(served_by));
        memset(folded_handles, 0, sizeof(folded_handles));
        memset(served_handles, 0, sizeof(served_handles));
        memset(folded_chunks, 0, sizeof(folded_chunks));
        memset(served_chunks, 0, sizeof(served_chunks));
        to_compare = 0;
        alarm(FOR_EVER_S);
        pthread_cond_signal(&compared);
    }
    pthread_mutex_unlock(&lock);
}

/* Let the queue become full, and see that the leader waits then. */
static void await_full_queue(uint64_t received)
{
    for (int looks = 0; messages_read < received + QUEUE_MAX + 1; looks++) {
        if (looks > 200) /* the guest has no more */
            return;
        pass_us(100);
    }
    pass_us(2000);
    MUST(messages_read == received + QUEUE_MAX + 1);
}

/* Serve what is in the queue, or a part of it; whether the session lasts. */
static int serve_queue(uint64_t *received)
{
    static uint8_t message[REQUEST_MAX + 8192];
    uint64_t most = below(4) ? UINT64_MAX : 1 + below(3);

    if (scenario.bursts && loop_pending() && below(2))
        await_full_queue(*received);
    for (; most; most--) {
        if (!scenario.asleep && below(2) && !loop_pending()) /* the bell stays rung: no harm */
            return 1;
        int length = loop_receive(message, sizeof(message));
        if (length == -EAGAIN)
            return 1;
        if (length <= 0) {
            MUST(length == -scenario.broken);
            return 0;
        }
        ++*received;
        serve_long(message, length);
    }
    return 1;
}

static void await_something(void)
{
    struct pollfd readable[] = {{.fd = bell, .events = POLLIN}, {.fd = nudge, .events = POLLIN}};
    struct timespec limit = {.tv_nsec = below(3000000)};
    uint64_t nudges;

    MUST(ppoll(readable, 2, scenario.asleep ? NULL : &limit, NULL) >= 0);
    if (readable[1].revents)
        MUST(__real_read(nudge, &nudges, sizeof(nudges)) == sizeof(nudges));
}

static void stand_in(void)
{
    uint64_t received = 0;
    int lasts = 1;

    memset(gate, POISON, sizeof(*gate));
    while (lasts || !all_returned()) {
        if (publish())
            loop_open();
        await_something();
        int anything = loop_close();
        fold();
        if (anything && !below(4)) /* between the takeover and the look at it */
            returns_within_ms(20);
        if (anything)
            look_at_servers();
        give_copies();
        memset(gate, POISON, sizeof(*gate));
        if (!all_returned() && scenario.stuck && !below(scenario.asleep ? 2 : 4)) /* while awake */
            returns_within_ms(20);
        if (!below(4))
            pass_us(below(600));
        if (lasts)
            lasts = serve_queue(&received);
        compare();
    }
    struct pollfd rung = {.fd = bell, .events = POLLIN};
    MUST(poll(&rung, 1, 0) == 1); /* for every task that waits for the end */
}

static void too_long(int number)
{
    (void)number;
    static const char text[] = ": a request has no reply\n";
    if (write(2, scenario.name, strlen(scenario.name)) < 0 || write(2, text, sizeof(text) - 1) < 0)
        _exit(3);
    _exit(2);
}

static void run_scenario(void)
{
    int pair[2], room = 1 << 20;
    pthread_t guest;

    signal(SIGPIPE, SIG_IGN);
    signal(SIGALRM, too_long);
    alarm(FOR_EVER_S);
    MUST(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
    fuse_fd = pair[0];
    guest_fd = pair[1];
    MUST(!fcntl(fuse_fd, F_SETFL, O_NONBLOCK));
    for (int i = 0; i < 2; i++)
        MUST(!setsockopt(pair[i], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room)));
    bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    nudge = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    for (int i = 0; i < REPLICAS; i++) {
        replica_fd[i] = memfd_create("replica", MFD_CLOEXEC);
        MUST(replica_fd[i] >= 0 && !ftruncate(replica_fd[i], SIZE));
    }
    static const uint64_t sizes[] = {SECTOR, 4096, 16384};
    chunk_size = sizes[below(3)];
    gate = malloc(sizeof(*gate));
    MUST(!loop_start(gate, fuse_fd, bell, INODE));
    MUST(!__real_pthread_create(&guest, NULL, run_guest, NULL));
    stand_in();
    pthread_join(guest, NULL);
    printf("%-24s %6llu served, %5llu the long way, %4llu taken over, %3llu of them failed\n",
           scenario.name, (unsigned long long)served_in_all, (unsigned long long)long_in_all,
           (unsigned long long)taken_in_all, (unsigned long long)failed_in_all);
    /* A scenario in which nothing happens would show nothing. */
    MUST(scenario.bursts ? long_in_all > 0 : served_in_all > 0);
    MUST(taken_in_all > failed_in_all || !scenario.stuck);
    MUST(failed_in_all || !scenario.fails || scenario.stuck);
    MUST(hung_in_all || !scenario.hangs);
    fflush(stdout);
    _exit(0); /* the threads of the loop last as long as the process */
}

int main(int count, char **arguments)
{
    int failed = 0, status;

    if (count > 1)
        rounds = atoi(arguments[1]);
    if (count > 2)
        seed = strtoull(arguments[2], NULL, 10);
    for (size_t i = 0; i < sizeof(scenarios) / sizeof(*scenarios); i++) {
        if (count > 3 && strcmp(arguments[3], scenarios[i].name))
            continue;
        fflush(stdout);
        pid_t child = fork();
        if (!child) {
            scenario = scenarios[i];
            run_scenario();
        }
        waitpid(child, &status, 0);
        if (status) {
            fprintf(stderr, "%s: failed, status %#x\n", scenarios[i].name, status);
            failed = 1;
        }
    }
    return failed;
}
