/* Blocks of a ring that are lent rather than copied from. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "ring.inc"

void lrx_ring_lend(struct lrx_ring *s, struct lrx_loans *loans)
{
    loans->ring = (uintptr_t)s->memory;
    s->loans = loans;
}

/* The blocks from `first` to before `last` are copied, as far as they are lent, to where the ring is mapped. mremap()
 * puts pages into the place of others in one step, so whoever looks there meanwhile sees the one or the other. */
static int replace(struct lrx_ring *s, size_t first, size_t last)
{
    const struct lrx_loans *loans = s->loans;
    size_t size = (last - first) * s->block_size;
    uint8_t *from = s->memory + first * s->block_size;
    uint8_t *copy = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int error;

    if (copy == MAP_FAILED)
        return -errno;
    madvise(copy, size, MADV_NOHUGEPAGE); /* between the two may be much that is not lent */
    for (int which = 0; which < 2; which++) {
        size_t at = (loans->first[which] - first) * s->block_size;

        if (loans->blocks[which])
            memcpy(copy + at, from + at, (size_t)loans->blocks[which] * s->block_size);
    }
    if (mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, from) == MAP_FAILED) {
        error = errno;
        munmap(copy, size);
        return -error;
    }
    return 0;
}

/* `fresh` is where the ring is mapped anew, or NULL. Nothing is lent in its old place. */
static void keep(struct lrx_ring *s, struct lrx_kept *kept, uint8_t *memory, size_t size, uint8_t *fresh)
{
    kept->memory = (uintptr_t)memory;
    kept->size = size;
    s->memory = fresh;
    s->loans->ring = (uintptr_t)fresh;
    s->loans->offered = 0;
}

static int hand_over(struct lrx_ring *s, struct lrx_kept *kept, bool again)
{
    struct lrx_loans *loans = s->loans;
    size_t first = s->blocks, last = 0, size = s->block_size;
    uint8_t *old = s->memory, *fresh = NULL;
    int error;

    loans->rest = loans->pause;
    for (int which = 0; which < 2; which++) {
        if (!loans->blocks[which])
            continue;
        if (loans->first[which] < first)
            first = loans->first[which];
        if (loans->first[which] + loans->blocks[which] > last)
            last = loans->first[which] + loans->blocks[which];
    }
    if (!last || !loans->offered)
        return 0;
    if (again && !(fresh = lrx_ring_map(s)))
        return -errno;
    error = replace(s, first, last);
    if (error) {
        if (fresh)
            munmap(fresh, s->mapped);
        return error;
    }
    keep(s, kept, old + first * size, (last - first) * size, fresh);
    /* Whole mappings since the above, so the kernel needs no memory for this. */
    if (first)
        munmap(old, first * size);
    if (last < s->blocks)
        munmap(old + last * size, s->mapped - last * size);
    return 0;
}

int lrx_ring_hand_over(struct lrx_ring *s, struct lrx_kept *kept)
{
    int error;

    enter(s);
    error = hand_over(s, kept, true);
    leave(s);
    return error;
}

void lrx_ring_leave(struct lrx_ring *s, struct lrx_kept *kept)
{
    enter(s);
    if (hand_over(s, kept, false))
        keep(s, kept, s->memory, s->mapped, NULL);
    leave(s);
}

void lrx_ring_inherit(struct lrx_ring *s, int whether)
{
    enter(s);
    madvise(s->memory, s->mapped, whether ? MADV_DOFORK : MADV_DONTFORK);
    leave(s);
}

void lrx_kept_unmap(struct lrx_kept *kept, void *ring)
{
    (void)ring;
    if (kept->size)
        munmap((void *)kept->memory, kept->size);
    kept->size = 0;
}

uintptr_t lrx_ring_block(const struct lrx_ring *s)
{
    return (uintptr_t)s->described;
}

void lrx_ring_return(void *block)
{
    release(&((struct tpacket_block_desc *)block)->hdr.bh1);
}

int lrx_ring_lent(const struct lrx_ring *s)
{
    for (uint32_t block = 0; s->lends && block < s->blocks; block++)
        if (__atomic_load_n(&header_at(s, block)->block_status, __ATOMIC_RELAXED) & LENT)
            return 1;
    return 0;
}
