/* The threads of the fast path. See loop.h for who does what, and gate.h for why it is right. */

#define _GNU_SOURCE

#include "loop.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fuse.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

_Static_assert(sizeof(off_t) == 8, "images are larger than 2 GiB");

#define PUBLIC __attribute__((visibility("default")))

#define US INT64_C(1000)
#define MS INT64_C(1000000)

/* A guest sends the next of a series of requests sooner than a thread is woken. */
#define SPIN_NS (50 * US)

/* Only if the last message came this soon: a slow guest must cost little, and an idle one nothing. */
#define WORTH_SPINNING_NS (100 * US)

/*
 * How long a request waits for the gate. Much longer than Python needs for a request: else the ones
 * that go the long way keep Python awake, and the gate closed, and so send the next the long way.
 */
#define CLOSED_NS (2 * MS)

/* How long Python waits for a request under way: as long as 1 MiB takes to a few replicas. */
#define UNDER_WAY_NS (2 * MS)

/* A server at one request for so long is stuck, as far as others are concerned. */
#define STUCK_NS (10 * MS)

/* Looks of the guard at a leader with nothing to do, until it waits to be woken. */
#define LOOKS 10

/* The head of a write is the longest; the kernel asks for room for more. */
#define MESSAGE_ROOM (REQUEST_MAX + 8192)

#define BUFFERS (SERVERS + QUEUE_MAX + SERVERS) /* at work, in the queue, queued again */

static struct gate *gate;
static struct server servers[SERVERS];
static char *buffers;
static int fuse_fd = -1, bell = -1;
static uint64_t file_inode;

static _Atomic uint32_t open_word;     /* 1 while the gate is open */
static _Atomic uint32_t offers;        /* kinds of requests (bits) served when it was last open */
static _Atomic uint32_t wait_for_open; /* servers that wait for that */
static _Atomic uint32_t closing;       /* Python waits for a phase to change */
static _Atomic uint32_t leader;        /* the number of the server that reads messages */
static _Atomic uint32_t guard_rests;   /* the guard waits to be woken */
static uint32_t running;               /* servers that have a thread */

/* The queue, and the buffers that nobody uses, under one lock. */
static pthread_mutex_t queue_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t queue_has_room = PTHREAD_COND_INITIALIZER;
static struct { uint32_t buffer, length; } queue[BUFFERS];
static uint32_t queue_first;
static _Atomic uint32_t queue_length;
static uint32_t spare[BUFFERS], spares;
static _Atomic int ended; /* 0 while the session lasts; 1: unmounted; a negative errno */

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void futex_wait(_Atomic uint32_t *word, uint32_t while_it_is, int64_t limit_ns)
{
    struct timespec limit = {.tv_sec = limit_ns / (1000 * MS), .tv_nsec = limit_ns % (1000 * MS)};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, while_it_is, limit_ns ? &limit : NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static void ring(void)
{
    uint64_t one = 1;
    while (write(bell, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
}

static char *buffer_at(uint32_t number)
{
    return buffers + (size_t)number * MESSAGE_ROOM;
}

/* Phases */

/* The outcome of a write that was cut short; for Python it is `TRY_AGAIN`. */
enum { PARTLY = -2 };

static uint32_t at(enum phase phase, uint32_t place)
{
    return phase | place << 8;
}

static enum phase phase_of(uint32_t word)
{
    return word & 0xFF;
}

static void set_phase(struct server *me, enum phase phase)
{
    atomic_store(&me->phase, at(phase, 0));
    if (atomic_load(&closing))
        futex_wake(&me->phase);
}

/* Whether the server is in the phase `next` now; not if Python took the request over. */
static int go_on(struct server *me, uint32_t before, uint32_t next)
{
    return atomic_compare_exchange_strong(&me->phase, &before, next);
}

/* Leave the outcome at the present place to Python, and wait until it was read. */
static void leave_to_python(struct server *me, enum phase phase, int outcome)
{
    uint32_t word = at(phase, atomic_load(&me->phase) >> 8);

    me->outcome = outcome == PARTLY ? TRY_AGAIN : outcome;
    atomic_store(&me->phase, word);
    if (atomic_load(&closing))
        futex_wake(&me->phase);
    ring();
    while (atomic_load(&me->phase) == word)
        futex_wait(&me->phase, word, 0);
}

/*
 * Whether the gate is open, and stays so until the phase changes. Waits a moment for that, unless
 * nothing of the kind was served when it was last open, as on far stores.
 */
static int enter(struct server *me)
{
    int64_t until = 0, now;

    for (;;) {
        atomic_store(&me->phase, at(BRIEF, 0));
        if (atomic_load(&open_word))
            return 1;
        set_phase(me, IDLE);
        if (!(atomic_load(&offers) & 1u << me->request.kind))
            return 0;
        now = now_ns();
        if (!until)
            until = now + CLOSED_NS;
        if (now >= until)
            return 0;
        atomic_fetch_add(&wait_for_open, 1);
        futex_wait(&open_word, 0, until - now);
        atomic_fetch_sub(&wait_for_open, 1);
    }
}

static void begin(struct server *me)
{
    atomic_fetch_add(&me->begun, 1);
    atomic_store(&me->phase, at(BUSY, 0));
    if (atomic_load(&guard_rests)) {
        atomic_store(&guard_rests, 0);
        futex_wake(&guard_rests);
    }
}

/* Replies */

static int reply(uint64_t unique, int error, const void *data, size_t length)
{
    struct fuse_out_header head = {
        .len = sizeof(head) + length, .error = -error, .unique = unique};
    struct iovec parts[] = {{&head, sizeof(head)}, {(void *)data, length}};

    /* An error says that nobody waits for the reply any more. */
    return writev(fuse_fd, parts, length ? 2 : 1) < 0 ? -errno : 0;
}

PUBLIC int loop_reply(uint64_t unique, int error, const void *data, size_t length)
{
    return reply(unique, error, data, length);
}

/* Reads and writes */

/* What the gate says of the replicas: a copy, because the gate is Python's once it is closed. */
struct asked {
    uint32_t count;
    uint64_t size; /* of the disk */
    struct gate_replica replica[GATE_REPLICAS];
    int64_t since;                   /* when the replica at work was asked; 0: it is not timed */
    uint64_t took_ns[GATE_REPLICAS]; /* by place: those before */
};

static void note_end(struct asked *asked, uint32_t place)
{
    int64_t now;

    if (!asked->since)
        return;
    now = now_ns();
    asked->took_ns[place] = now - asked->since;
    asked->since = now;
}

static int read_from(const struct gate_replica *replica, char *into, const struct request *request)
{
    struct iovec part = {into, request->length};
    /* What is not in the page cache is better read by many threads: the long way. */
    int flags = replica->memory ? 0 : RWF_NOWAIT;

    return preadv2(replica->fd, &part, 1, request->offset, flags) == (ssize_t)request->length;
}

static int write_to(struct server *me, uint32_t place, const struct asked *asked)
{
    const struct request *request = &me->request;
    int fd = asked->replica[place].fd;
    /* A write to a truncated image would hide that it lost its end (R10). */
    off_t end = lseek(fd, 0, SEEK_END); /* half the time of fstat; nobody searches through it */
    ssize_t written;

    if (end < 0)
        return errno;
    if ((uint64_t)end < asked->size || atomic_load(&me->phase) != at(BUSY, place))
        return TRY_AGAIN;
    written = pwrite(fd, request->data, request->length, request->offset);
    if (written < 0)
        return errno == EAGAIN || errno == EINTR ? TRY_AGAIN : errno;
    return written == (ssize_t)request->length ? 0 : PARTLY;
}

enum { LONG_WAY, SERVED };

static int serve_read(struct server *me, struct asked *asked)
{
    const struct request *request = &me->request;
    int agree = 1;
    uint32_t place = 0;

    for (; agree && place < asked->count; place++) {
        if (place && !go_on(me, at(BUSY, place - 1), at(BUSY, place)))
            goto taken;
        char *into = place ? me->other : me->answer;
        agree = read_from(&asked->replica[place], into, request) &&
                (!place || !memcmp(me->answer, me->other, request->length));
        note_end(asked, place);
    }
    if (!go_on(me, at(BUSY, place - 1), at(BRIEF, 0)))
        goto taken;
    if (agree)
        gate_note(gate, request, asked->since ? asked->took_ns : NULL);
    set_phase(me, IDLE);
    if (!agree)
        return LONG_WAY;
    reply(request->unique, 0, me->answer, request->length);
    return SERVED;
taken:
    leave_to_python(me, RETURNED, 0);
    return SERVED;
}

static int serve_write(struct server *me, struct asked *asked)
{
    const struct request *request = &me->request;
    struct fuse_write_out written = {.size = request->length};
    uint32_t place = 0;
    int outcome = 0;

    for (; place < asked->count; place++) {
        if (place && !go_on(me, at(BUSY, place - 1), at(BUSY, place)))
            goto taken;
        if ((outcome = write_to(me, place, asked)))
            break;
        note_end(asked, place);
    }
    if (outcome == TRY_AGAIN && !place) { /* nothing happened that the long way would not do */
        if (!go_on(me, at(BUSY, 0), at(BRIEF, 0)))
            goto taken;
        set_phase(me, IDLE);
        return LONG_WAY;
    }
    if (outcome) {
        if (!go_on(me, at(BUSY, place), at(BRIEF, place)))
            goto taken;
        atomic_store(&open_word, 0); /* replicas differ, which Python does not know yet */
        leave_to_python(me, FAILED, outcome);
        return SERVED;
    }
    if (!go_on(me, at(BUSY, place - 1), at(BRIEF, 0)))
        goto taken;
    gate_note(gate, request, asked->since ? asked->took_ns : NULL);
    set_phase(me, IDLE);
    reply(request->unique, 0, &written, sizeof(written));
    return SERVED;
taken:
    leave_to_python(me, RETURNED, outcome);
    return SERVED;
}

/* What a request of this kind is carried out with. */
static void copy_asked(enum request_kind kind, struct asked *asked)
{
    asked->count = kind == REQUEST_READ ? gate->readers : gate->writers;
    asked->size = gate->size;
    memcpy(asked->replica, kind == REQUEST_READ ? gate->reader : gate->writer,
           asked->count * sizeof(*asked->replica));
}

static int serve(struct server *me)
{
    struct asked asked;
    int timed;

    if (request_parse(buffer_at(me->message), me->length, file_inode, &me->request) ==
        REQUEST_OTHER)
        return LONG_WAY;
    if (!enter(me))
        return LONG_WAY;
    if (!gate_admits(gate, &me->request)) {
        set_phase(me, IDLE);
        return LONG_WAY;
    }
    copy_asked(me->request.kind, &asked);
    timed = gate_times(gate, me->request.kind);
    begin(me);
    asked.since = timed ? now_ns() : 0;
    return me->request.kind == REQUEST_READ ? serve_read(me, &asked) : serve_write(me, &asked);
}

/* The queue */

/* Put a message into the queue; the caller gets another buffer. Holds the lock. */
static uint32_t enqueue(uint32_t buffer, uint32_t length)
{
    uint32_t place = (queue_first + queue_length) % BUFFERS;

    queue[place].buffer = buffer;
    queue[place].length = length;
    atomic_fetch_add(&queue_length, 1);
    assert(spares);
    return spare[--spares];
}

static void hand_over(struct server *me)
{
    pthread_mutex_lock(&queue_lock);
    while (queue_length >= QUEUE_MAX)
        pthread_cond_wait(&queue_has_room, &queue_lock);
    me->message = enqueue(me->message, me->length);
    ring(); /* under the lock: whoever takes the message finds it rung, and silences it */
    pthread_mutex_unlock(&queue_lock);
}

static void end(int how)
{
    pthread_mutex_lock(&queue_lock);
    ended = how;
    pthread_mutex_unlock(&queue_lock);
    ring();
}

PUBLIC void loop_requeue(struct server *server)
{
    pthread_mutex_lock(&queue_lock);
    /* The server may still write into its answer, but no more into its message. */
    server->message = enqueue(server->message, server->length);
    pthread_mutex_unlock(&queue_lock);
    ring();
}

PUBLIC int loop_pending(void)
{
    return atomic_load(&queue_length) || atomic_load(&ended);
}

/* Whether a server waits until Python has read its outcome. */
static int any_outcome(void)
{
    for (uint32_t number = 0; number < running; number++) {
        enum phase phase = phase_of(atomic_load(&servers[number].phase));
        if (phase == RETURNED || phase == FAILED)
            return 1;
    }
    return 0;
}

PUBLIC void loop_trim(void)
{
    pthread_mutex_lock(&queue_lock);
    for (uint32_t i = 0; i < spares; i++)
        madvise(buffer_at(spare[i]), MESSAGE_ROOM, MADV_DONTNEED);
    pthread_mutex_unlock(&queue_lock);
}

PUBLIC int loop_receive(void *into, size_t room)
{
    uint64_t rings;
    int length = -EAGAIN;

    pthread_mutex_lock(&queue_lock);
    if (queue_length) {
        uint32_t buffer = queue[queue_first].buffer;
        length = queue[queue_first].length;
        queue_first = (queue_first + 1) % BUFFERS;
        atomic_fetch_sub(&queue_length, 1);
        assert((size_t)length <= room);
        memcpy(into, buffer_at(buffer), length);
        spare[spares++] = buffer;
        pthread_cond_signal(&queue_has_room);
    } else if (ended) {
        length = ended == 1 ? 0 : ended;
    }
    /* After the end the bell stays rung, for every task that waits. */
    if (!queue_length && !ended && read(bell, &rings, sizeof(rings)) > 0 && any_outcome())
        ring(); /* that was not for the queue alone */
    pthread_mutex_unlock(&queue_lock);
    return length;
}

/* Threads */

/*
 * The length of the next message; 0 when unmounted; a negative errno.
 *
 * `spin`: whether to look for it for a while before the thread sleeps; kept for the next call.
 */
static ssize_t next_message(char *into, int *spin)
{
    int64_t began = 0, now;
    struct pollfd readable = {.fd = fuse_fd, .events = POLLIN};

    for (;;) {
        ssize_t length = read(fuse_fd, into, MESSAGE_ROOM);
        if (length >= 0)
            return length;
        switch (errno) {
        case ENODEV:
            return 0;
        case EINTR:
        case ENOENT: /* the request was gone before it was read */
            continue;
        case EAGAIN:
            break;
        default:
            return -errno;
        }
        now = now_ns();
        if (!began)
            began = now;
        if (*spin && now - began < SPIN_NS) {
            relax();
            continue;
        }
        poll(&readable, 1, -1);
        *spin = now_ns() - began < WORTH_SPINNING_NS;
    }
}

static void *run_server(void *argument)
{
    struct server *me = argument;
    uint32_t number = me - servers;
    int spin = 0;

    for (;;) {
        uint32_t leads = atomic_load(&leader);
        if (leads != number) {
            futex_wait(&leader, leads, 0);
            continue;
        }
        ssize_t length = next_message(buffer_at(me->message), &spin);
        if (length <= 0) {
            end(length ? length : 1);
            return NULL;
        }
        me->length = length;
        if (serve(me) == LONG_WAY) {
            hand_over(me);
            spin = 0; /* Python takes longer than that, and needs the processor */
        }
    }
}

static void *run_guard(void *unused)
{
    uint64_t seen = 0;
    int quiet = 0;
    struct timespec pause = {.tv_nsec = STUCK_NS};

    (void)unused;
    for (;;) {
        struct server *one = &servers[atomic_load(&leader)];
        uint64_t begun = atomic_load(&one->begun);
        int busy = phase_of(atomic_load(&one->phase)) == BUSY;
        if (busy && begun == seen)
            ring();
        quiet = busy || begun != seen ? 0 : quiet + 1;
        seen = begun;
        if (quiet < LOOKS) {
            clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
            continue;
        }
        quiet = 0;
        atomic_store(&guard_rests, 1);
        if (atomic_load(&one->begun) == seen)
            futex_wait(&guard_rests, 1, 0);
    }
    return NULL;
}

static int begin_thread(void *(*run)(void *), void *argument)
{
    pthread_t thread;
    sigset_t all, before;
    int error;

    /* Signals are Python's. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&thread, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error)
        pthread_detach(thread);
    return error;
}

/* What only Python calls */

static char *map_memory(size_t length)
{
    return mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                -1, 0);
}

static int begin_server(uint32_t number)
{
    struct server *server = &servers[number];
    char *answers = map_memory(2 * (size_t)REQUEST_MAX);
    int error;

    if (answers == MAP_FAILED)
        return errno;
    server->answer = answers;
    server->other = answers + REQUEST_MAX;
    server->message = spare[--spares];
    if ((error = begin_thread(run_server, server))) {
        spares++;
        munmap(answers, 2 * (size_t)REQUEST_MAX);
    }
    return error;
}

PUBLIC int loop_start(struct gate *its_gate, int fd, int its_bell, uint64_t inode)
{
    int error;

    assert(fuse_fd < 0);
    gate = its_gate;
    fuse_fd = fd;
    bell = its_bell;
    file_inode = inode;
    buffers = map_memory((size_t)BUFFERS * MESSAGE_ROOM);
    if (buffers == MAP_FAILED)
        return errno;
    for (spares = 0; spares < BUFFERS; spares++)
        spare[spares] = spares;
    if ((error = begin_thread(run_guard, NULL)) || (error = begin_server(0)))
        return error;
    running = 1;
    return 0;
}

PUBLIC struct server *loop_servers(void)
{
    return servers;
}

PUBLIC size_t loop_sizes(void)
{
    return sizeof(struct gate) << 16 | sizeof(struct server);
}

PUBLIC void loop_open(void)
{
    atomic_store(&offers, (gate->readers ? 1u << REQUEST_READ : 0) |
                              (gate->writers ? 1u << REQUEST_WRITE : 0));
    atomic_store(&open_word, 1);
    if (atomic_load(&wait_for_open))
        futex_wake(&open_word);
}

/* Have another server read the messages if the leader is stuck. */
static void replace_leader(void)
{
    uint32_t next;

    if (phase_of(atomic_load(&servers[atomic_load(&leader)].phase)) != TAKEN)
        return;
    for (next = 0; next < running; next++)
        if (atomic_load(&servers[next].phase) == at(IDLE, 0))
            break;
    if (next == SERVERS || (next == running && begin_server(next)))
        return; /* the next time, or when one has returned */
    running += next == running;
    atomic_store(&leader, next);
    futex_wake(&leader);
}

/* The phase of a server when its request has ended, or was taken over. */
static enum phase settle(struct server *server, int64_t until)
{
    uint32_t word;

    while (phase_of(word = atomic_load(&server->phase)) == BUSY || phase_of(word) == BRIEF) {
        int64_t left = until - now_ns();
        if (left > 0 || phase_of(word) == BRIEF)
            futex_wait(&server->phase, word, left > 0 ? left : MS);
        else if (atomic_compare_exchange_strong(&server->phase, &word, at(TAKEN, word >> 8)))
            return TAKEN;
    }
    return phase_of(word);
}

PUBLIC int loop_close(void)
{
    int64_t until = 0;
    int any = 0;

    atomic_store(&open_word, 0);
    atomic_store(&closing, 1);
    for (uint32_t number = 0; number < running; number++) {
        struct server *server = &servers[number];
        enum phase before = phase_of(atomic_load(&server->phase)), after = before;
        if (before == BUSY || before == BRIEF) {
            if (!until)
                until = now_ns() + UNDER_WAY_NS;
            after = settle(server, until);
        }
        any |= after == RETURNED || after == FAILED || (after == TAKEN && before != TAKEN);
    }
    atomic_store(&closing, 0);
    replace_leader();
    return any;
}

PUBLIC void loop_release(struct server *server)
{
    atomic_store(&server->phase, at(IDLE, 0));
    futex_wake(&server->phase);
}
