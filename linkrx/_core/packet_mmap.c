/* Packets from a ring that the kernel fills: no system call while they flow. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/if_packet.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "packet.h"
#include "columns.inc"
#include "classify.h"
#include "far_memory.inc"
#include "packet_mmap.h"

/* linux/if_ether.h; its other contents clash with the C library's. */
#define ETH_P_8021Q 0x8100

/* tpacket_rcv() in net/packet/af_packet.c: struct virtio_net_hdr, without the num_buffers of larger headers, ends
 * where the frame starts, whatever PACKET_VNET_HDR_SZ is. */
#define VNET_WRITTEN 10
#define VNET_MOST 12 /* what packet_setsockopt() takes for PACKET_VNET_HDR_SZ */

#define PAGE_LEAST 4096 /* of all Linux architectures */

/* A bit of block_status that the kernel neither sets nor looks at: prb_curr_blk_in_use() asks for TP_STATUS_USER alone. */
#define LENT (1u << 16)

/* What the kernel wrote is looked at once, so that what is checked is what is used. */
#define ONCE(field) (*(const volatile __typeof__(field) *)&(field))

struct lrx_packet_mmap {
    int fd;
    int version;     /* PACKET_VERSION before */
    dev_t device;    /* with the inode: which socket the descriptor is */
    ino_t inode;
    uint8_t *ring;
    size_t mapped;
    uint32_t block_size;
    uint32_t blocks;
    uint32_t vnet;
    uint32_t capacity;
    uint32_t wanted;
    uint32_t lends;
    const uint8_t *described; /* the block that the last lend was about */
    uint32_t block;  /* the one that is read now, or next */
    uint32_t left;   /* packets of it that wait; 0: it is not begun */
    uint32_t offset; /* of the first of these in the block */
    int error;       /* of the socket, to be told when the ring is empty */
    uint64_t drops;
    uint64_t freezes;
};

static int set_ring(const struct lrx_packet_mmap *s, uint32_t retire_ms)
{
    /* V3 packs packets as they come; one frame per block satisfies packet_set_ring(), which wants the numbers to
     * agree, whatever PACKET_RESERVE is. */
    struct tpacket_req3 request = {
        .tp_block_size = s->block_size,
        .tp_block_nr = s->blocks,
        .tp_frame_size = s->blocks ? s->block_size : 0,
        .tp_frame_nr = s->blocks,
        .tp_retire_blk_tov = retire_ms,
    };

    return setsockopt(s->fd, SOL_PACKET, PACKET_RX_RING, &request, sizeof request);
}

/* PACKET_STATISTICS begins anew with each reading. */
static void count(struct lrx_packet_mmap *s)
{
    struct tpacket_stats_v3 since;
    socklen_t size = sizeof since;

    if (getsockopt(s->fd, SOL_PACKET, PACKET_STATISTICS, &since, &size) == 0 && size == sizeof since) {
        s->drops += since.tp_drops;
        s->freezes += since.tp_freeze_q_cnt;
    }
}

/* The owner of a borrowed socket may have closed it, and another file got its number. */
static bool is_same_socket(const struct lrx_packet_mmap *s)
{
    struct stat now;

    return fstat(s->fd, &now) == 0 && now.st_dev == s->device && now.st_ino == s->inode;
}

static void take_off(struct lrx_packet_mmap *s)
{
    if (s->ring && !s->lends)
        munmap(s->ring, s->mapped); /* first: a ring that is mapped cannot be removed (EBUSY) */
    if (is_same_socket(s)) {
        s->blocks = s->block_size = 0;
        set_ring(s, 0);
        setsockopt(s->fd, SOL_PACKET, PACKET_VERSION, &s->version, sizeof s->version);
    }
}

/* packet_mmap() in net/packet/af_packet.c maps every page at once, but where memory is virtualized the host still
 * takes a fault, 1.5 us, at the first access to each. Not for the first lap of packets: here. */
static void touch(const struct lrx_packet_mmap *s)
{
    for (size_t at = 0; at < s->mapped; at += PAGE_LEAST)
        __atomic_fetch_or((uint32_t *)(s->ring + at), 0, __ATOMIC_RELAXED); /* a write that changes nothing */
}

struct lrx_packet_mmap *lrx_packet_mmap_open(int fd, uint32_t block_size, uint32_t blocks, uint32_t retire_ms,
                                             uint32_t vnet, uint32_t capacity, uint32_t wanted,
                                             uint32_t lends)
{
    struct lrx_packet_mmap *s = calloc(1, sizeof *s);
    const int version = TPACKET_V3;
    socklen_t size = sizeof s->version;
    struct stat now;
    int error;

    if (!s)
        return NULL;
    if (vnet > (lends && vnet ? VNET_WRITTEN : VNET_MOST)) {
        errno = EINVAL;
        goto refused;
    }
    s->fd = fd;
    s->block_size = block_size;
    s->blocks = blocks;
    s->mapped = (size_t)block_size * blocks;
    s->vnet = vnet;
    s->capacity = capacity;
    s->wanted = wanted;
    s->lends = lends;
    if (fstat(fd, &now) < 0 || getsockopt(fd, SOL_PACKET, PACKET_VERSION, &s->version, &size) < 0 ||
        setsockopt(fd, SOL_PACKET, PACKET_VERSION, &version, sizeof version) < 0)
        goto refused;
    s->device = now.st_dev;
    s->inode = now.st_ino;
    if (set_ring(s, retire_ms) < 0) {
        error = errno;
        setsockopt(fd, SOL_PACKET, PACKET_VERSION, &s->version, sizeof s->version);
        errno = error;
        goto refused;
    }
    s->ring = mmap(NULL, s->mapped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (s->ring == MAP_FAILED) {
        error = errno;
        s->ring = NULL;
        take_off(s);
        errno = error;
        goto refused;
    }
    /* A child that had the ring mapped as well would keep the kernel from removing it. But what is lent must be
     * readable in the child too. */
    if (!lends)
        madvise(s->ring, s->mapped, MADV_DONTFORK);
    touch(s);
    count(s); /* what the socket dropped before is not the ring's */
    s->drops = s->freezes = 0;
    return s;

refused:
    error = errno;
    free(s);
    errno = error;
    return NULL;
}

void lrx_packet_mmap_close(struct lrx_packet_mmap *s)
{
    if (!s)
        return;
    take_off(s);
    free(s);
}

void lrx_packet_mmap_abandon(struct lrx_packet_mmap *s)
{
    free(s);
}

uint32_t lrx_packet_mmap_held(const struct lrx_packet_mmap *s)
{
    return s->left;
}

uint64_t lrx_packet_mmap_drops(struct lrx_packet_mmap *s)
{
    count(s);
    return s->drops;
}

uint64_t lrx_packet_mmap_freezes(struct lrx_packet_mmap *s)
{
    count(s);
    return s->freezes;
}

static struct tpacket_hdr_v1 *header_at(const struct lrx_packet_mmap *s, uint32_t block)
{
    return &((struct tpacket_block_desc *)(s->ring + (size_t)block * s->block_size))->hdr.bh1;
}

static struct tpacket_hdr_v1 *block_header(const struct lrx_packet_mmap *s)
{
    return header_at(s, s->block);
}

/* packet_rcv_has_room() in net/packet/af_packet.c finds room where the block that is open belongs to the kernel, and
 * for rollover one a quarter of the ring further on. */
static void set_all(struct lrx_packet_mmap *s, uint32_t status)
{
    for (uint32_t block = s->blocks; block-- > 0;) /* the open one last */
        __atomic_store_n(&header_at(s, block)->block_status, status, __ATOMIC_RELEASE);
}

void lrx_packet_mmap_shut(struct lrx_packet_mmap *s)
{
    set_all(s, TP_STATUS_USER);
}

void lrx_packet_mmap_start(struct lrx_packet_mmap *s)
{
    count(s);
    s->drops = s->freezes = 0; /* dropped here, and received by another member */
    set_all(s, TP_STATUS_KERNEL);
}

/* Begin the next block if the kernel has closed it. Blocks are filled in order, so no other can be. */
static bool begin_block(struct lrx_packet_mmap *s)
{
    struct tpacket_hdr_v1 *header = block_header(s);
    /* Behind this load everything that the kernel wrote before it closed the block is visible. Other bits than
     * TP_STATUS_USER tell why it was closed. */
    uint32_t status = __atomic_load_n(&header->block_status, __ATOMIC_ACQUIRE);

    if (!(status & TP_STATUS_USER) || status & LENT)
        return false;
    if (status & TP_STATUS_LOSING)
        count(s); /* while packets are lost, often enough that the kernel's 32 bits never wrap */
    s->left = ONCE(header->num_pkts);
    s->offset = ONCE(header->offset_to_first_pkt);
    return true;
}

static void next_block(struct lrx_packet_mmap *s)
{
    s->left = 0;
    if (++s->block == s->blocks)
        s->block = 0;
}

static void give_back(struct lrx_packet_mmap *s)
{
    struct tpacket_hdr_v1 *header = block_header(s);

    /* The kernel does this when it opens the block, which may be later; see pending_error(). */
    header->num_pkts = 0;
    /* Before this store everything that was read of the block has been read. */
    __atomic_store_n(&header->block_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
    next_block(s);
}

/* What the socket has to say besides packets: ENETDOWN. The kernel tells of a link that went down while packets
 * that came before are still in the open block, until the timer closes it. They are waited for: the kernel then
 * says that the socket is readable. */
static int pending_error(struct lrx_packet_mmap *s)
{
    socklen_t size = sizeof s->error;
    int error;

    if (!s->error && getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &s->error, &size) < 0)
        return errno;
    if (!s->error || (ONCE(block_header(s)->num_pkts) && !(ONCE(block_header(s)->block_status) & LENT)))
        return 0;
    error = s->error;
    s->error = 0;
    return error;
}

/* Where the packet at `offset` of the block lies: its first byte, or NULL for numbers that point out of the block,
 * which no kernel writes. */
static const uint8_t *frame_of(const struct lrx_packet_mmap *s, const uint8_t *block, uint32_t *snaplen)
{
    const struct tpacket3_hdr *header = (const struct tpacket3_hdr *)(block + s->offset);
    uint32_t mac;

    if ((uint64_t)s->offset + TPACKET3_HDRLEN > s->block_size || s->offset % _Alignof(struct tpacket3_hdr))
        return NULL;
    mac = ONCE(header->tp_mac);
    *snaplen = ONCE(header->tp_snaplen);
    if (mac < TPACKET3_HDRLEN + (s->vnet ? VNET_WRITTEN : 0) ||
        (uint64_t)s->offset + mac + *snaplen > s->block_size)
        return NULL;
    return block + s->offset + mac;
}

static void copy(const struct lrx_packet_mmap *s, uint8_t *to, const uint8_t *frame, uint32_t length)
{
    if (s->vnet) {
        uint8_t header[VNET_MOST] = {0};
        uint32_t head = length < s->vnet ? length : s->vnet;

        memcpy(header, frame - VNET_WRITTEN, VNET_WRITTEN);
        memcpy(to, header, head);
        to += head;
        length -= head;
    }
    lrx_copy_far(to, frame, length);
}

static uint16_t read_metadata(const struct lrx_packet_mmap *s, const struct tpacket3_hdr *header,
                              const struct lrx_columns *out, uint32_t n)
{
    uint32_t status = header->tp_status;
    uint16_t flags = 0;

    if (status & TP_STATUS_CSUMNOTREADY)
        flags |= LRX_CHECKSUM_UNFINISHED;
    /* A tag of 0 is legal: the flag tells, not the value. */
    if (status & TP_STATUS_VLAN_VALID) {
        flags |= LRX_VLAN;
        out->vlan_tcis[n] = (uint16_t)header->hv1.tp_vlan_tci;
        out->vlan_tpids[n] = status & TP_STATUS_VLAN_TPID_VALID ? header->hv1.tp_vlan_tpid : ETH_P_8021Q;
    }
    if (s->wanted & LRX_TIMESTAMP) {
        flags |= LRX_TIMESTAMP;
        out->timestamps[n] = (int64_t)header->tp_sec * 1000000000 + header->tp_nsec;
    }
    if (s->wanted & LRX_OUTGOING) {
        const struct sockaddr_ll *from =
            (const struct sockaddr_ll *)((const uint8_t *)header + TPACKET_ALIGN(sizeof *header));

        if (from->sll_pkttype == PACKET_OUTGOING)
            flags |= LRX_OUTGOING;
    }
    return flags;
}

int lrx_packet_mmap_fill(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region,
                         uint32_t size)
{
    struct lrx_packet_mmap *s = state;
    const struct lrx_columns out = lrx_descriptors_at(descriptors, rows);
    uint8_t *memory = (uint8_t *)region;
    uint32_t cursor = 0, n = 0, begun = 0;
    int error = 0;

    while (n < rows) {
        const uint8_t *block = s->ring + (size_t)s->block * s->block_size;
        const struct tpacket3_hdr *header;
        const uint8_t *frame;
        uint32_t snaplen, length, next;

        if (!s->left) {
            if (begun == s->blocks || (s->lends && n) || !begin_block(s))
                break;
            begun++;
            if (!s->left) { /* before a frame that is cut to a block's length, and with Linux before 3.19 */
                give_back(s);
                continue;
            }
        }
        header = (const struct tpacket3_hdr *)(block + s->offset);
        frame = frame_of(s, block, &snaplen);
        if (!frame) {
            (block_header(s)->block_status & LENT ? next_block : give_back)(s); /* what is lent goes back by its user */
            s->error = EIO;
            break;
        }
        lrx_prefetch_far((const uint8_t *)header, s->lends ? 0 : snaplen);
        length = s->vnet + snaplen < s->capacity ? s->vnet + snaplen : s->capacity;
        if (s->lends) {
            /* Before it is shown: from here on only who has the block lent gives it back. */
            __atomic_fetch_or(&block_header(s)->block_status, LENT, __ATOMIC_RELAXED);
            s->described = block;
            out.starts[n] = (uint32_t)(frame - s->vnet - block); /* lrx_packet_mmap_open() sees that all of it was written */
        } else {
            if ((uint64_t)cursor + length > size)
                break;
            copy(s, memory + cursor, frame, length);
            out.starts[n] = cursor;
            cursor = lrx_align(cursor + length);
        }
        out.lengths[n] = length;
        out.wire_lengths[n] = s->vnet + header->tp_len;
        out.flags[n] = read_metadata(s, header, &out, n);
        n++;
        next = ONCE(header->tp_next_offset);
        if (--s->left == 0 && s->lends)
            next_block(s);
        else if (s->left == 0)
            give_back(s);
        else if (next < TPACKET3_HDRLEN || next > s->block_size)
            s->offset = s->block_size; /* out of the block: found above */
        else
            s->offset += next;
    }
    /* Behind packets it is told as well, for nothing else may wake who polls. */
    if (n == 0 || (s->error && !s->left))
        error = pending_error(s);
    if (error)
        lrx_header_at(descriptors)[LRX_ERROR] = (uint32_t)error;
    if (n == 0)
        return -error;
    return lrx_received(descriptors, s->lends ? (uintptr_t)s->described : region, n, begun, region, cursor);
}

uintptr_t lrx_packet_mmap_block(const struct lrx_packet_mmap *s)
{
    return (uintptr_t)s->described;
}

void lrx_packet_mmap_return(void *block)
{
    struct tpacket_hdr_v1 *header = &((struct tpacket_block_desc *)block)->hdr.bh1;

    header->num_pkts = 0;
    __atomic_store_n(&header->block_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
}

int lrx_packet_mmap_lent(const struct lrx_packet_mmap *s)
{
    for (uint32_t block = 0; s->lends && block < s->blocks; block++)
        if (__atomic_load_n(&header_at(s, block)->block_status, __ATOMIC_RELAXED) & LENT)
            return 1;
    return 0;
}

uintptr_t lrx_packet_mmap_ring(const struct lrx_packet_mmap *s)
{
    return (uintptr_t)s->ring;
}

void lrx_packet_mmap_unmap(uintptr_t ring, size_t size)
{
    munmap((void *)ring, size);
}
