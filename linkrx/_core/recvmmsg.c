/* Many packets per system call, with their metadata. */
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
#include "uncached.inc"
#include "recvmmsg.h"

#ifndef LRX_NEAR_MOST /* bytes of a near place; the fuzzer has smaller ones */
#define LRX_NEAR_MOST 2048u
#endif

#define CACHE_LINE 64u

/* How far ahead control messages are asked for, and how much of each: measured, see bench/README.md. */
#define MESSAGES_AHEAD 6
#define CONTROL_BYTES 72

struct lrx_recvmmsg {
    int fd;
    int metadata;
    int sender;
    uint32_t messages;
    uint32_t capacity;
    uint32_t near;        /* bytes of a packet that its near place holds */
    uint32_t near_stride; /* bytes from one near place to the next */
    uint64_t far_stride;  /* bytes from one far place to the next; 0: there are none */
    struct mmsghdr *headers;
    struct iovec (*iovecs)[2];
    struct sockaddr_ll *names;
    uint8_t *controls;
};

/* An odd number of cache lines: lines at a distance of a power of two push each other out of the cache. */
static uint32_t near_stride(uint32_t capacity)
{
    uint32_t near = capacity < LRX_NEAR_MOST ? capacity : LRX_NEAR_MOST;

    return (near + CACHE_LINE - 1) / CACHE_LINE / 2 * 2 * CACHE_LINE + CACHE_LINE;
}

static uint64_t far_stride(uint32_t capacity)
{
    return capacity > LRX_NEAR_MOST ? ((uint64_t)capacity + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE : 0;
}

struct lrx_recvmmsg *lrx_recvmmsg_open(int fd, uint32_t messages, uint32_t capacity, int metadata, int sender)
{
    struct lrx_recvmmsg *s;

    if (messages == 0 || messages > LRX_MESSAGES_MAX || capacity == 0) {
        errno = EINVAL;
        return NULL;
    }
    s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->fd = fd;
    s->metadata = metadata;
    s->sender = sender;
    s->messages = messages;
    s->capacity = capacity;
    s->near = capacity < LRX_NEAR_MOST ? capacity : LRX_NEAR_MOST;
    s->near_stride = near_stride(capacity);
    s->far_stride = far_stride(capacity);
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

        s->iovecs[k][0].iov_len = s->near;
        s->iovecs[k][1].iov_len = capacity - s->near;
        message->msg_iov = s->iovecs[k];
        message->msg_iovlen = capacity > s->near ? 2 : 1;
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

uint64_t lrx_recvmmsg_stride(uint32_t capacity)
{
    return near_stride(capacity) + far_stride(capacity);
}

/* Receive up to `wanted` packets with one system call: into near places from `near` on, and far places for longer packets.
 * The kernel changes the sizes of name and control, so reset them. */
static int receive(struct lrx_recvmmsg *s, uint8_t *near, uint8_t *far, uint32_t wanted)
{
    int got;

    for (uint32_t k = 0; k < wanted; k++) {
        s->iovecs[k][0].iov_base = near + (size_t)k * s->near_stride;
        s->iovecs[k][1].iov_base = far + (size_t)k * s->far_stride + s->near;
        if (s->metadata) {
            s->headers[k].msg_hdr.msg_namelen = sizeof *s->names;
            s->headers[k].msg_hdr.msg_controllen = CONTROL;
        }
    }
    do {
        /* No timeout: the kernel checks it only after a packet, so the call could block for ever. */
        got = recvmmsg(s->fd, s->headers, wanted, MSG_DONTWAIT | MSG_TRUNC, NULL);
    } while (got < 0 && errno == EINTR);
    return got < 0 ? -errno : got;
}

int lrx_recvmmsg_fill(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region,
                      uint32_t size)
{
    struct lrx_recvmmsg *s = state;
    const struct lrx_columns out = lrx_descriptors_at(descriptors, rows);
    const uint64_t fit = size / (s->near_stride + s->far_stride);
    uint32_t most = lrx_most(descriptors, rows);
    uint8_t *const memory = (uint8_t *)region;
    uint32_t far = 0, end = 0, n = 0, receives = 0, wanted;
    int got;

    most = most < fit ? most : (uint32_t)fit;
    if (most == 0)
        return -EMSGSIZE;
    if (s->far_stride)
        far = most * s->near_stride;
    do {
        wanted = most - n < s->messages ? most - n : s->messages;
        if (receives == 1)
            lrx_release_gil(descriptors);
        got = receive(s, memory + (size_t)n * s->near_stride, memory + far + (size_t)n * s->far_stride, wanted);
        receives += got > 0;
        for (uint32_t k = 0; got > 0 && k < (uint32_t)got; k++, n++) {
            uint32_t wire_length = s->headers[k].msg_len; /* MSG_TRUNC: may exceed what was kept */

            out.starts[n] = n * s->near_stride;
            out.lengths[n] = wire_length < s->capacity ? wire_length : s->capacity;
            if (out.lengths[n] > s->near) {
                uint32_t whole = far + (uint32_t)(n * s->far_stride);

                memcpy(memory + whole, memory + out.starts[n], s->near);
                out.starts[n] = whole;
            }
            if (end < lrx_align(out.starts[n] + out.lengths[n]))
                end = lrx_align(out.starts[n] + out.lengths[n]);
            if (s->metadata) {
                lrx_prefetch((uintptr_t)s->controls + (size_t)(k + MESSAGES_AHEAD) * CONTROL, CONTROL_BYTES);
                lrx_read_metadata(&s->headers[k].msg_hdr, &out, n, &wire_length, s->sender);
            }
            out.wire_lengths[n] = wire_length;
        }
        /* Fewer packets than wanted: the queue is empty. */
    } while ((uint32_t)got == wanted && n < most);
    if (got < 0 && got != -EAGAIN) {
        lrx_report_at(descriptors)->error = (uint32_t)-got;
        if (n == 0)
            return got;
    }
    return lrx_received(descriptors, region, n, receives, end);
}
