/* One packet per system call, many per call from Python. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "report.h"
#include "columns.inc"
#include "forbidden.inc"
#include "classify.h"
#include "metadata.inc"
#include "readv.h"

/* musl before 1.2.5 lacks both. The two halves of the offset are -1: the current position. */
#ifndef RWF_NOWAIT
#include <sys/syscall.h>
#define RWF_NOWAIT 0x00000008 /* linux/fs.h, since Linux 4.14 */
#define preadv2(fd, iov, count, offset, flags) \
    syscall(SYS_preadv2, fd, iov, (long)(count), (long)(offset), (long)(offset), flags)
#endif

/* The buffer, or the caller's buffers, and one byte more: a packet that reaches the extra byte is cut. */
static int lay_out(const struct lrx_readv *r, uint8_t *at, struct iovec *iov)
{
    int n = 0;

    for (uint32_t k = 0; k < r->sizes_count; k++) {
        iov[n].iov_base = at;
        iov[n++].iov_len = r->sizes[k];
        at += r->sizes[k];
    }
    iov[n].iov_base = at;
    iov[n++].iov_len = r->sizes_count ? 1 : (size_t)r->capacity + 1;
    return n;
}

/* The metadata of the packet that was received last. */
struct metadata {
    struct msghdr message;
    struct sockaddr_ll from;
    _Alignas(struct cmsghdr) uint8_t control[CONTROL];
};

/* O_NONBLOCK is not enough: it belongs to the open file, and every process that has the file may clear it. So the first read of a
 * fill has RWF_NOWAIT, because it may find nothing. On a TAP queue that costs 1.2 times a plain read(). If O_NONBLOCK is set
 * then, the other reads of the fill are `plain`. */
static ssize_t receive(const struct lrx_readv *r, uint8_t *at, bool plain, struct metadata *metadata)
{
    struct iovec iov[LRX_SIZES_MAX + 1];
    struct pollfd ready;
    struct msghdr message;

    switch (r->method) {
    case LRX_RECV:
        if (!r->sizes_count)
            return recv(r->fd, at, (size_t)r->capacity + 1, MSG_DONTWAIT | MSG_TRUNC);
        memset(&message, 0, sizeof message);
        message.msg_iov = iov;
        message.msg_iovlen = (size_t)lay_out(r, at, iov);
        return recvmsg(r->fd, &message, MSG_DONTWAIT | MSG_TRUNC);
    case LRX_RECVMSG:
        metadata->message = (struct msghdr){
            .msg_name = &metadata->from,
            .msg_namelen = sizeof metadata->from,
            .msg_iov = iov,
            .msg_iovlen = (size_t)lay_out(r, at, iov),
            .msg_control = metadata->control,
            .msg_controllen = sizeof metadata->control,
        };
        return recvmsg(r->fd, &metadata->message, MSG_DONTWAIT | MSG_TRUNC);
    case LRX_READ:
        if (plain)
            break;
        return preadv2(r->fd, iov, lay_out(r, at, iov), -1, RWF_NOWAIT);
    case LRX_POLL:
        ready.fd = r->fd;
        ready.events = POLLIN;
        /* A signal interrupts poll() even with a timeout of 0. Then the source may not be readable, and a read() could block. */
        switch (poll(&ready, 1, 0)) {
        case 0:
            errno = EAGAIN;
            return -1;
        case -1:
            return -1;
        }
        break;
    }
    /* A plain read() costs 0.8 of a readv() with one entry on a TAP queue. */
    if (!r->sizes_count)
        return read(r->fd, at, (size_t)r->capacity + 1);
    return readv(r->fd, iov, lay_out(r, at, iov));
}

int lrx_readv_fill(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region, uint32_t size)
{
    struct lrx_readv *r = state;
    const struct lrx_columns out = lrx_descriptors_at(descriptors, rows);
    uint8_t *memory = (uint8_t *)region;
    const uint32_t most = lrx_most(descriptors, rows);
    uint32_t cursor = 0, n = 0;
    struct metadata metadata;
    bool plain = false;
    int error = 0;

    if (r->sizes_count > LRX_SIZES_MAX)
        return -EINVAL;
    while (n < most && (uint64_t)cursor + r->capacity < size) {
        ssize_t got;

        if (n == LRX_FEW)
            lrx_release_gil(descriptors);
        if (n == 1 && r->method == LRX_READ) {
            int flags = fcntl(r->fd, F_GETFL);

            plain = flags >= 0 && flags & O_NONBLOCK;
        }
        got = receive(r, memory + cursor, plain, &metadata);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            /* A driver without RWF_NOWAIT, an old kernel, or a seccomp filter without preadv2(). */
            if ((errno == EOPNOTSUPP || is_forbidden(errno)) && r->method == LRX_READ && !plain) {
                r->method = LRX_POLL;
                continue;
            }
            if (errno != EAGAIN)
                error = errno;
            break;
        }
        uint32_t length = (size_t)got > r->capacity ? r->capacity : (uint32_t)got;
        out.starts[n] = cursor;
        out.lengths[n] = length;
        /* Only a socket reports the true length of a cut packet. */
        uint32_t wire_length = r->method == LRX_RECV || r->method == LRX_RECVMSG ? (uint32_t)got : length;
        if (r->method == LRX_RECVMSG)
            lrx_read_metadata(&metadata.message, &out, n, &wire_length, true);
        else
            out.flags[n] = 0;
        out.wire_lengths[n] = wire_length;
        if ((size_t)got > r->capacity)
            out.flags[n] |= LRX_TRUNCATED;
        n++;
        cursor = lrx_align(cursor + length);
    }
    lrx_report_at(descriptors)->error = (uint32_t)error;
    if (error && n == 0)
        return -error;
    return lrx_received(descriptors, region, n, n, cursor);
}
