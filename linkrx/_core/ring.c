/* A TPACKET_V3 ring: made, counted, and removed. packet_mmap.c describes it. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "ring.inc"

#define PAGE_LEAST 4096 /* the smallest page of all Linux architectures */

static int set_ring(const struct lrx_ring *s, uint32_t retire_ms)
{
    /* TPACKET_V3 ignores the frame size. One frame per block satisfies packet_set_ring(), which checks that the numbers agree,
     * for any PACKET_RESERVE. */
    struct tpacket_req3 request = {
        .tp_block_size = s->block_size,
        .tp_block_nr = s->blocks,
        .tp_frame_size = s->blocks ? s->block_size : 0,
        .tp_frame_nr = s->blocks,
        .tp_retire_blk_tov = retire_ms,
    };

    return setsockopt(s->fd, SOL_PACKET, PACKET_RX_RING, &request, sizeof request);
}

/* Reading PACKET_STATISTICS resets it. Several threads may do that at once. */
bool lrx_ring_count(struct lrx_ring *s)
{
    struct tpacket_stats_v3 since;
    socklen_t size = sizeof since;

    if (getsockopt(s->fd, SOL_PACKET, PACKET_STATISTICS, &since, &size) < 0 || size != sizeof since)
        return false;
    __atomic_fetch_add(&s->drops, since.tp_drops, __ATOMIC_RELAXED);
    __atomic_fetch_add(&s->freezes, since.tp_freeze_q_cnt, __ATOMIC_RELAXED);
    return true;
}

/* The owner of a borrowed socket may have closed it, and another file may have its number. */
static bool is_same_socket(const struct lrx_ring *s)
{
    struct stat now;

    return fstat(s->fd, &now) == 0 && now.st_dev == s->device && now.st_ino == s->inode;
}

static void take_off(struct lrx_ring *s)
{
    if (s->memory)
        munmap(s->memory, s->mapped); /* first, because a mapped ring cannot be removed (EBUSY) */
    s->memory = NULL;
    if (is_same_socket(s)) {
        s->blocks = s->block_size = 0;
        set_ring(s, 0);
        setsockopt(s->fd, SOL_PACKET, PACKET_VERSION, &s->version, sizeof s->version);
    }
}

/* packet_mmap() in net/packet/af_packet.c maps every page, but in a virtual machine the host takes a fault of 1.5 us at the first
 * access to each. Take these faults here, and not for the first packets. */
static void touch(const struct lrx_ring *s)
{
    for (size_t at = 0; at < s->mapped; at += PAGE_LEAST)
        __atomic_fetch_or((uint32_t *)(s->memory + at), 0, __ATOMIC_RELAXED); /* a write that changes nothing */
}

struct lrx_ring *lrx_ring_new(void)
{
    return calloc(1, sizeof(struct lrx_ring));
}

void lrx_ring_free(struct lrx_ring *s)
{
    free(s); /* not the guard: packets that could not be copied before a fork still read it */
}

int lrx_ring_open(struct lrx_ring *s, int fd, uint32_t block_size, uint32_t blocks, uint32_t retire_ms, uint32_t vnet,
                  uint32_t capacity, uint32_t wanted)
{
    const int version = TPACKET_V3;
    socklen_t size = sizeof s->version;
    struct stat now;
    int error;

    if (vnet > VNET_MOST) {
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
    if (fstat(fd, &now) < 0 || getsockopt(fd, SOL_PACKET, PACKET_VERSION, &s->version, &size) < 0 ||
        setsockopt(fd, SOL_PACKET, PACKET_VERSION, &version, sizeof version) < 0)
        goto refused;
    s->device = now.st_dev;
    s->inode = now.st_ino;
    s->guard = mmap(NULL, PAGE_LEAST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (s->guard == MAP_FAILED) {
        s->guard = NULL;
        error = errno;
        setsockopt(fd, SOL_PACKET, PACKET_VERSION, &s->version, sizeof s->version);
        errno = error;
        goto refused;
    }
    *s->guard = 1;
    madvise(s->guard, PAGE_LEAST, MADV_WIPEONFORK);
    if (set_ring(s, retire_ms) < 0) {
        error = errno;
        setsockopt(fd, SOL_PACKET, PACKET_VERSION, &s->version, sizeof s->version);
        errno = error;
        goto refused;
    }
    s->memory = mmap(NULL, s->mapped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (s->memory == MAP_FAILED) {
        error = errno;
        s->memory = NULL;
        take_off(s);
        errno = error;
        goto refused;
    }
    /* The kernel could not remove a ring that a child process has mapped too. */
    madvise(s->memory, s->mapped, MADV_DONTFORK);
    touch(s);
    lrx_ring_count(s); /* resets the counters, which have earlier drops of the socket */
    s->drops = s->freezes = 0;
    return 0;

refused:
    error = errno;
    if (s->guard)
        munmap(s->guard, PAGE_LEAST);
    s->guard = NULL;
    errno = error;
    return -1;
}

void lrx_ring_close(struct lrx_ring *s, int unmap)
{
    if (unmap && s->guard && is_mapped(s)) { /* else the ring belongs to the parent */
        take_off(s);
        munmap(s->guard, PAGE_LEAST);
        s->guard = NULL;
    }
    s->fd = -1; /* another thread may still ask for the counters */
}

uint32_t lrx_ring_held(const struct lrx_ring *s)
{
    return s->left;
}

uint64_t lrx_ring_drops(struct lrx_ring *s)
{
    lrx_ring_count(s);
    return s->drops;
}

int64_t lrx_ring_freezes(struct lrx_ring *s)
{
    return lrx_ring_count(s) ? (int64_t)s->freezes : -1;
}

struct lrx_slots *lrx_ring_read_in_place(struct lrx_ring *s, uint32_t most)
{
    if (s->vnet > VNET_WRITTEN || most == 0)
        return NULL;
    s->in_place = true;
    s->most = most;
    s->slots.guard = (uintptr_t)s->guard;
    return &s->slots;
}

uintptr_t lrx_ring_memory(const struct lrx_ring *s)
{
    return (uintptr_t)s->memory;
}

uint64_t lrx_ring_size(const struct lrx_ring *s)
{
    return s->mapped;
}

/* packet_rcv_has_room() in net/packet/af_packet.c checks that the open block belongs to the kernel, and for rollover the block a
 * quarter of the ring after it. */
static void set_all(struct lrx_ring *s, uint32_t status)
{
    for (uint32_t block = s->blocks; block-- > 0;) /* the open one last */
        __atomic_store_n(&header_at(s, block)->block_status, status, __ATOMIC_RELEASE);
}

void lrx_ring_shut(struct lrx_ring *s)
{
    set_all(s, TP_STATUS_USER);
}

void lrx_ring_forget_drops(struct lrx_ring *s)
{
    lrx_ring_count(s);
    s->drops = s->freezes = 0;
}

void lrx_ring_start(struct lrx_ring *s)
{
    set_all(s, TP_STATUS_KERNEL);
}
