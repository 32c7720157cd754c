/* Fuzzes packet_mmap's fill: the ring is the input, with offsets and lengths as the kernel writes them and as it never
 * would. A slow walk through a copy of it says what must be received. Inputs that end with IN_PLACE have it read in place,
 * in two slots that are released in turn, out of turn, and too late. */
#define _GNU_SOURCE
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "fuzz.h"

static int fake_fstat(int fd, struct stat *found);
static int fake_getsockopt(int fd, int level, int name, void *value, socklen_t *size);
static int fake_setsockopt(int fd, int level, int name, const void *value, socklen_t size);
static void *fake_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset);
static int fake_munmap(void *memory, size_t size);
static int fake_madvise(void *memory, size_t size, int advice);

#define fstat fake_fstat
#define getsockopt fake_getsockopt
#define setsockopt fake_setsockopt
#define mmap fake_mmap
#define munmap fake_munmap
#define madvise fake_madvise
#include <ring.c>
#include <packet_mmap.c>

#define FD 77
#define VERSION 1           /* the socket's before, TPACKET_V2 */
#define BLOCKS_MOST 4
#define BLOCK_MOST 1024
#define PACKETS_MOST 15     /* of 68 bytes behind the 48 of the block */
#define ROWS_MOST 24
#define IN_PLACE 0x5A
#define PAGE 4096           /* of the guard */

/* The metadata that the core must report for a packet. */
struct reported {
    const uint8_t *frame;   /* in the copy */
    uint32_t block;         /* which one it lies in */
    uint32_t snaplen, wire_length, flags, vlan_tci, vlan_tpid;
    uint32_t interface, protocol, link_type, address_length;
    int cut;                /* to the length of a block */
    uint64_t address;
    int64_t timestamp;
};

struct block {
    enum { KERNELS, CLOSED, READ } owner; /* READ: to its end, in place, and not released */
    uint32_t claimed;       /* num_pkts */
    uint32_t good;          /* packets until numbers point out of the block */
    uint32_t begun, taken;
    struct reported reported[PACKETS_MOST];
    uint8_t copy[BLOCK_MOST]; /* as the kernel left it */
};

static struct {
    struct input *in;
    /* The socket. */
    int steps_left;         /* calls until one fails */
    int failed, version, has_ring, other;
    int error, error_asked; /* SO_ERROR, and whether asking for it fails */
    uint64_t drops, freezes;
    /* The ring. */
    uint8_t *memory, *guard;
    size_t mapped;
    uint32_t blocks, block_size, vnet, capacity, wanted;
    struct block block[BLOCKS_MOST];
    uint32_t filled, read;  /* which block each side is at */
    int open;               /* the kernel's has packets already */
    int damaged;            /* EIO or EFBIG is due */
    int in_place;
    const struct lrx_slots *slots_in_place;
    uint32_t most, turn;    /* blocks of a fill in place, and which slot that takes */
    struct { uint32_t first, blocks; } slots[2];
} kernel;

static int fails(int code)
{
    if (kernel.steps_left-- != 0)
        return 0;
    kernel.failed = errno = code;
    return 1;
}

static int fake_fstat(int fd, struct stat *found)
{
    MUST(fd == FD);
    if (fails(EBADF))
        return -1;
    memset(found, 0, sizeof *found);
    found->st_ino = kernel.other ? 6 : 5;
    return 0;
}

static int fake_getsockopt(int fd, int level, int name, void *value, socklen_t *size)
{
    struct tpacket_stats_v3 stats = {0};

    MUST(fd == FD);
    if (level == SOL_PACKET && name == PACKET_VERSION) {
        MUST(*size == sizeof(int));
        if (fails(ENOPROTOOPT))
            return -1;
        memcpy(value, &kernel.version, sizeof kernel.version);
    } else if (level == SOL_PACKET && name == PACKET_STATISTICS) {
        MUST(*size == sizeof stats);
        if (take(kernel.in, 15) == 1) { /* as of a socket of another version */
            *size = sizeof(struct tpacket_stats);
            return 0;
        }
        stats.tp_drops = take(kernel.in, 0xFFFFFFFF);
        stats.tp_freeze_q_cnt = take(kernel.in, 0xFF);
        stats.tp_packets = stats.tp_drops;
        kernel.drops += stats.tp_drops;
        kernel.freezes += stats.tp_freeze_q_cnt;
        memcpy(value, &stats, sizeof stats);
    } else {
        MUST(level == SOL_SOCKET && name == SO_ERROR && *size == sizeof(int));
        if (kernel.error_asked) {
            errno = kernel.error_asked;
            return -1;
        }
        memcpy(value, &kernel.error, sizeof kernel.error);
        kernel.error = 0;
    }
    return 0;
}

static int fake_setsockopt(int fd, int level, int name, const void *value, socklen_t size)
{
    struct tpacket_req3 request;

    MUST(fd == FD && level == SOL_PACKET && !kernel.other);
    if (name == PACKET_VERSION) {
        MUST(size == sizeof(int));
        if (kernel.has_ring) {
            errno = EBUSY;
            return -1;
        }
        if (!kernel.failed && fails(EINVAL))
            return -1;
        memcpy(&kernel.version, value, sizeof kernel.version);
        return 0;
    }
    MUST(name == PACKET_RX_RING && size == sizeof request && kernel.version == TPACKET_V3);
    memcpy(&request, value, size);
    if (kernel.memory) {
        errno = EBUSY;
        return -1;
    }
    if (request.tp_block_nr) {
        MUST(request.tp_block_nr == kernel.blocks && request.tp_block_size == kernel.block_size);
        /* packet_set_ring() */
        MUST(request.tp_block_size / request.tp_frame_size * request.tp_block_nr == request.tp_frame_nr);
        if (fails(ENOMEM))
            return -1;
    } else {
        MUST(!request.tp_frame_nr);
    }
    kernel.has_ring = request.tp_block_nr > 0;
    return 0;
}

static void *fake_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    MUST(!at && protection == (PROT_READ | PROT_WRITE) && !offset);
    if (fd == -1) {
        MUST(flags == (MAP_PRIVATE | MAP_ANONYMOUS) && size == PAGE && !kernel.guard);
        if (fails(ENOMEM))
            return MAP_FAILED;
        kernel.guard = exactly(size);
        memset(kernel.guard, 0, size);
        return kernel.guard;
    }
    MUST(fd == FD && kernel.has_ring);
    MUST(flags == (MAP_SHARED | MAP_POPULATE) && size == (size_t)kernel.blocks * kernel.block_size);
    if (fails(EAGAIN))
        return MAP_FAILED;
    kernel.mapped = size;
    kernel.memory = exactly(size);
    memset(kernel.memory, 0, size);
    return kernel.memory;
}

static int fake_munmap(void *memory, size_t size)
{
    if (memory == kernel.guard) {
        MUST(size == PAGE);
        free(memory);
        kernel.guard = NULL;
        return 0;
    }
    MUST(memory == kernel.memory && size == kernel.mapped);
    ASAN_UNPOISON_MEMORY_REGION(memory, size);
    free(memory);
    kernel.memory = NULL;
    return 0;
}

static int fake_madvise(void *memory, size_t size, int advice)
{
    if (memory == kernel.guard)
        MUST(size == PAGE && advice == MADV_WIPEONFORK);
    else
        MUST(memory == kernel.memory && size == kernel.mapped && advice == MADV_DONTFORK);
    return 0;
}

static uint8_t *at_block(uint32_t number)
{
    return kernel.memory + (size_t)number * kernel.block_size;
}

static struct tpacket_hdr_v1 *header_of(uint32_t number)
{
    return &((struct tpacket_block_desc *)at_block(number))->hdr.bh1;
}

/* Nobody may look at what lies in a block of the kernel's, its header apart. */
static void guard(void)
{
    const size_t head = sizeof(struct tpacket_block_desc);

    for (uint32_t k = 0; k < kernel.blocks; k++) {
        if (kernel.block[k].owner == KERNELS)
            ASAN_POISON_MEMORY_REGION(at_block(k) + head, kernel.block_size - head);
        else
            ASAN_UNPOISON_MEMORY_REGION(at_block(k) + head, kernel.block_size - head);
    }
}

static uint32_t number_at(const struct block *block, uint64_t at, size_t width)
{
    uint32_t number = 0;

    memcpy(&number, block->copy + at, width);
    return number;
}

/* From the copy of a block that is closed: which packets must be received of it. */
static void walk(struct block *block)
{
    const size_t lead = kernel.vnet ? 10 : 0;
    uint64_t at = number_at(block, 16, 4);

    block->claimed = number_at(block, 12, 4);
    block->good = block->begun = block->taken = 0;
    while (block->good < block->claimed) {
        struct reported *reported = &block->reported[block->good];
        const struct tpacket3_hdr *header;
        uint64_t mac, next;

        /* The packet's header, the address behind it, and the frame lie in the block. */
        if (at % 4 || at + 48 + 20 > kernel.block_size)
            break;
        header = (const void *)(block->copy + at);
        mac = number_at(block, at + 24, 2);
        reported->snaplen = number_at(block, at + 12, 4);
        if (mac < 48 + 20 + lead || at + mac + reported->snaplen > kernel.block_size)
            break;
        MUST(block->good < PACKETS_MOST);
        reported->frame = block->copy + at + mac;
        reported->block = (uint32_t)(block - kernel.block);
        reported->wire_length = kernel.vnet + header->tp_len;
        reported->cut = reported->snaplen < header->tp_len && mac + reported->snaplen + 48 >= kernel.block_size;
        reported->flags = 0;
        if (header->tp_status & TP_STATUS_CSUMNOTREADY)
            reported->flags |= LRX_CHECKSUM_UNFINISHED;
        if (header->tp_status & TP_STATUS_VLAN_VALID) {
            reported->flags |= LRX_VLAN;
            reported->vlan_tci = header->hv1.tp_vlan_tci & 0xFFFF;
            reported->vlan_tpid = header->tp_status & TP_STATUS_VLAN_TPID_VALID ? header->hv1.tp_vlan_tpid : 0x8100;
        }
        if (kernel.wanted & LRX_TIMESTAMP) {
            reported->flags |= LRX_TIMESTAMP;
            reported->timestamp = header->tp_sec * INT64_C(1000000000) + header->tp_nsec;
        }
        reported->interface = number_at(block, at + 48 + 4, 4); /* sll_ifindex */
        if (kernel.wanted & LRX_WANT_SENDER) {
            const uint8_t *from = block->copy + at + 48;
            uint32_t halen = from[11];

            reported->protocol = from[2] * 256u + from[3];
            reported->link_type = number_at(block, at + 48 + 8, 2);
            reported->address_length = halen < 8 ? halen : 8;
            reported->address = 0;
            memcpy(&reported->address, from + 12, reported->address_length);
        }
        if (kernel.wanted & LRX_OUTGOING && block->copy[at + 48 + 10] == PACKET_OUTGOING)
            reported->flags |= LRX_OUTGOING;
        block->good++;
        next = number_at(block, at, 4);
        at = next < 48 + 20 || next > kernel.block_size ? kernel.block_size : at + next;
    }
}

/* Mostly the true number; or one near an edge; or any. */
static uint32_t perhaps(uint32_t truth)
{
    switch (take(kernel.in, 31)) {
    case 1:
        return kernel.block_size - take(kernel.in, 160);
    case 2:
        return take(kernel.in, 160);
    case 3:
        return take(kernel.in, 0xFFFFFFFF);
    case 4:
        return truth + 1 + take(kernel.in, 16);
    default:
        return truth;
    }
}

/* The block that is next gets its packets, as many as the input says and as there is room for. */
static void write_block(void)
{
    struct input *in = kernel.in;
    uint8_t *block = at_block(kernel.filled);
    const size_t head = sizeof(struct tpacket_block_desc);
    uint32_t at = (uint32_t)head + 8 * (take(in, 7) == 1), packets = take(in, 5), made = 0, first = at;

    ASAN_UNPOISON_MEMORY_REGION(block, kernel.block_size);
    for (uint32_t k = (uint32_t)head; k < kernel.block_size; k++)
        block[k] = content(kernel.filled, k);
    for (; made < packets; made++) {
        struct tpacket3_hdr header = {0};
        struct sockaddr_ll from = {.sll_pkttype = (uint8_t)take(in, 5), .sll_ifindex = (int)(made * 7 + kernel.filled),
                                   .sll_protocol = (uint16_t)(made * 257),
                                   .sll_hatype = (uint16_t)made,
                                   .sll_halen = (uint8_t)(made % 12),
                                   .sll_addr = {1, 2, (uint8_t)made, 4, 5, 6, 7, 8}};
        uint32_t mac = 48 + 20 + (kernel.vnet ? 12 : 0) + take(in, 40), most;

        if (at + mac > kernel.block_size)
            break;
        most = kernel.block_size - at - mac;
        header.tp_snaplen = take(in, 3) ? take(in, most < 200 ? most : 200) : most;
        header.tp_next_offset = (mac + header.tp_snaplen + 15) & ~15u;
        header.tp_len = header.tp_snaplen + take(in, 3);
        header.tp_status = take(in, 0xFF) | TP_STATUS_USER;
        header.tp_sec = take(in, 0xFFFFFFFF);
        header.tp_nsec = take(in, 0xFFFF);
        header.hv1.tp_vlan_tci = take(in, 0xFFFF);
        header.hv1.tp_vlan_tpid = (uint16_t)take(in, 0xFFFF);
        uint32_t next = at + header.tp_next_offset;
        header.tp_next_offset = perhaps(header.tp_next_offset);
        header.tp_snaplen = perhaps(header.tp_snaplen);
        header.tp_mac = (uint16_t)perhaps(mac);
        memcpy(block + at, &header, sizeof header);
        memcpy(block + at + 48, &from, sizeof from);
        at = next;
        if (at + 48 + 20 > kernel.block_size) {
            made++;
            break;
        }
    }
    header_of(kernel.filled)->num_pkts = perhaps(made);
    header_of(kernel.filled)->offset_to_first_pkt = perhaps(first);
}

/* What the kernel does meanwhile: fill the next block if that is its own, close it, and say something else. */
static void let_kernel_work(void)
{
    for (uint32_t left = take(kernel.in, 2 * BLOCKS_MOST); left; left--) {
        struct block *block = &kernel.block[kernel.filled];

        if (block->owner != KERNELS)
            break;
        MUST(!(header_of(kernel.filled)->block_status & TP_STATUS_USER)); /* prb_curr_blk_in_use() */
        if (!kernel.open) {
            write_block();
            kernel.open = 1;
            continue;
        }
        ASAN_UNPOISON_MEMORY_REGION(at_block(kernel.filled), kernel.block_size);
        memcpy(block->copy, at_block(kernel.filled), kernel.block_size);
        walk(block);
        header_of(kernel.filled)->block_status =
            TP_STATUS_USER | (take(kernel.in, 1) ? TP_STATUS_BLK_TMO : 0) | (take(kernel.in, 1) ? TP_STATUS_LOSING : 0);
        block->owner = CLOSED;
        kernel.filled = (kernel.filled + 1) % kernel.blocks;
        kernel.open = 0;
    }
    if (take(kernel.in, 7) == 1)
        kernel.error = ENETDOWN;
    kernel.error_asked = take(kernel.in, 31) == 1 ? EBADF : 0;
}

static uint32_t kept(const struct reported *reported)
{
    uint32_t length = kernel.vnet + reported->snaplen;

    return length < kernel.capacity ? length : kernel.capacity;
}

static void to_next(struct block *block)
{
    block->owner = kernel.in_place ? READ : KERNELS;
    kernel.slots[kernel.turn].blocks += kernel.in_place;
    kernel.read = (kernel.read + 1) % kernel.blocks;
}

static void release_slot(uint32_t slot)
{
    for (uint32_t n = 0; n < kernel.slots[slot].blocks; n++) {
        struct block *block = &kernel.block[(kernel.slots[slot].first + n) % kernel.blocks];

        MUST(block->owner == READ);
        block->owner = KERNELS;
    }
    kernel.slots[slot].blocks = 0;
}

struct expected {
    uint32_t count, begun;
    const struct reported *reported[ROWS_MOST];
};

/* What a fill must receive; and so it is taken to have done. `begun`: blocks, of which each is looked at but once. */
static struct expected expect(uint32_t rows, uint32_t room)
{
    struct expected found = {0};
    const uint32_t most = kernel.in_place ? kernel.most : kernel.blocks;
    uint64_t used = 0;

    kernel.slots[kernel.turn].first = kernel.read;
    while (found.count < rows) {
        struct block *block = &kernel.block[kernel.read];
        const struct reported *reported = &block->reported[block->taken];

        if (block->owner != CLOSED)
            break;
        if (!block->begun) {
            if (found.begun == most || (kernel.in_place && found.begun && kernel.read == 0))
                break;
            block->begun = 1;
            found.begun++;
            if (!block->claimed) {
                to_next(block);
                continue;
            }
        } else if (!found.begun) {
            found.begun = 1;
        }
        if (block->taken == block->good) {
            kernel.damaged = 1;
            to_next(block);
            break;
        }
        if (reported->cut && kept(reported) < kernel.capacity)
            kernel.damaged = 1;
        if (!kernel.in_place && used + kept(reported) > room)
            break;
        used = (used + kept(reported) + 7) & ~UINT64_C(7);
        found.reported[found.count++] = reported;
        if (++block->taken == block->claimed)
            to_next(block);
    }
    if (!found.count)
        release_slot(kernel.turn);
    else if (kernel.in_place)
        kernel.turn ^= 1;
    return found;
}

static void check_rows(const uint8_t *table, uint32_t rows, const struct expected *due, const uint8_t *region,
                       uint32_t end)
{
    uint32_t free_from = 0;

    for (uint32_t k = 0; k < due->count; k++) {
        const struct reported *reported = due->reported[k];
        uint32_t start = (uint32_t)get(table, rows, k, START), length = (uint32_t)get(table, rows, k, LENGTH);

        MUST(length == kept(reported));
        MUST(get(table, rows, k, WIRE_LENGTH) == reported->wire_length);
        MUST(get(table, rows, k, FLAGS) == reported->flags);
        MUST(!(reported->flags & LRX_TIMESTAMP) || get(table, rows, k, TIMESTAMP) == (uint64_t)reported->timestamp);
        MUST(!(reported->flags & LRX_VLAN) || get(table, rows, k, VLAN_TCI) == reported->vlan_tci);
        MUST(!(reported->flags & LRX_VLAN) || get(table, rows, k, VLAN_TPID) == reported->vlan_tpid);
        if (kernel.in_place) {
            MUST(region + start + kernel.vnet == at_block(reported->block) + (reported->frame - kernel.block[reported->block].copy));
        } else {
            MUST(start % 8 == 0 && start >= free_from && start + length <= end);
            free_from = start + length;
        }
        MUST(get(table, rows, k, INTERFACE) == reported->interface);
        MUST(get(table, rows, k, PROTOCOL) == reported->protocol && get(table, rows, k, LINK_TYPE) == reported->link_type);
        MUST(get(table, rows, k, ADDRESS) == reported->address);
        MUST(get(table, rows, k, ADDRESS_LENGTH) == reported->address_length);
        for (uint32_t i = 0; i < length; i++) {
            /* The ten bytes of struct virtio_net_hdr, zeroes up to its size, the frame. */
            uint8_t due_byte = i >= kernel.vnet ? reported->frame[i - kernel.vnet] : i < 10 ? reported->frame[(int)i - 10] : 0;
            MUST(region[start + i] == due_byte);
        }
    }
    MUST(end == ((free_from + 7) & ~7u));
}

/* Each block is whose it must be, and nothing was written into it but its state. */
static void check_blocks(void)
{
    for (uint32_t k = 0; k < kernel.blocks; k++) {
        const struct block *block = &kernel.block[k];
        const struct tpacket_hdr_v1 *header = header_of(k);

        MUST(!(header->block_status & TP_STATUS_USER) == (block->owner == KERNELS));
        if (block->owner == KERNELS)
            MUST(!header->num_pkts || (kernel.open && k == kernel.filled));
        else
            MUST(!memcmp(at_block(k) + 12, block->copy + 12, kernel.block_size - 12));
    }
}

/* An error must be reported after all packets that came before it, and no later than that. EBADF, from asking for it, may wait inside. */
static void check_error(uint32_t error, const struct expected *due, int was_due)
{
    const struct block *block = &kernel.block[kernel.read];
    /* What is read already may be begun anew by the kernel only once it is released. */
    int comes = header_of(kernel.read)->num_pkts > 0 || block->owner == READ;

    if (error == EBADF)
        return;
    MUST(!error || (!comes && was_due));
    MUST(error || due->count || comes || !was_due);
    MUST(!error || block->owner != CLOSED || !block->claimed);
}

/* In place: what stands before a fill. Some releases come late, and some early. */
static void release_before(struct lrx_ring *s, struct lrx_report *report, uint32_t rows)
{
    if (take(kernel.in, 31) == 1) { /* a child that was forked past Python's hooks */
        *(uint32_t *)kernel.guard = 0;
        ASAN_POISON_MEMORY_REGION(kernel.memory, kernel.mapped);
        lrx_ring_release(s, take(kernel.in, 1));
        MUST(lrx_packet_mmap_fill(s, (uintptr_t)report, rows, 0, 0) == -EOWNERDEAD && report->error == EOWNERDEAD);
        ASAN_UNPOISON_MEMORY_REGION(kernel.memory, kernel.mapped);
        *(uint32_t *)kernel.guard = 1;
        report->error = 0;
    }
    for (uint32_t slot = 0; slot < 2; slot++)
        MUST(kernel.slots_in_place->unreleased[slot] == kernel.slots[slot].blocks);
    if (kernel.slots[kernel.turn].blocks && take(kernel.in, 7) == 1)
        MUST(lrx_packet_mmap_fill(s, (uintptr_t)report, rows, 0, 0) == -EBUSY);
    if (take(kernel.in, 1)) {
        lrx_ring_release(s, kernel.turn ^ 1);
        release_slot(kernel.turn ^ 1);
    }
    lrx_ring_release(s, kernel.turn);
    release_slot(kernel.turn);
    check_blocks();
}

static void run(struct lrx_ring *s)
{
    uint32_t rows = 1 + take(kernel.in, ROWS_MOST - 1);
    uint32_t table_bytes = sizeof(struct lrx_report) + ROW_BYTES * rows;
    struct lrx_report *report = (struct lrx_report *)exactly(table_bytes);
    int known = 0; /* an error that was taken off the socket, and waits */

    memset(report, 0, table_bytes);
    for (int fills = 0; fills < 40; fills++) {
        uint32_t room, error, read;
        uint8_t *region;
        struct expected due;
        int got, was_due;

        if (kernel.in_place)
            release_before(s, report, rows);
        let_kernel_work();
        guard();
        room = take(kernel.in, 7) ? 4096 : take(kernel.in, kernel.capacity) & ~7u;
        region = exactly(room);
        read = kernel.read;
        was_due = known || kernel.error;
        due = expect(rows, room);
        got = lrx_packet_mmap_fill(s, (uintptr_t)report, rows, (uintptr_t)region, room);
        error = report->error;
        was_due = was_due || kernel.damaged;
        check_blocks();
        MUST(report->count == due.count && got == (due.count ? (int)due.count : -(int)error));
        if (due.count) {
            MUST(report->receives == due.begun && report->end <= room + 7);
            check_rows((uint8_t *)(report + 1), rows, &due,
                       kernel.in_place ? (const uint8_t *)kernel.slots_in_place->frames[kernel.slots_in_place->turn ^ 1] : region, report->end);
            MUST(!kernel.in_place || kernel.slots_in_place->turn == kernel.turn);
        }
        check_error(error, &due, was_due);
        MUST(!error || error == EIO || error == EFBIG || error == ENETDOWN || error == EBADF);
        if (error)
            known = kernel.damaged = 0;
        else
            known = was_due && !kernel.error; /* taken off the socket, it waits inside */
        MUST(!report->classified && !report->rows);
        const struct block *block = &kernel.block[kernel.read];
        MUST(lrx_ring_held(s) == (block->owner == CLOSED && block->begun ? block->claimed - block->taken : 0));
        MUST(due.count || error || read != kernel.read || block->owner != CLOSED || room < 4096);
        free(region);
        report->count = report->end = report->receives = report->error = 0; /* as who takes it does */
        if (take(kernel.in, 7) == 1) {
            MUST(lrx_ring_drops(s) == kernel.drops);
            const int64_t freezes = lrx_ring_freezes(s);

            MUST(freezes == -1 || (uint64_t)freezes == kernel.freezes); /* -1: the kernel's answer had another size */
        }
        if (!kernel.in->left && !due.count && !error && read == kernel.read)
            break;
    }
    free(report);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint32_t vnets[] = {0, 0, 10, 12, 13};
    struct input in = {data, size};
    struct lrx_ring *s;
    int broken;

    memset(&kernel, 0, sizeof kernel);
    kernel.in = &in;
    if (in.left && data[size - 1] == IN_PLACE) {
        kernel.in_place = 1;
        in.left--;
    }
    kernel.version = VERSION;
    kernel.blocks = 1 + take(&in, BLOCKS_MOST - 1);
    kernel.block_size = 256 + 8 * take(&in, (BLOCK_MOST - 256) / 8);
    kernel.vnet = vnets[take(&in, 4)];
    kernel.capacity = take(&in, 1) ? BLOCK_MOST : take(&in, 300);
    kernel.wanted = (take(&in, 1) ? LRX_TIMESTAMP : 0) | (take(&in, 1) ? LRX_OUTGOING : 0) |
                    (take(&in, 1) ? LRX_WANT_SENDER : 0);
    broken = take(&in, 15) == 1;
    kernel.steps_left = broken ? (int)take(&in, 5) : -1;
    s = lrx_ring_new();
    MUST(s);
    if (lrx_ring_open(s, FD, kernel.block_size, kernel.blocks, 1, kernel.vnet, kernel.capacity, kernel.wanted) < 0) {
        MUST(errno == (kernel.vnet > 12 ? EINVAL : kernel.failed) && errno);
        MUST(!kernel.memory && !kernel.guard && !kernel.has_ring && kernel.version == VERSION);
        lrx_ring_free(s);
        return 0;
    }
    MUST(!broken && kernel.vnet <= 12 && kernel.has_ring && kernel.version == TPACKET_V3);
    kernel.drops = kernel.freezes = 0; /* what was there before is not the ring's */
    if (take(&in, 7) == 1) {
        lrx_ring_shut(s);
        for (uint32_t k = 0; k < kernel.blocks; k++)
            MUST(header_of(k)->block_status & TP_STATUS_USER);
        lrx_ring_start(s);
        kernel.drops = kernel.freezes = 0;
    }
    MUST(kernel.guard && *(uint32_t *)kernel.guard == 1);
    MUST(lrx_ring_size(s) == kernel.mapped);
    if (kernel.in_place) {
        kernel.most = take(&in, 2);
        kernel.in_place = kernel.most && kernel.vnet <= 10;
        kernel.slots_in_place = lrx_ring_read_in_place(s, kernel.most);
        MUST(!kernel.slots_in_place == !kernel.in_place);
        MUST(!kernel.slots_in_place || kernel.slots_in_place->guard == (uintptr_t)kernel.guard);
    }
    run(s);
    kernel.other = take(&in, 7) == 1; /* the number of the descriptor went to a stranger's socket */
    kernel.steps_left = -1;
    guard();
    if (kernel.in_place && take(&in, 3) == 1) { /* somebody reads there still, or it is the parent's */
        int unmap = (int)take(&in, 1);

        *(uint32_t *)kernel.guard = !unmap;
        lrx_ring_close(s, unmap);
        lrx_ring_free(s);
        MUST(kernel.memory && kernel.guard && kernel.has_ring);
        fake_munmap(kernel.memory, kernel.mapped);
        fake_munmap(kernel.guard, PAGE);
        return 0;
    }
    lrx_ring_close(s, 1);
    lrx_ring_close(s, 1); /* the second does nothing */
    lrx_ring_free(s);
    MUST(!kernel.memory && !kernel.guard);
    MUST(kernel.other || (!kernel.has_ring && kernel.version == VERSION));
    return 0;
}
