/* The ring: TPACKET_V3, packet(7). No system call is made while packets flow.
 *
 * The kernel and this process share memory, which is divided into blocks. The kernel fills one open block with frames, each
 * after a struct tpacket3_hdr. It closes the block when the next frame does not fit, or when the retire time
 * is over and the block has a frame, and opens the next block. A closed block has TP_STATUS_USER in its block_status and belongs
 * to the reader, until the reader stores TP_STATUS_KERNEL there: the release.
 *
 * - Blocks are filled, read and released in order. The load of block_status acquires what the kernel wrote before. The store
 *   that releases a block comes after all reads.
 * - If the next block is not released, the kernel drops frames, and marks blocks with TP_STATUS_LOSING.
 * - A large ring is read in place: frames are described where they lie, and their blocks are released with the slot of their
 *   batch (mechanism.h). A batch ends with the ring, because starts count forward. The frames of a small ring are copied, and a
 *   block is released at its end.
 * - poll(2) looks at the newest closed block only, and reports the ring as readable until that block is released. So all blocks
 *   are released before the receiver waits.
 * - Everything in the memory is read once and checked before it is used, although no kernel writes an offset out of a block.
 * - A forked child does not have the mapping. `guard` is 0 there, which every read in place checks first.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#include "report.h"
#include "columns.inc"
#include "classify.h"
#include "forbidden.inc"
#include "uncached.inc"
#include "ring.inc"
#include "sender.inc"
#include "packet_mmap.h"

/* How far ahead memory is asked for: measured, see bench/README.md. */
#define FRAMES_AHEAD 16
#define BYTES_AHEAD 2048
#define HEADERS 192

/* linux/if_ether.h, which conflicts with the C library's headers. */
#define ETH_P_8021Q 0x8100

/* In front of the frames of a block: BLK_HDR_LEN of net/packet/af_packet.c. tpacket_rcv() cuts what is longer than the rest. */
#define BLOCK_HEADER TPACKET_ALIGN(sizeof(struct tpacket_block_desc))

static struct tpacket_hdr_v1 *block_header(const struct lrx_ring *s)
{
    return header_at(s, s->block);
}

/* Whether the next block was read in place and is not released yet: all blocks of the ring were read. */
static bool is_unreleased(const struct lrx_ring *s)
{
    for (int k = 0; k < 2; k++)
        if ((s->block + s->blocks - s->first[k]) % s->blocks < s->slots.unreleased[k])
            return true;
    return false;
}

/* Begin the next block if the kernel has closed it. Blocks are filled in order, so no other can be. */
static bool begin_block(struct lrx_ring *s)
{
    const struct tpacket_hdr_v1 *header = block_header(s);
    uint32_t status;

    if (is_unreleased(s))
        return false;
    /* After this load, everything is visible that the kernel wrote before it closed the block. The other bits say why it was
     * closed. */
    status = __atomic_load_n(&header->block_status, __ATOMIC_ACQUIRE);
    if (!(status & TP_STATUS_USER))
        return false;
    if (status & TP_STATUS_LOSING)
        lrx_ring_count(s); /* while packets are lost, often enough that the kernel's 32 bits never wrap */
    s->left = ONCE(header->num_pkts);
    s->offset = ONCE(header->offset_to_first_pkt);
    return true;
}

/* Release a block to the kernel. */
static void release(struct lrx_ring *s, uint32_t block)
{
    struct tpacket_hdr_v1 *header = header_at(s, block);

    /* The kernel does this when it opens the block, which may be later; see pending_error(). */
    header->num_pkts = 0;
    /* Before this store everything that was read of the block has been read. */
    __atomic_store_n(&header->block_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
}

/* The block is read to its end. In place, it is released with the slot that it belongs to. */
static void end_block(struct lrx_ring *s)
{
    if (s->in_place)
        s->slots.unreleased[s->slots.turn]++;
    else
        release(s, s->block);
    s->left = 0;
    if (++s->block == s->blocks)
        s->block = 0;
}

void lrx_ring_release(void *state, uint32_t slot)
{
    struct lrx_ring *s = state;

    slot &= 1;
    if (!is_mapped(s))
        return;
    for (uint32_t n = 0; n < s->slots.unreleased[slot]; n++)
        release(s, (s->first[slot] + n) % s->blocks);
    s->slots.unreleased[slot] = 0;
}

/* The pending error of the socket, such as ENETDOWN, or 0. The kernel reports a link that went down while earlier packets are still
 * in the open block, until the timer closes it. Then the error waits for them: the kernel makes the socket readable again. An
 * error may also be reported `after` packets, but not EFBIG or the refusal of a seccomp filter: then another backend takes over,
 * and packets in the ring would be lost. */
static int pending_error(struct lrx_ring *s, bool after)
{
    socklen_t size = sizeof s->error;
    int error;

    /* If a seccomp filter forbids getsockopt(2): on a socket with a ring, recv(2) returns nothing but the error. */
    if (!s->error && getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &s->error, &size) < 0 &&
        recv(s->fd, NULL, 0, MSG_DONTWAIT) < 0 && errno != EAGAIN)
        s->error = errno;
    if (!s->error || is_unreleased(s) || ONCE(block_header(s)->num_pkts))
        return 0;
    if (after && (is_forbidden(s->error) || s->error == EFBIG))
        return 0;
    error = s->error;
    s->error = 0;
    return error;
}

/* The first byte of the packet at `offset` of the block. NULL for numbers that point out of the block, which no kernel writes. */
static const uint8_t *frame_of(const struct lrx_ring *s, const uint8_t *block, uint32_t *snaplen)
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

/* Whether the kernel cut the frame to the length of a block. */
static bool is_cut(const struct lrx_ring *s, const struct tpacket3_hdr *header, uint32_t snaplen)
{
    return snaplen < header->tp_len && (uint64_t)header->tp_mac + snaplen + BLOCK_HEADER >= s->block_size;
}

/* Where the header FRAMES_AHEAD frames after the current one is if all frames have its `size`: in this block or in the next. */
static uintptr_t header_ahead(const struct lrx_ring *s, uint32_t size)
{
    const bool here = s->left > FRAMES_AHEAD;
    const uint32_t next = s->block + 1 < s->blocks ? s->block + 1 : 0;
    const size_t block = (size_t)(here ? s->block : next) * s->block_size;

    return (uintptr_t)s->memory + block +
           (here ? s->offset + (size_t)FRAMES_AHEAD * size : BLOCK_HEADER + (size_t)(FRAMES_AHEAD - s->left) * size);
}

static void copy(const struct lrx_ring *s, uint8_t *to, const uint8_t *frame, uint32_t length)
{
    if (s->vnet) {
        uint8_t header[VNET_MOST] = {0};
        uint32_t head = length < s->vnet ? length : s->vnet;

        memcpy(header, frame - VNET_WRITTEN, VNET_WRITTEN);
        memcpy(to, header, head);
        to += head;
        length -= head;
    }
    lrx_copy_uncached(to, frame, length);
}

static uint16_t read_metadata(const struct lrx_ring *s, const struct tpacket3_hdr *header,
                              const struct lrx_columns *out, uint32_t n)
{
    const struct sockaddr_ll *from =
        (const struct sockaddr_ll *)((const uint8_t *)header + TPACKET_ALIGN(sizeof *header));
    uint32_t status = header->tp_status;
    uint16_t flags = 0;

    if (status & TP_STATUS_CSUMNOTREADY)
        flags |= LRX_CHECKSUM_UNFINISHED;
    /* The flag says that there is a tag, because a TCI of 0 is valid. */
    if (status & TP_STATUS_VLAN_VALID) {
        flags |= LRX_VLAN;
        out->vlan_tcis[n] = (uint16_t)header->hv1.tp_vlan_tci;
        out->vlan_tpids[n] = status & TP_STATUS_VLAN_TPID_VALID ? header->hv1.tp_vlan_tpid : ETH_P_8021Q;
    }
    if (s->wanted & LRX_TIMESTAMP) {
        flags |= LRX_TIMESTAMP;
        out->timestamps[n] = (int64_t)header->tp_sec * 1000000000 + header->tp_nsec;
    }
    out->interfaces[n] = (uint32_t)from->sll_ifindex;
    if (s->wanted & LRX_WANT_SENDER)
        lrx_read_sender(from, sizeof from->sll_addr, out, n);
    if (s->wanted & LRX_OUTGOING && from->sll_pkttype == PACKET_OUTGOING)
        flags |= LRX_OUTGOING;
    return flags;
}

int lrx_packet_mmap_fill(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region, uint32_t size)
{
    struct lrx_ring *s = state;
    const struct lrx_columns out = lrx_descriptors_at(descriptors, rows);
    const uint32_t slot = s->slots.turn;
    uint8_t *memory = (uint8_t *)region;
    /* In place, starts count from the first block of the batch. */
    const uint8_t *frames = s->in_place ? s->memory + (size_t)s->block * s->block_size : memory;
    const uint32_t most = s->in_place ? s->most : s->blocks;
    const uint32_t limit = lrx_most(descriptors, rows);
    uint32_t cursor = 0, n = 0, begun = 0, stride = 0;
    int error = 0;

    if (!is_mapped(s)) {
        lrx_report_at(descriptors)->error = EOWNERDEAD;
        return -EOWNERDEAD;
    }
    if (s->in_place) {
        if (s->slots.unreleased[slot])
            return -EBUSY; /* the caller must call lrx_ring_release() before */
        s->first[slot] = s->block;
        s->slots.frames[slot] = (uintptr_t)frames;
    }
    while (n < limit) {
        const uint8_t *block = s->memory + (size_t)s->block * s->block_size;
        const struct tpacket3_hdr *header;
        const uint8_t *frame;
        uint32_t snaplen, length, next;

        if (!s->left) {
            /* Starts count forward, so a batch in place ends with the ring. */
            if (begun == most || (s->in_place && begun && s->block == 0) || !begin_block(s))
                break;
            begun++;
            if (!s->left) { /* an empty block: before a frame that is cut to a block's length, and before Linux 3.19 */
                end_block(s);
                continue;
            }
        } else if (!begun) {
            begun = 1; /* the rest of a block */
        }
        header = (const struct tpacket3_hdr *)(block + s->offset);
        frame = frame_of(s, block, &snaplen);
        if (!frame) {
            end_block(s);
            s->error = EIO;
            break;
        }
        next = ONCE(header->tp_next_offset);
        length = s->vnet + snaplen < s->capacity ? s->vnet + snaplen : s->capacity;
        if (is_cut(s, header, snaplen) && length < s->capacity && !s->error)
            s->error = EFBIG;
        if (s->in_place) {
            /* Headers only, because the frame is not copied here. */
            stride = next ? next : stride; /* 0: the last frame of a block */
            lrx_prefetch(header_ahead(s, stride), HEADERS);
            out.starts[n] = (uint32_t)(frame - s->vnet - frames);
        } else {
            lrx_prefetch((uintptr_t)header + BYTES_AHEAD, HEADERS + length);
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
        if (--s->left == 0)
            end_block(s);
        else if (next < TPACKET3_HDRLEN || next > s->block_size)
            s->offset = s->block_size; /* out of the block: found above */
        else
            s->offset += next;
    }
    lrx_report_at(descriptors)->held = s->left;
    if (n == 0 && s->in_place)
        lrx_ring_release(s, slot); /* empty blocks */
    /* Also after packets, because the caller that polls may get no other event. */
    if (n == 0 || (s->error && !s->left))
        error = pending_error(s, n > 0);
    if (error)
        lrx_report_at(descriptors)->error = (uint32_t)error;
    if (n == 0)
        return -error;
    if (s->in_place)
        s->slots.turn ^= 1;
    return lrx_received(descriptors, (uintptr_t)frames, n, begun, cursor);
}
