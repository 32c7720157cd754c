/* pcapng, as in draft-ietf-opsawg-pcapng. */
#include "capture_file.inc"
#include "link_layer.inc"

#define BLOCK_INTERFACE 1
#define BLOCK_PACKET 2 /* obsolete */
#define BLOCK_SIMPLE 3
#define BLOCK_ENHANCED 6
#define BLOCK_LEAST 12 /* the type, and the length twice */
#define SECTION_LEAST 28
#define BYTE_ORDER_MAGIC 0x1A2B3C4D

/* 2^64 units of less than 10^-28 seconds, or of 2^-96, are less than a nanosecond. */
#define NO_NANOSECOND 28
#define SHIFT_TO_NOTHING 127

#define OPTION_END 0
#define IF_NAME 2
#define IF_TSRESOL 9
#define IF_TSOFFSET 14
#define PACKET_FLAGS 2 /* epb_flags, and pack_flags of the obsolete packet block */
#define OUTBOUND 2     /* in their two lowest bits */

/* Times. */

/* if_tsresol: a power of ten, or with the highest bit a power of two. */
static void set_resolution(struct lrx_capture_interface *i, uint8_t resolution)
{
    uint32_t power = resolution & 0x7F;

    i->multiply = i->shift = 0;
    i->divide = 0;
    if (resolution & 0x80 && power) {
        i->shift = power;
        return;
    }
    if (resolution & 0x80)
        power = 0; /* 2^0 seconds are 10^0 */
    if (power <= 9) {
        i->multiply = 1;
        for (; power < 9; power++)
            i->multiply *= 10;
    } else {
        if (power > NO_NANOSECOND)
            i->shift = SHIFT_TO_NOTHING;
        for (i->divide = power > NO_NANOSECOND ? 0 : 1; i->divide && power > 9; power--)
            i->divide *= 10;
    }
}

/* Nanoseconds since 1970. If they do not fit into 64 bits: false and 0, and the packet has no timestamp. */
static bool time_of(const struct lrx_capture_interface *i, uint64_t units, int64_t *time)
{
    int64_t offset, t;

    *time = 0;
    if (i->multiply) {
        if (units > (uint64_t)INT64_MAX / i->multiply)
            return false;
        t = (int64_t)(units * i->multiply);
    } else if (i->divide) {
        t = (int64_t)(units / i->divide);
    } else {
        const uint32_t shift = i->shift;
        const uint64_t seconds = shift < 64 ? units >> shift : 0;
        const uint64_t fraction = shift < 64 ? units & ((UINT64_C(1) << shift) - 1) : units;
        /* The fraction in nanoseconds times 2^shift needs more than 64 bits. These are the bits above the lowest 32. */
        const uint64_t high = (fraction >> 32) * LRX_SECOND + ((fraction & UINT32_MAX) * LRX_SECOND >> 32);

        if (seconds > (uint64_t)(INT64_MAX / LRX_SECOND) - 1)
            return false;
        t = (int64_t)seconds * LRX_SECOND;
        if (shift < 32)
            t += (int64_t)(fraction * LRX_SECOND >> shift);
        else
            t += shift < 96 ? (int64_t)(high >> (shift - 32)) : 0;
    }
    if (__builtin_mul_overflow(i->offset, LRX_SECOND, &offset) || __builtin_add_overflow(t, offset, &t))
        return false;
    *time = t;
    return true;
}

/* Blocks. */

/* Whether the two lengths of a block agree. */
static bool ends_well(struct lrx_capture *c, const uint8_t *at, uint32_t total)
{
    const uint32_t behind = u32(c, at + total - 4);

    if (behind != total)
        damaged(c, LRX_CAPTURE_TRAILER, behind);
    return behind == total;
}

/* A section header block. Each section has its own byte order and interfaces. */
uint32_t lrx_pcapng_section(struct lrx_capture *c, const uint8_t *at, uint32_t size)
{
    uint32_t magic, total;

    if (size < SECTION_LEAST)
        return wait_for(c, SECTION_LEAST);
    memcpy(&magic, at + 8, sizeof magic);
    if (magic != BYTE_ORDER_MAGIC && magic != __builtin_bswap32(BYTE_ORDER_MAGIC))
        return damaged(c, LRX_CAPTURE_BYTE_ORDER, magic);
    c->swapped = magic != BYTE_ORDER_MAGIC;
    total = u32(c, at + 4);
    if (total < SECTION_LEAST || total % 4 || total > LRX_CAPTURE_BLOCK)
        return damaged(c, LRX_CAPTURE_BLOCK_LENGTH, total);
    if (u16(c, at + 12) != 1)
        return damaged(c, LRX_CAPTURE_VERSION, (uint64_t)u16(c, at + 12) << 16 | u16(c, at + 14));
    if (total <= LRX_CAPTURE_WHOLE) {
        if (size < total)
            return wait_for(c, total);
        if (!ends_well(c, at, total))
            return 0;
    }
    c->first += c->count;
    c->count = 0;
    c->begun = c->pcapng = 1;
    if (total <= LRX_CAPTURE_WHOLE)
        return total;
    c->skip = total - SECTION_LEAST;
    return SECTION_LEAST;
}

static uint32_t interface(struct lrx_capture *c, const uint8_t *at, uint32_t total)
{
    struct lrx_capture_interface *i;
    uint32_t option = 16;

    if (total < 20)
        return damaged(c, LRX_CAPTURE_BLOCK_LENGTH, total);
    i = lrx_capture_add_interface(c);
    if (!i)
        return 0;
    set_link_type(c, i, u16(c, at + 8));
    i->snaplen = u32(c, at + 12);
    i->multiply = 1000; /* microseconds */
    while (total - 4 - option >= 4) {
        const uint16_t code = u16(c, at + option), length = u16(c, at + option + 2);
        const uint8_t *value = at + option + 4;

        if (code == OPTION_END)
            break;
        if (length > total - 4 - option - 4 || padded(length) > total - 4 - option - 4)
            return damaged(c, LRX_CAPTURE_OPTION, code);
        if (code == IF_NAME)
            memcpy(i->name, value, length < sizeof i->name ? length : sizeof i->name - 1);
        else if (code == IF_TSRESOL && length == 1)
            set_resolution(i, *value);
        else if (code == IF_TSOFFSET && length == 8)
            i->offset = (int64_t)u64(c, value);
        option += 4 + padded(length);
    }
    c->count++;
    return total;
}

/* The direction in epb_flags. 0 if the options have none or are malformed. */
static uint16_t direction(const struct lrx_capture *c, const uint8_t *option, uint32_t size)
{
    while (size >= 8) {
        const uint16_t code = u16(c, option), length = u16(c, option + 2);

        if (code == OPTION_END || padded(length) > size - 4)
            break;
        if (code == PACKET_FLAGS && length == 4)
            return (u32(c, option + 4) & 3) == OUTBOUND ? LRX_OUTGOING : 0;
        option += 4 + padded(length);
        size -= 4 + padded(length);
    }
    return 0;
}

/* A packet block with `there` bytes in memory: all of it, or all but the end of its options. */
static uint32_t packet(struct lrx_capture *c, const uint8_t *at, uint32_t type, uint32_t total, uint32_t there, struct rows *r)
{
    const uint32_t head = type == BLOCK_SIMPLE ? 12 : 28;
    const struct lrx_capture_interface *i;
    uint32_t number = 0, length, wire_length;
    uint16_t flags = 0;

    if (total < head + 4)
        return damaged(c, LRX_CAPTURE_BLOCK_LENGTH, total);
    if (type == BLOCK_ENHANCED)
        number = u32(c, at + 8);
    else if (type == BLOCK_PACKET)
        number = u16(c, at + 8);
    if (number >= c->count)
        return damaged(c, LRX_CAPTURE_INTERFACE, number);
    i = &c->interfaces[c->first + number];
    if (type == BLOCK_SIMPLE) {
        wire_length = u32(c, at + 8);
        length = i->snaplen && i->snaplen < wire_length ? i->snaplen : wire_length;
    } else {
        length = u32(c, at + 20);
        wire_length = u32(c, at + 24);
    }
    if (length > LRX_CAPTURE_LONGEST || length > total - head - 4)
        return damaged(c, LRX_CAPTURE_LENGTH, length);
    if (head + length > there)
        return wait_for(c, head + length);
    if (!is_met(c, i))
        return 0;
    if (type == BLOCK_SIMPLE) {
        r->out.timestamps[r->n] = 0;
    } else {
        if (there == total && total - head - 4 > padded(length))
            flags = direction(c, at + head + padded(length), total - head - 4 - padded(length));
        if (time_of(i, (uint64_t)u32(c, at + 12) << 32 | u32(c, at + 16), &r->out.timestamps[r->n]))
            flags |= LRX_TIMESTAMP;
    }
    put_row(r, i, at + head, length, wire_length, c->first + number + 1, flags);
    r->n++;
    if (there == total)
        return total;
    c->skip = total - head - length;
    return head + length;
}

uint32_t lrx_pcapng_block(struct lrx_capture *c, const uint8_t *at, uint32_t size, struct rows *r)
{
    uint32_t type, total;

    if (size < BLOCK_LEAST)
        return wait_for(c, BLOCK_LEAST);
    type = u32(c, at);
    if (type == LRX_BLOCK_SECTION)
        return lrx_pcapng_section(c, at, size);
    total = u32(c, at + 4);
    if (total < BLOCK_LEAST || total % 4 || total > LRX_CAPTURE_BLOCK)
        return damaged(c, LRX_CAPTURE_BLOCK_LENGTH, total);
    if (total <= LRX_CAPTURE_WHOLE) {
        if (size < total)
            return wait_for(c, total);
        if (!ends_well(c, at, total))
            return 0;
    }
    switch (type) {
    case BLOCK_INTERFACE:
        if (total > LRX_CAPTURE_WHOLE)
            return damaged(c, LRX_CAPTURE_BLOCK_LENGTH, total);
        return interface(c, at, total);
    case BLOCK_PACKET:
    case BLOCK_SIMPLE:
    case BLOCK_ENHANCED:
        if (total <= LRX_CAPTURE_WHOLE)
            return packet(c, at, type, total, total, r);
        return size < 28 ? wait_for(c, 28) : packet(c, at, type, total, size, r);
    default:
        if (total <= LRX_CAPTURE_WHOLE)
            return total;
        c->skip = total - BLOCK_LEAST;
        return BLOCK_LEAST;
    }
}
