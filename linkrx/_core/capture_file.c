/* Capture files: pcap, as in pcap-savefile(5), and the pieces of a file. pcapng is in pcapng.c. Every length in a file is checked
 * against the data that is there, and against a limit. */
#include <stdlib.h>

#include "classify.h"
#include "capture_file.inc"
#include "link_layer.inc"

/* Magic numbers of pcap: microseconds, nanoseconds, and Alexey Kuznetzov's format, whose record header is longer. */
#define PCAP_MICROSECONDS 0xA1B2C3D4
#define PCAP_NANOSECONDS 0xA1B23C4D
#define PCAP_KUZNETZOV 0xA1B2CD34
#define PCAP_FILE_HEADER 24
#define PCAP_RECORD_HEADER 16
#define PCAP_KUZNETZOV_HEADER 24 /* with interface index, protocol and packet type (linux/if_packet.h) */

struct lrx_capture_interface *lrx_capture_add_interface(struct lrx_capture *c)
{
    const uint32_t count = c->first + c->count;

    if (count == LRX_CAPTURE_INTERFACES) {
        damaged(c, LRX_CAPTURE_TOO_MANY, count);
        return NULL;
    }
    return &c->interfaces[count];
}

static uint32_t begin_pcap(struct lrx_capture *c, const uint8_t *at, uint32_t magic)
{
    struct lrx_capture_interface *i;
    uint16_t major, minor;
    uint32_t link_type;

    major = u16(c, at + 4);
    minor = u16(c, at + 6);
    /* As in sf-pcap.c of libpcap: before 2.3 the two lengths are swapped, in 2.3 they may be. DG/UX has the version 543.0. */
    if (major == 543 || (major == 2 && minor < 3))
        c->lengths = 1;
    else if (major == 2 && minor == 3)
        c->lengths = 2;
    else if (major != 2)
        return damaged(c, LRX_CAPTURE_VERSION, (uint64_t)major << 16 | minor);
    link_type = u32(c, at + 20) & 0x03FFFFFF; /* the upper bits are flags and the length of the frame check sequence */
    if (link_type > LRX_FILE_LINK_TYPE)
        return damaged(c, LRX_CAPTURE_LINK_TYPE, link_type);
    i = lrx_capture_add_interface(c);
    if (!i)
        return 0;
    c->count = 1;
    set_link_type(c, i, link_type);
    i->multiply = magic == PCAP_NANOSECONDS ? 1 : 1000;
    i->snaplen = u32(c, at + 16);
    c->header = magic == PCAP_KUZNETZOV ? PCAP_KUZNETZOV_HEADER : PCAP_RECORD_HEADER;
    c->begun = 1;
    return PCAP_FILE_HEADER;
}

static uint32_t pcap_record(struct lrx_capture *c, const uint8_t *at, uint32_t size, struct rows *r)
{
    const struct lrx_capture_interface *i = c->interfaces;
    uint32_t length, wire_length, interface = 0;
    uint16_t flags = LRX_TIMESTAMP;

    if (size < c->header)
        return wait_for(c, c->header);
    length = u32(c, at + 8);
    wire_length = u32(c, at + 12);
    if (c->lengths == 1 || (c->lengths == 2 && length > wire_length)) {
        const uint32_t other = length;

        length = wire_length;
        wire_length = other;
    }
    if (length > LRX_CAPTURE_LONGEST)
        return damaged(c, LRX_CAPTURE_LENGTH, length);
    if (size - c->header < length)
        return wait_for(c, c->header + length);
    if (!is_met(c, i))
        return 0;
    if (c->header == PCAP_KUZNETZOV_HEADER) {
        interface = u32(c, at + 16);
        flags |= at[22] == PACKET_OUTGOING ? LRX_OUTGOING : 0;
    }
    put_row(r, i, at + c->header, length, wire_length, interface, flags);
    r->out.timestamps[r->n] = (int64_t)u32(c, at) * LRX_SECOND + (int64_t)u32(c, at + 4) * i->multiply;
    r->n++;
    return c->header + length;
}

/* Recognise the format by the first bytes. */
static uint32_t begin(struct lrx_capture *c, const uint8_t *at, uint32_t size)
{
    uint32_t magic;

    if (size < 4)
        return wait_for(c, 4);
    memcpy(&magic, at, sizeof magic);
    if (magic == LRX_BLOCK_SECTION)
        return lrx_pcapng_section(c, at, size);
    for (int swapped = 0; swapped < 2; swapped++, magic = __builtin_bswap32(magic)) {
        if (magic != PCAP_MICROSECONDS && magic != PCAP_NANOSECONDS && magic != PCAP_KUZNETZOV)
            continue;
        if (size < PCAP_FILE_HEADER)
            return wait_for(c, PCAP_FILE_HEADER);
        c->swapped = (uint32_t)swapped;
        return begin_pcap(c, at, magic);
    }
    return damaged(c, LRX_CAPTURE_MAGIC, magic);
}

/* Parse records until one is not whole, an interface is new, or `most` rows are filled. Returns the number of bytes parsed. */
static uint32_t walk(struct lrx_capture *c, const uint8_t *memory, uint32_t size, struct rows *r, uint32_t most)
{
    uint32_t at = 0;

    c->needed = c->asked = 0;
    while (!c->damage) {
        uint32_t step;

        if (c->skip) {
            step = c->skip < size - at ? (uint32_t)c->skip : size - at;
            c->skip -= step;
            c->offset += step;
            at += step;
            if (c->skip)
                break;
        }
        if (r->n == most || at == size)
            break;
        if (!c->begun)
            step = begin(c, memory + at, size - at);
        else if (c->pcapng)
            step = lrx_pcapng_block(c, memory + at, size - at, r);
        else
            step = pcap_record(c, memory + at, size - at, r);
        if (!step)
            break;
        at += step;
        c->offset += step;
    }
    return at;
}

struct lrx_capture *lrx_capture_open(void)
{
    struct lrx_capture *c = calloc(1, sizeof *c);

    if (!c)
        return NULL;
    c->rest = malloc(LRX_CAPTURE_WHOLE + LRX_CAPTURE_PIECE);
    /* All at once, so that they never move: another thread may read a name. Only the pages that are written take memory. */
    c->interfaces = calloc(LRX_CAPTURE_INTERFACES, sizeof *c->interfaces);
    if (c->rest && c->interfaces)
        return c;
    lrx_capture_free(c);
    return NULL;
}

void lrx_capture_free(struct lrx_capture *c)
{
    free(c->interfaces);
    free(c->rest);
    free(c);
}

/* Report the packets of a walk. They lie in the first `walked` bytes of the region. */
static int walked_over(struct lrx_capture *c, const struct rows *r, uintptr_t descriptors, uintptr_t region, uint32_t walked)
{
    const uint32_t pieces = c->pieces;

    c->more = c->rest_at != c->rest_end && !c->needed;
    if (!r->n)
        return 0;
    c->pieces = 0;
    return lrx_received(descriptors, region, r->n, pieces, lrx_align(walked));
}

int lrx_capture_again(struct lrx_capture *c, uintptr_t descriptors, uint32_t rows, uintptr_t region)
{
    struct rows r = {lrx_descriptors_at(descriptors, rows), c->rest + c->rest_at, 0};
    uint32_t walked;

    if (c->rest_at == c->rest_end)
        return 0;
    walked = walk(c, c->rest + c->rest_at, c->rest_end - c->rest_at, &r, rows);
    if (r.n)
        memcpy((void *)region, c->rest + c->rest_at, walked);
    c->rest_at += walked;
    return walked_over(c, &r, descriptors, region, walked);
}

int lrx_capture_walk(struct lrx_capture *c, uintptr_t descriptors, uint32_t rows, uintptr_t region, uint32_t size,
                     uint32_t piece)
{
    uint8_t *memory = (uint8_t *)region;
    const uint32_t left = c->rest_end - c->rest_at;
    struct rows r = {lrx_descriptors_at(descriptors, rows), memory, 0};
    uint32_t walked;

    if (piece == c->piece || size > LRX_CAPTURE_PIECE || left > LRX_CAPTURE_WHOLE)
        return 0;
    c->piece = piece;
    c->pieces++;
    if (left)
        memcpy(memory, c->rest + c->rest_at, left);
    size += left;
    walked = walk(c, memory, size, &r, rows);
    c->rest_at = 0;
    c->rest_end = size - walked;
    if (c->rest_end)
        memcpy(c->rest, memory + walked, c->rest_end);
    return walked_over(c, &r, descriptors, region, walked);
}

int lrx_capture_end(struct lrx_capture *c)
{
    if (c->damage)
        return 0;
    if (c->skip || c->rest_at != c->rest_end || !c->begun) {
        damaged(c, LRX_CAPTURE_CUT, c->rest_end - c->rest_at);
        return 0;
    }
    return 1;
}
