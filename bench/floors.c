/* The floors: minimal C loops that receive with the same system calls, and functions that send frames to their queues. */
#define _GNU_SOURCE
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <linux/if_packet.h>
#include <time.h>
#include <unistd.h>

#define ROOM 65600
#define MESSAGES 64
#define LINE 64
#define PAGE 4096
#define STAMP 42   /* the offset of a frame's number: after the headers of Ethernet, IPv4 and UDP */

/* The received frames. If `checked` is set, which it is not in timed drains, the checksum is the Adler-32 of all bytes. */
struct account {
    uint64_t packets, bytes;
    uint32_t check, checked;
};

static inline void take(struct account *account, const uint8_t *frame, size_t size)
{
    account->packets++;
    account->bytes += size;
    if (account->checked) {
        uint32_t low = account->check & 0xffff, high = account->check >> 16;
        for (size_t k = 0; k < size; k++) {
            low = (low + frame[k]) % 65521;
            high = (high + low) % 65521;
        }
        account->check = high << 16 | low;
    }
}

/* read() packets into `size` bytes of memory, one after the other, until there are `wanted` or the queue is empty.
 *
 * The kernel's memory of large frames is page-aligned. A copy from there to the start of a page, or to the first 32 bytes of
 * a page, takes three times as long (65,535 bytes on an AMD EPYC: 33 us against 9), probably because the lower twelve bits
 * of the addresses make each load look as if it depends on the store before. No frame is placed there. */
void drain_read(int fd, uint8_t *memory, long size, long wanted, struct account *result)
{
    struct account account = *result;
    long cursor = LINE;

    while ((long)account.packets < wanted) {
        if (cursor + LINE + ROOM > size)
            cursor = LINE;
        if (cursor % PAGE == 0)
            cursor += LINE;
        ssize_t got = read(fd, memory + cursor, ROOM);
        if (got < 0)
            break;
        take(&account, memory + cursor, (size_t)got);
        cursor += (got + LINE - 1) & ~(LINE - 1);
    }
    *result = account;
}

/* recvmmsg() batches of 64 into fixed slots of `slot` bytes, with the metadata that linkrx asks for on a packet socket. */
static void drain_messages(int fd, uint8_t *memory, long slot, long wanted, struct account *result, int metadata)
{
    static struct mmsghdr headers[MESSAGES];
    static struct iovec iovecs[MESSAGES];
    static struct sockaddr_ll names[MESSAGES];
    static uint8_t controls[MESSAGES][128];
    struct account account = *result;

    memset(headers, 0, sizeof headers);
    for (int k = 0; k < MESSAGES; k++) {
        iovecs[k].iov_base = memory + (long)k * slot;
        iovecs[k].iov_len = (size_t)slot;
        headers[k].msg_hdr.msg_iov = &iovecs[k];
        headers[k].msg_hdr.msg_iovlen = 1;
        if (metadata) {
            headers[k].msg_hdr.msg_name = &names[k];
            headers[k].msg_hdr.msg_control = controls[k];
        }
    }
    while ((long)account.packets < wanted) {
        for (int k = 0; metadata && k < MESSAGES; k++) {
            headers[k].msg_hdr.msg_namelen = sizeof names[k];
            headers[k].msg_hdr.msg_controllen = sizeof controls[k];
        }
        int got = recvmmsg(fd, headers, MESSAGES, MSG_DONTWAIT | MSG_TRUNC, NULL);
        if (got < 0)
            break;
        for (int k = 0; k < got; k++)
            take(&account, iovecs[k].iov_base, headers[k].msg_len);
    }
    *result = account;
}

void drain_recvmmsg(int fd, uint8_t *memory, long slot, long wanted, struct account *result)
{
    drain_messages(fd, memory, slot, wanted, result, 0);
}

void drain_recvmmsg_metadata(int fd, uint8_t *memory, long slot, long wanted, struct account *result)
{
    drain_messages(fd, memory, slot, wanted, result, 1);
}

/* Set up a ring on a packet socket with linkrx's defaults. The kernel closes a block after a millisecond. */
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

/* Walk the ring from block `*next` until no closed block is left. It reads each packet's header, and no packet. It prefetches
 * the header eight packets ahead, whose address is a guess, which saves a third of the time. */
void walk_ring(uint8_t *ring, unsigned block_size, unsigned blocks, uint32_t *next, struct account *result)
{
    struct account account = *result;

    for (;;) {
        uint8_t *block = ring + (size_t)*next * block_size;
        struct tpacket_hdr_v1 *header = &((struct tpacket_block_desc *)block)->hdr.bh1;

        if (!(__atomic_load_n(&header->block_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER))
            break;
        uint8_t *at = block + header->offset_to_first_pkt;
        for (uint32_t left = header->num_pkts; left; left--) {
            struct tpacket3_hdr *packet = (struct tpacket3_hdr *)at;
            __builtin_prefetch(at + 8 * packet->tp_next_offset);
            take(&account, at + packet->tp_mac, packet->tp_snaplen);
            at += packet->tp_next_offset;
        }
        __atomic_store_n(&header->block_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
        *next = (*next + 1) % blocks;
    }
    *result = account;
}

static void stamp(uint8_t *frame, uint64_t number)
{
    for (int k = 0; k < 4; k++)
        frame[STAMP + k] = (uint8_t)(number >> (24 - 8 * k));
}

/* Send frames numbered from `first`, made from `distinct` frames in turn. Returns how many the kernel accepted. */
long fill(int fd, uint8_t *frames, long size, long distinct, long first, long packets)
{
    for (long k = first; k < first + packets; k++) {
        uint8_t *frame = frames + k % distinct * size;
        stamp(frame, (uint64_t)k);
        if (send(fd, frame, (size_t)size, 0) != size)
            return k - first;
    }
    return packets;
}

/* Send frames that are contiguous in memory: many per call on a socket, or one per write(). */
long send_all(int fd, uint8_t *frames, long size, long packets, long socket)
{
    struct mmsghdr messages[MESSAGES] = {0};
    struct iovec pieces[MESSAGES];
    long done = 0;

    while (done < packets) {
        int many = packets - done < MESSAGES ? (int)(packets - done) : MESSAGES;

        for (int k = 0; socket && k < many; k++) {
            pieces[k] = (struct iovec){frames + (done + k) * size, (size_t)size};
            messages[k].msg_hdr.msg_iov = &pieces[k];
            messages[k].msg_hdr.msg_iovlen = 1;
        }
        many = socket ? sendmmsg(fd, messages, (unsigned)many, MSG_DONTWAIT) : write(fd, frames + done * size, (size_t)size) > 0;
        if (many <= 0)
            break;
        done += many;
    }
    return done;
}

static uint64_t clock_of(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

struct flood {
    uint64_t accepted, refused, took_ns, cpu_ns;
};

/* Send as fast as possible for a duration. */
void flood(int fd, uint8_t *frame, long size, uint64_t duration_ns, struct flood *result)
{
    uint64_t cpu = clock_of(CLOCK_THREAD_CPUTIME_ID), start = clock_of(CLOCK_MONOTONIC), now = start;

    while (now - start < duration_ns) {
        for (int k = 0; k < 64; k++) {
            stamp(frame, result->accepted);
            if (send(fd, frame, (size_t)size, 0) == size)
                result->accepted++;
            else
                result->refused++;
        }
        now = clock_of(CLOCK_MONOTONIC);
    }
    result->took_ns = now - start;
    result->cpu_ns = clock_of(CLOCK_THREAD_CPUTIME_ID) - cpu;
}

#define SPIN_NS 100000   /* busy-wait this long before a frame is due, because a sleep may end that late */

/* Send frames as `fill` does, one every `interval_ns`. A late frame is sent at once. Returns how many the kernel accepted.
 * `late` counts frames that were sent late by an interval or more. */
long send_paced(int fd, uint8_t *frames, long size, long distinct, long packets, uint64_t interval_ns, uint64_t *late)
{
    uint64_t start = clock_of(CLOCK_MONOTONIC);

    for (long k = 0; k < packets; k++) {
        uint64_t due = start + (uint64_t)k * interval_ns, now;
        while ((now = clock_of(CLOCK_MONOTONIC)) < due) {
            if (due - now > SPIN_NS) {
                struct timespec pause = {0, (long)(due - now - SPIN_NS)};
                nanosleep(&pause, NULL);
            }
        }
        *late += now - due >= interval_ns;
        if (fill(fd, frames, size, distinct, k, 1) != 1)
            return k;
    }
    return packets;
}

/* Send frames one by one, with a pause before each in which the receiver falls asleep. Stores when each was sent. */
void send_singly(int fd, uint8_t *frame, long size, long packets, const uint64_t *pauses_ns, uint64_t *sent)
{
    for (long k = 0; k < packets; k++) {
        struct timespec pause = {0, (long)pauses_ns[k]};
        nanosleep(&pause, NULL);
        sent[k] = clock_of(CLOCK_MONOTONIC);
        if (send(fd, frame, (size_t)size, 0) != size)
            return;
    }
}

/* poll() and read() one packet after the other. Gives up after ten seconds without a packet. */
void receive_polled(int fd, uint8_t *memory, long packets, struct account *result)
{
    struct pollfd wait = {.fd = fd, .events = POLLIN};
    struct account account = *result;

    while ((long)account.packets < packets && poll(&wait, 1, 10000) == 1) {
        ssize_t got = read(fd, memory, ROOM);
        if (got < 0)
            break;
        take(&account, memory, (size_t)got);
    }
    *result = account;
}

/* poll() and read() packets. Stores when each was received. Gives up after ten seconds without a packet. */
void receive_singly(int fd, uint8_t *memory, long packets, uint64_t *arrived)
{
    struct pollfd wait = {.fd = fd, .events = POLLIN};

    for (long k = 0; k < packets; k++) {
        if (poll(&wait, 1, 10000) != 1 || read(fd, memory, ROOM) < 0)
            return;
        arrived[k] = clock_of(CLOCK_MONOTONIC);
    }
}
