/*
 * What libfuse offers and pyfuse3 does not pass on.
 *
 * This library is loaded with RTLD_GLOBAL before pyfuse3, so that pyfuse3's calls of two libfuse
 * functions arrive here first; each does its part and calls the real one. Only public API of
 * libfuse is used. Every part is independent of the others and can go on the day pyfuse3 has the
 * same; what pyfuse3 itself implements is never replaced.
 *
 *   part                      how
 *   fallocate, lseek          added to the operations; handed to a callback, which replies later
 *   durability of one write   the sync flag of a write request, as a high bit of the file handle
 *   parallel direct writes    set in the reply to open, for files opened with direct_io
 *   max_background            set while the connection is negotiated
 *   requests read at once     the pipe that libfuse would use is turned off there too
 *   another source            requests that the fast path has read, and leaves to pyfuse3
 *   the session's descriptor  kept when the session is made
 *   reads that do not block   EAGAIN, which pyfuse3 does not expect, becomes EINTR
 */

#define _GNU_SOURCE
#define FUSE_USE_VERSION 312

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <linux/fuse.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef FOPEN_PARALLEL_DIRECT_WRITES
#define FOPEN_PARALLEL_DIRECT_WRITES (1 << 6) /* Linux 6.2 */
#endif

/* Since then pyfuse3's call of fuse_session_new is compiled to one that names the version. */
#define VERSIONED_SESSION_NEW (FUSE_VERSION >= FUSE_MAKE_VERSION(3, 17))

/* The largest request that the fast path has room for, and room for any message. */
#define MESSAGE_MAX (1 << 20)
#define MESSAGE_ROOM (MESSAGE_MAX + 8192)

#define PUBLIC __attribute__((visibility("default")))

/* Handles given out by open() stay below these bits. */
#define DURABLE_WRITE (UINT64_C(1) << 63)
#define DIRECT_WRITE (UINT64_C(1) << 62)

enum call { CALL_FALLOCATE = 0, CALL_LSEEK = 1 };

/* mode: of fallocate; whence: of lseek. The callback sees to it that the request is answered. */
typedef void (*request_callback)(void *request, int kind, uint64_t handle, int64_t offset,
                                 int64_t length, int mode_or_whence);

/* The next message of the kernel, as fuse_session_receive_buf; -EAGAIN: none yet. */
typedef int (*receive_callback)(void *into, size_t room);

static request_callback callback;
static unsigned max_background;
static int bell = -1;
static receive_callback receive;
static struct fuse_lowlevel_ops theirs;
static struct fuse_session *session;
static int in_use;

static int real_session_fd(struct fuse_session *se)
{
    int (*real)(struct fuse_session *);

    *(void **)&real = dlsym(RTLD_NEXT, "fuse_session_fd");
    return real(se);
}

/* What pyfuse3 waits for. */
PUBLIC int fuse_session_fd(struct fuse_session *se)
{
    return receive && in_use ? bell : real_session_fd(se);
}

PUBLIC void quorumfs_shim_configure(request_callback on_request, unsigned background)
{
    callback = on_request;
    max_background = background;
}

/* Have messages come from `from`, while the descriptor `readable` is. */
PUBLIC void quorumfs_shim_set_source(receive_callback from, int readable)
{
    receive = from;
    bell = readable;
}

/* Whether pyfuse3's session was made through here, with structures that we know. */
PUBLIC int quorumfs_shim_in_use(void)
{
    return in_use;
}

/* What the kernel's requests are read from; -1 if the session was not made through here, or goes its
 * own way: then pyfuse3 alone may take a request. */
PUBLIC int quorumfs_shim_session_fd(void)
{
    return in_use ? real_session_fd(session) : -1;
}

PUBLIC int quorumfs_shim_reply_error(void *request, int error)
{
    return fuse_reply_err((fuse_req_t)request, error);
}

PUBLIC int quorumfs_shim_reply_offset(void *request, int64_t offset)
{
    return fuse_reply_lseek((fuse_req_t)request, offset);
}

static void shim_fallocate(fuse_req_t request, fuse_ino_t inode, int mode, off_t offset,
                           off_t length, struct fuse_file_info *file)
{
    (void)inode;
    callback(request, CALL_FALLOCATE, file->fh, offset, length, mode);
}

static void shim_lseek(fuse_req_t request, fuse_ino_t inode, off_t offset, int whence,
                       struct fuse_file_info *file)
{
    (void)inode;
    callback(request, CALL_LSEEK, file->fh, offset, 0, whence);
}

static void shim_write_buf(fuse_req_t request, fuse_ino_t inode, struct fuse_bufvec *data,
                           off_t offset, struct fuse_file_info *file)
{
    struct fuse_file_info marked = *file;
    if (file->flags & O_DSYNC)
        marked.fh |= DURABLE_WRITE;
    if (file->flags & O_DIRECT)
        marked.fh |= DIRECT_WRITE;
    theirs.write_buf(request, inode, data, offset, &marked);
}

static void shim_init(void *userdata, struct fuse_conn_info *connection)
{
    if (theirs.init)
        theirs.init(userdata, connection);
    /* Else each request takes two system calls, through a pipe, and pyfuse3 copies it anyway. */
    connection->want &= ~FUSE_CAP_SPLICE_READ;
    if (connection->max_write > MESSAGE_MAX)
        connection->max_write = MESSAGE_MAX;
    if (max_background)
        connection->max_background = max_background;
}

static const struct fuse_lowlevel_ops *extended(const struct fuse_lowlevel_ops *operations,
                                                size_t size)
{
    static struct fuse_lowlevel_ops ours;

    if (callback == NULL || size != sizeof(ours))
        return operations;
    theirs = ours = *operations;
    ours.init = shim_init;
    if (theirs.write_buf)
        ours.write_buf = shim_write_buf;
    if (!theirs.fallocate)
        ours.fallocate = shim_fallocate;
    if (!theirs.lseek)
        ours.lseek = shim_lseek;
    in_use = 1;
    return &ours;
}

#if VERSIONED_SESSION_NEW
PUBLIC struct fuse_session *fuse_session_new_versioned(struct fuse_args *args,
                                                       const struct fuse_lowlevel_ops *operations,
                                                       size_t size,
                                                       struct libfuse_version *version,
                                                       void *userdata)
{
    struct fuse_session *(*real)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                 struct libfuse_version *, void *);

    *(void **)&real = dlsym(RTLD_NEXT, "fuse_session_new_versioned");
    return session = real(args, extended(operations, size), size, version, userdata);
}
#else
PUBLIC struct fuse_session *fuse_session_new(struct fuse_args *args,
                                             const struct fuse_lowlevel_ops *operations,
                                             size_t size, void *userdata)
{
    struct fuse_session *(*real)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                 void *);

    *(void **)&real = dlsym(RTLD_NEXT, "fuse_session_new");
    return session = real(args, extended(operations, size), size, userdata);
}
#endif

/*
 * The descriptor does not block: a request may be gone between the look at the descriptor and this,
 * when the process that waited for it is killed. pyfuse3 tries again after EINTR only.
 */
PUBLIC int fuse_session_receive_buf(struct fuse_session *se, struct fuse_buf *buffer)
{
    static int (*real)(struct fuse_session *, struct fuse_buf *);
    int length;

    if (receive && in_use) {
        if (!buffer->mem && !(buffer->mem = malloc(MESSAGE_ROOM)))
            return -ENOMEM;
        length = receive(buffer->mem, MESSAGE_ROOM);
        if (!length)
            fuse_session_exit(se);
        if (length > 0) {
            buffer->size = length;
            buffer->flags = 0;
        }
        return length == -EAGAIN ? -EINTR : length;
    }
    if (real == NULL)
        *(void **)&real = dlsym(RTLD_NEXT, "fuse_session_receive_buf");
    length = real(se, buffer);
    return length == -EAGAIN ? -EINTR : length;
}

PUBLIC int fuse_reply_open(fuse_req_t request, const struct fuse_file_info *file)
{
    int (*real)(fuse_req_t, const struct fuse_file_info *);

    if (in_use && file->direct_io) {
        /* libfuse before 3.15 has no field for the flag; the reply is the kernel's structure. */
        struct fuse_open_out reply = {
            .fh = file->fh,
            .open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES,
        };
        return fuse_reply_buf(request, (const char *)&reply, sizeof(reply));
    }
    *(void **)&real = dlsym(RTLD_NEXT, "fuse_reply_open");
    return real(request, file);
}
