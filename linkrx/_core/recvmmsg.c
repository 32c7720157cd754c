/* Many packets per system call, with what the kernel tells about each. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/if_packet.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>

#include "report.h"
#include "columns.inc"
#include "classify.h"
#include "far_memory.inc"
#include "recvmmsg.h"

/* linux/if_ether.h; its other contents clash with the C library's. */
#define ETH_P_8021Q 0x8100

/* PACKET_AUXDATA and SO_TIMESTAMPNS take 72 bytes. The kernel writes the former last, so there is room for all
 * that the owner of a borrowed socket may have switched on: drops, mark, priority, Wi-Fi status, other stamps. */
#define CONTROL 512

struct lrx_recvmmsg {
    int fd;
    int metadata;
    uint32_t messages;
    uint32_t slot;
    uint32_t capacity;
    uint32_t next;   /* the first message that is not in an arena yet */
    uint32_t ready;  /* messages that the last call received */
    size_t mapped;
    uint8_t *memory; /* slots, then the overflow of each */
    struct mmsghdr *headers;
    struct iovec *iovecs;
    struct sockaddr_ll *names;
    uint8_t *controls;
};

static uint8_t *slot_of(const struct lrx_recvmmsg *s, uint32_t k)
{
    return s->memory + (size_t)k * s->slot;
}

static uint8_t *overflow_of(const struct lrx_recvmmsg *s, uint32_t k)
{
    return s->memory + (size_t)s->messages * s->slot + (size_t)k * (s->capacity - s->slot);
}

struct lrx_recvmmsg *lrx_recvmmsg_open(int fd, uint32_t messages, uint32_t slot, uint32_t capacity,
                                       int metadata)
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
    s->messages = messages;
    s->capacity = capacity;
    s->slot = slot < capacity ? slot : capacity;
    s->mapped = (size_t)messages * capacity;
    s->memory = mmap(NULL, s->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                     -1, 0);
    if (s->memory == MAP_FAILED)
        s->memory = NULL;
    s->headers = calloc(messages, sizeof *s->headers);
    s->iovecs = calloc(messages, 2 * sizeof *s->iovecs);
    s->names = calloc(messages, sizeof *s->names);
    s->controls = calloc(messages, CONTROL);
    if (!s->memory || !s->headers || !s->iovecs || !s->names || !s->controls) {
        lrx_recvmmsg_close(s);
        errno = ENOMEM;
        return NULL;
    }
    for (uint32_t k = 0; k < messages; k++) {
        struct iovec *iov = s->iovecs + 2 * (size_t)k;
        struct msghdr *message = &s->headers[k].msg_hdr;

        iov[0].iov_base = slot_of(s, k);
        iov[0].iov_len = s->slot;
        iov[1].iov_base = overflow_of(s, k);
        iov[1].iov_len = capacity - s->slot;
        message->msg_iov = iov;
        message->msg_iovlen = capacity > s->slot ? 2 : 1;
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
    if (s->memory)
        munmap(s->memory, s->mapped);
    free(s->headers);
    free(s->iovecs);
    free(s->names);
    free(s->controls);
    free(s);
}

uint32_t lrx_recvmmsg_waiting(const struct lrx_recvmmsg *s)
{
    return s->ready - s->next;
}

/* Fill so many slots. The kernel writes the sizes of name and control back, so both are set anew. */
static int receive(struct lrx_recvmmsg *s, uint32_t wanted)
{
    int got;

    if (s->metadata) {
        for (uint32_t k = 0; k < wanted; k++) {
            s->headers[k].msg_hdr.msg_namelen = sizeof *s->names;
            s->headers[k].msg_hdr.msg_controllen = CONTROL;
        }
    }
    do {
        /* No timeout: the kernel looks at it only after a packet, so it can wait for ever. */
        got = recvmmsg(s->fd, s->headers, wanted, MSG_DONTWAIT | MSG_TRUNC, NULL);
    } while (got < 0 && errno == EINTR);
    s->next = 0;
    s->ready = got < 0 ? 0 : (uint32_t)got;
    return got < 0 ? -errno : got;
}

/* Whether a control message ends in what the kernel wrote, and is as long as its data. The C library does not look at
 * the first one's length, and not every one looks at the others'. */
static int holds(const struct msghdr *message, const struct cmsghdr *c, size_t size)
{
    size_t written = message->msg_controllen - (size_t)((const uint8_t *)c - (const uint8_t *)message->msg_control);

    return c->cmsg_len >= CMSG_LEN(size) && c->cmsg_len <= written;
}

static void read_metadata(const struct lrx_recvmmsg *s, uint32_t k, const struct lrx_columns *out, uint32_t n,
                          uint32_t *wire_length)
{
    struct msghdr *message = &s->headers[k].msg_hdr;
    uint16_t flags = 0;

    /* What an earlier packet had and this one has not must not show. */
    out->timestamps[n] = 0;
    out->vlan_tcis[n] = 0;
    out->vlan_tpids[n] = 0;
    out->interfaces[n] = 0;
    if (message->msg_namelen > offsetof(struct sockaddr_ll, sll_ifindex) + sizeof s->names[k].sll_ifindex)
        out->interfaces[n] = (uint32_t)s->names[k].sll_ifindex;
    /* Before Linux 5.1 the name ends with the address: 18 bytes on Ethernet. */
    if (message->msg_namelen > offsetof(struct sockaddr_ll, sll_pkttype) &&
        s->names[k].sll_pkttype == PACKET_OUTGOING)
        flags |= LRX_OUTGOING;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
        if (c->cmsg_level == SOL_PACKET && c->cmsg_type == PACKET_AUXDATA &&
            holds(message, c, sizeof(struct tpacket_auxdata))) {
            struct tpacket_auxdata aux;

            memcpy(&aux, CMSG_DATA(c), sizeof aux);
            /* A socket filter may have cut the packet; only here is its true length told. */
            if (aux.tp_len > aux.tp_snaplen)
                *wire_length += aux.tp_len - aux.tp_snaplen;
            if (aux.tp_status & TP_STATUS_CSUMNOTREADY)
                flags |= LRX_CHECKSUM_UNFINISHED;
            /* A tag of 0 is legal: the flag tells, not the value. */
            if (aux.tp_status & TP_STATUS_VLAN_VALID) {
                flags |= LRX_VLAN;
                out->vlan_tcis[n] = aux.tp_vlan_tci;
                out->vlan_tpids[n] =
                    aux.tp_status & TP_STATUS_VLAN_TPID_VALID ? aux.tp_vlan_tpid : ETH_P_8021Q;
            }
        } else if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SO_TIMESTAMPNS &&
                   holds(message, c, sizeof(struct timespec))) {
            struct timespec when;

            memcpy(&when, CMSG_DATA(c), sizeof when);
            flags |= LRX_TIMESTAMP;
            out->timestamps[n] = (int64_t)when.tv_sec * 1000000000 + when.tv_nsec;
        }
    }
    out->flags[n] = flags;
}

int lrx_recvmmsg_fill(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region,
                      uint32_t size)
{
    struct lrx_recvmmsg *s = state;
    const struct lrx_columns out = lrx_descriptors_at(descriptors, rows);
    uint8_t *memory = (uint8_t *)region;
    const uint32_t most = lrx_most(descriptors, rows);
    uint32_t cursor = 0, n = 0, receives = 0, wanted = 0;
    int got = 0;

    for (; n < most; s->next++, n++) {
        uint32_t k, wire_length, length, head;

        if (s->next == s->ready) {
            if (receives && (uint32_t)got < wanted)
                break; /* the queue was empty then */
            if (receives == 1)
                lrx_tell_many(descriptors);
            wanted = most - n < s->messages ? most - n : s->messages;
            got = receive(s, wanted);
            if (got <= 0)
                break;
            receives++;
        }
        k = s->next;
        wire_length = s->headers[k].msg_len; /* MSG_TRUNC: may exceed what was kept */
        length = wire_length < s->capacity ? wire_length : s->capacity;
        head = length < s->slot ? length : s->slot;
        if ((uint64_t)cursor + length > size) {
            if (n == 0)
                return -EMSGSIZE;
            break;
        }
        lrx_copy_far(memory + cursor, slot_of(s, k), head);
        if (length > head)
            memcpy(memory + cursor + head, overflow_of(s, k), length - head);
        out.starts[n] = cursor;
        out.lengths[n] = length;
        if (s->metadata)
            read_metadata(s, k, &out, n, &wire_length);
        out.wire_lengths[n] = wire_length;
        cursor = lrx_align(cursor + length);
    }
    lrx_report_at(descriptors)->held = s->ready - s->next;
    if (got < 0 && got != -EAGAIN) {
        lrx_report_at(descriptors)->error = (uint32_t)-got;
        if (n == 0)
            return got;
    }
    return lrx_received(descriptors, region, n, receives, region, cursor);
}
