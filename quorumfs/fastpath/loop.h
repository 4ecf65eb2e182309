/*
 * The threads of the fast path, and how Python and C hand requests to each other.
 *
 * One *server* at a time, the leader, reads the kernel's messages. It serves what the gate admits,
 * and puts everything else into a queue, as it came; a bell (an eventfd) wakes trio. When Python
 * takes over a request whose system call does not return, another server becomes the leader. The
 * late one leaves its outcome for Python, and then waits to be the leader again.
 *
 * A *guard* rings the bell when the leader is stuck: nothing else would wake Python then.
 */

#ifndef QUORUMFS_LOOP_H
#define QUORUMFS_LOOP_H

#include "gate.h"

#include <stdatomic.h>

enum {
    SERVERS = GATE_REPLICAS + 1, /* each replica may hold one, and one more is the leader */
    QUEUE_MAX = 8,              /* messages that wait for Python; then the leader waits */
};

/* The low byte of a server's phase; above it stands the place of the replica at work. */
enum phase {
    IDLE,      /* no request is under way */
    BRIEF,     /* some instructions on memory, while which Python waits: to decide, to note */
    BUSY,      /* a request is carried out */
    TAKEN,     /* Python took the request over; one system call has not returned */
    RETURNED,  /* that call has returned, with `outcome`, perhaps before Python saw it TAKEN;
                  Python releases the server */
    FAILED,    /* a write failed with `outcome`; Python takes it over, and releases the server */
};

/* The outcome of a system call that may be tried again, whole; else 0 or an errno. */
enum { TRY_AGAIN = -1 };

struct server {
    _Atomic uint32_t phase;
    int32_t outcome;
    struct request request; /* Python reads it in the phases TAKEN, RETURNED and FAILED */

    /* Only C's. */
    _Atomic uint64_t begun; /* requests so far: so the guard sees that one takes long */
    uint32_t message;       /* the buffer that the message is in */
    uint32_t length;        /* of the message */
    char *answer, *other;   /* what replicas answered */
};

/* Take messages from `fuse_fd` from now on, and ring the `bell`. Returns 0 or an errno. */
int loop_start(struct gate *gate, int fuse_fd, int bell, uint64_t inode);

/* Let C serve; the gate was filled in. */
void loop_open(void);

/*
 * Let C serve no more. Returns whether any server is TAKEN anew, RETURNED or FAILED. If the leader
 * is TAKEN another server becomes the leader: messages are read whether or not the gate is opened.
 */
int loop_close(void);

/* All servers, SERVERS of them. */
struct server *loop_servers(void);

/* The sizes of struct gate (above 16 bits) and struct server, which Python must agree on. */
size_t loop_sizes(void);

/* Go on with a server whose outcome was read. */
void loop_release(struct server *server);

/* Put the message of a read that was taken over into the queue: it goes the long way. */
void loop_requeue(struct server *server);

/* Whether loop_receive() would give a message, or the end of the session. */
int loop_pending(void);

/* Give back the memory of messages that were served. */
void loop_trim(void);

/*
 * Copy the next message of the queue to `into`, of `room` bytes. Returns its length; 0 when the
 * file system is unmounted; a negative errno: -EAGAIN while there is none.
 */
int loop_receive(void *into, size_t room);

/* Answer a request that Python took over: `error` is an errno or 0, the data goes with 0. */
int loop_reply(uint64_t unique, int error, const void *data, size_t length);

#endif
