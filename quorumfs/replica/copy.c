/* Copies a range from one file to another, without the interpreter.
 *
 * A copy in Python takes the interpreter's lock some dozens of times for a few MiB. A thread that the
 * system preempts while it holds the lock keeps the trio thread, and so a guest, waiting for as long
 * as it is not run again: several milliseconds on a busy machine.
 */

#include <errno.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(sizeof(off_t) == 8, "images are larger than 2 GiB");

/* What ended a copy before all was copied, besides errnos of writing. */
enum { UNREADABLE = 0, TRUNCATED = -1 };

/* Bytes copied at a time: small enough to stay in the processor's cache between the two calls, and
 * for a guest's write to the same file not to wait long. */
enum { BUFFER = 256 << 10 };

#define PUBLIC __attribute__((visibility("default")))

static int write_all(int fd, const char *data, size_t length, off_t offset)
{
	while (length) {
		ssize_t written = pwrite(fd, data, length, offset);

		if (written < 0 && errno == EINTR)
			continue;
		if (written < 0)
			return errno;
		if (!written)
			return EIO; /* a write made no progress */
		data += written;
		length -= written;
		offset += written;
	}
	return 0;
}

/* Copies length bytes at offset; returns how many were copied, and why no more in ended: UNREADABLE
 * if from cannot be read, or is at its end; TRUNCATED if to has become shorter than size; else the
 * errno of a write. to is looked at before each write: a write behind its end would make a truncated
 * file long again, with zeros where data was. */
PUBLIC uint64_t copy_range(int from, int to, uint64_t offset, uint64_t length, uint64_t size,
			   int *ended)
{
	char *buffer = malloc(length < BUFFER ? length : BUFFER);
	uint64_t copied = 0;

	*ended = UNREADABLE;
	while (buffer && copied < length) {
		uint64_t left = length - copied;
		ssize_t got = pread(from, buffer, left < BUFFER ? left : BUFFER, offset + copied);
		struct stat status;

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			break;
		if (fstat(to, &status)) {
			*ended = errno;
			break;
		}
		if ((uint64_t)status.st_size < size) {
			*ended = TRUNCATED;
			break;
		}
		*ended = write_all(to, buffer, got, offset + copied);
		if (*ended)
			break;
		copied += got;
		sched_yield(); /* a guest's request may wait for the processor */
	}
	free(buffer);
	return copied;
}
