/* What the kernel allows: the barest loops in C that do the same receive. */
#define _GNU_SOURCE
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <linux/if_packet.h>
#include <unistd.h>

#define ROOM 65600
#define MESSAGES 64
#define SLOT 2048

/* read() one packet behind the other into `size` bytes until nothing is left. Returns the packets; the sum of
 * their lengths and of their first bytes proves that they were there. */
long drain_read(int fd, uint8_t *memory, long size, uint64_t *bytes)
{
    long packets = 0, cursor = 0;

    for (;;) {
        if (cursor + ROOM > size)
            cursor = 0;
        ssize_t got = read(fd, memory + cursor, ROOM);
        if (got < 0)
            return packets;
        *bytes += (uint64_t)got;
        cursor += (got + 7) & ~7;
        packets++;
    }
}

/* recvmmsg() batches of 64 into fixed slots; with metadata as linkrx asks for it on a packet socket. */
long drain_recvmmsg(int fd, uint8_t *memory, int metadata, uint64_t *bytes)
{
    static struct mmsghdr headers[MESSAGES];
    static struct iovec iovecs[MESSAGES];
    static struct sockaddr_ll names[MESSAGES];
    static uint8_t controls[MESSAGES][128];
    long packets = 0;

    memset(headers, 0, sizeof headers);
    for (int k = 0; k < MESSAGES; k++) {
        iovecs[k].iov_base = memory + (long)k * SLOT;
        iovecs[k].iov_len = SLOT;
        headers[k].msg_hdr.msg_iov = &iovecs[k];
        headers[k].msg_hdr.msg_iovlen = 1;
        if (metadata) {
            headers[k].msg_hdr.msg_name = &names[k];
            headers[k].msg_hdr.msg_control = controls[k];
        }
    }
    for (;;) {
        for (int k = 0; metadata && k < MESSAGES; k++) {
            headers[k].msg_hdr.msg_namelen = sizeof names[k];
            headers[k].msg_hdr.msg_controllen = sizeof controls[k];
        }
        int got = recvmmsg(fd, headers, MESSAGES, MSG_DONTWAIT | MSG_TRUNC, NULL);
        if (got < 0)
            return packets;
        for (int k = 0; k < got; k++)
            *bytes += headers[k].msg_len;
        packets += got;
        if (got < MESSAGES)
            return packets;
    }
}

static uint32_t next_block;

/* Put a ring on a packet socket, as linkrx does by default: 128 blocks of 256 KiB, closed every millisecond. */
uint8_t *make_ring(int fd, unsigned block_size, unsigned blocks)
{
    int version = TPACKET_V3;
    struct tpacket_req3 request = {
        .tp_block_size = block_size,
        .tp_block_nr = blocks,
        .tp_frame_size = block_size,
        .tp_frame_nr = blocks,
        .tp_retire_blk_tov = 1,
    };
    void *ring;

    next_block = 0;
    if (setsockopt(fd, SOL_PACKET, PACKET_VERSION, &version, sizeof version) < 0 ||
        setsockopt(fd, SOL_PACKET, PACKET_RX_RING, &request, sizeof request) < 0)
        return NULL;
    ring = mmap(NULL, (size_t)block_size * blocks, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (ring == MAP_FAILED)
        return NULL;
    for (size_t at = 0; at < (size_t)block_size * blocks; at += 4096)
        __atomic_fetch_or((uint32_t *)((uint8_t *)ring + at), 0, __ATOMIC_RELAXED);
    return ring;
}

void free_ring(uint8_t *ring, unsigned block_size, unsigned blocks)
{
    munmap(ring, (size_t)block_size * blocks);
}

/* Walk the ring until no closed block is left, reading each packet's header and nothing of the packet. */
long walk_ring(uint8_t *ring, unsigned block_size, unsigned blocks, uint64_t *bytes)
{
    long packets = 0;

    for (;;) {
        uint8_t *block = ring + (size_t)next_block * block_size;
        struct tpacket_hdr_v1 *header = &((struct tpacket_block_desc *)block)->hdr.bh1;

        if (!(__atomic_load_n(&header->block_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER))
            return packets;
        uint8_t *at = block + header->offset_to_first_pkt;
        for (uint32_t left = header->num_pkts; left; left--) {
            struct tpacket3_hdr *packet = (struct tpacket3_hdr *)at;
            *bytes += packet->tp_snaplen;
            at += packet->tp_next_offset;
            packets++;
        }
        __atomic_store_n(&header->block_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
        next_block = (next_block + 1) % blocks;
    }
}
