/* Many packets per system call, with what the kernel tells about each. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/if_packet.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "report.h"
#include "columns.inc"
#include "classify.h"
#include "metadata.inc"
#include "recvmmsg.h"

/* From one packet's place to the next one's beyond what it may need: an odd number of cache lines apart, for lines at a distance
 * of a power of two push each other out of the cache. */
#define CACHE_LINE 64u

struct lrx_recvmmsg {
    int fd;
    int metadata;
    uint32_t messages;
    uint32_t capacity;
    uint32_t stride; /* from one packet to the next */
    struct mmsghdr *headers;
    struct iovec *iovecs;
    struct sockaddr_ll *names;
    uint8_t *controls;
};

struct lrx_recvmmsg *lrx_recvmmsg_open(int fd, uint32_t messages, uint32_t capacity, int metadata)
{
    struct lrx_recvmmsg *s;

    if (messages == 0 || messages > LRX_MESSAGES_MAX || capacity == 0 || capacity > UINT32_MAX - 2 * CACHE_LINE) {
        errno = EINVAL;
        return NULL;
    }
    s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->fd = fd;
    s->metadata = metadata;
    s->messages = messages;
    s->capacity = capacity;
    s->stride = lrx_recvmmsg_stride(capacity);
    s->headers = calloc(messages, sizeof *s->headers);
    s->iovecs = calloc(messages, sizeof *s->iovecs);
    s->names = calloc(messages, sizeof *s->names);
    s->controls = calloc(messages, CONTROL);
    if (!s->headers || !s->iovecs || !s->names || !s->controls) {
        lrx_recvmmsg_close(s);
        errno = ENOMEM;
        return NULL;
    }
    for (uint32_t k = 0; k < messages; k++) {
        struct msghdr *message = &s->headers[k].msg_hdr;

        s->iovecs[k].iov_len = capacity;
        message->msg_iov = &s->iovecs[k];
        message->msg_iovlen = 1;
        if (metadata) {
            message->msg_name = &s->names[k];
            message->msg_control = s->controls + (size_t)k * CONTROL;
        }
    }
    return s;
}

void lrx_recvmmsg_close(struct lrx_recvmmsg *s)
{
    if (!s)
        return;
    free(s->headers);
    free(s->iovecs);
    free(s->names);
    free(s->controls);
    free(s);
}

uint32_t lrx_recvmmsg_stride(uint32_t capacity)
{
    return (capacity + CACHE_LINE - 1) / CACHE_LINE / 2 * 2 * CACHE_LINE + CACHE_LINE;
}

/* So many packets to `region` and on. The kernel writes the sizes of name and control back, so both are set anew. */
static int receive(struct lrx_recvmmsg *s, uint8_t *region, uint32_t wanted)
{
    int got;

    for (uint32_t k = 0; k < wanted; k++) {
        s->iovecs[k].iov_base = region + (size_t)k * s->stride;
        if (s->metadata) {
            s->headers[k].msg_hdr.msg_namelen = sizeof *s->names;
            s->headers[k].msg_hdr.msg_controllen = CONTROL;
        }
    }
    do {
        /* No timeout: the kernel looks at it only after a packet, so it can wait for ever. */
        got = recvmmsg(s->fd, s->headers, wanted, MSG_DONTWAIT | MSG_TRUNC, NULL);
    } while (got < 0 && errno == EINTR);
    return got < 0 ? -errno : got;
}

int lrx_recvmmsg_fill(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region,
                      uint32_t size)
{
    struct lrx_recvmmsg *s = state;
    const struct lrx_columns out = lrx_descriptors_at(descriptors, rows);
    const uint32_t most = lrx_most(descriptors, rows);
    uint32_t end = 0, n = 0, receives = 0, wanted;
    int got;

    if (size < s->capacity)
        return -EMSGSIZE;
    do {
        const uint64_t room = size - (uint64_t)n * s->stride, fit = room < s->capacity ? 0 : 1 + (room - s->capacity) / s->stride;

        wanted = most - n < s->messages ? most - n : s->messages;
        wanted = wanted < fit ? wanted : (uint32_t)fit;
        if (receives == 1)
            lrx_tell_many(descriptors);
        got = receive(s, (uint8_t *)region + (size_t)n * s->stride, wanted);
        receives += got > 0;
        for (uint32_t k = 0; got > 0 && k < (uint32_t)got; k++, n++) {
            uint32_t wire_length = s->headers[k].msg_len; /* MSG_TRUNC: may exceed what was kept */

            out.starts[n] = n * s->stride;
            out.lengths[n] = wire_length < s->capacity ? wire_length : s->capacity;
            end = lrx_align(out.starts[n] + out.lengths[n]);
            if (s->metadata)
                lrx_read_metadata(&s->headers[k].msg_hdr, &out, n, &wire_length);
            out.wire_lengths[n] = wire_length;
        }
        /* Fewer than were asked for: the queue was empty then. */
    } while ((uint32_t)got == wanted && n < most && (uint64_t)n * s->stride + s->capacity <= size);
    if (got < 0 && got != -EAGAIN) {
        lrx_report_at(descriptors)->error = (uint32_t)-got;
        if (n == 0)
            return got;
    }
    return lrx_received(descriptors, region, n, receives, region, end);
}
