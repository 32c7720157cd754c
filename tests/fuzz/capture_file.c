/* Fuzzes the walk over capture files: in whatever pieces and rows a file comes, its packets are the same, lie in the file, and end at the
 * same byte with the same complaint; and nothing outside of what was read is touched. */
#include "fuzz.h"

#include <capture_file.c>
#include <pcapng.c>

#define PACKETS_MOST 64

/* A packet as it was found: where in the file its frame is, and its row. */
struct found {
    uint64_t at;
    uint32_t length, wire_length, interface, flags;
    uint64_t timestamp;
};

struct result {
    struct found packets[PACKETS_MOST];
    uint32_t count;
    uint32_t damage;
    uint64_t offset;
    int whole;
};

static void take_rows(struct result *r, const uint8_t *descriptors, uint32_t rows, uint32_t count, const uint8_t *region,
                      uint32_t size, uint64_t base, const uint8_t *file, size_t file_size)
{
    const struct lrx_report *report = (const struct lrx_report *)descriptors;
    const uint8_t *table = descriptors + sizeof *report;
    uint32_t last = 0;

    MUST(count <= rows && report->count == count && report->end % 8 == 0 && report->end < (uint64_t)size + 8);
    for (uint32_t k = 0; k < count; k++) {
        struct found f = {
            .length = (uint32_t)get(table, rows, k, LENGTH),
            .wire_length = (uint32_t)get(table, rows, k, WIRE_LENGTH),
            .interface = (uint32_t)get(table, rows, k, INTERFACE),
            .flags = (uint32_t)get(table, rows, k, FLAGS),
            .timestamp = get(table, rows, k, TIMESTAMP),
        };
        const uint32_t start = (uint32_t)get(table, rows, k, START);

        MUST(start >= last && (uint64_t)start + f.length <= size && f.length <= LRX_CAPTURE_LONGEST);
        last = start + f.length;
        f.at = base + start;
        MUST(f.at + f.length <= file_size && memcmp(region + start, file + f.at, f.length) == 0);
        MUST(!(f.flags & ~(uint32_t)(LRX_TIMESTAMP | LRX_OUTGOING | LRX_MALFORMED)) && (f.flags & LRX_TIMESTAMP || !f.timestamp));
        MUST(get(table, rows, k, FILE_TYPE) / LRX_OF_FILE % 2 == 1);
        MUST(get(table, rows, k, ADDRESS_LENGTH) <= 8 && get(table, rows, k, LINK_HEADER) % LRX_NO_LINK_HEADER == 0);
        if (r->count < PACKETS_MOST)
            r->packets[r->count] = f;
        r->count++;
    }
}

/* A file in pieces of `piece` bytes, `rows` packets at a time. */
static void read_file(struct result *r, const uint8_t *file, size_t size, uint32_t piece, uint32_t rows)
{
    const size_t table = sizeof(struct lrx_report) + (size_t)ROW_BYTES * rows;
    struct lrx_capture *c = lrx_capture_open();
    uint8_t *descriptors = exactly(table);
    uint32_t number = 0;
    size_t at = 0;

    MUST(c);
    memset(r, 0, sizeof *r);
    memset(descriptors, 0, table);
    for (;;) {
        const uint32_t left = c->rest_end - c->rest_at;
        /* What lies before the next record was walked over; what is skipped is not in the rest. */
        const uint64_t base = at - left;
        uint32_t now = size - at < piece ? (uint32_t)(size - at) : piece;
        uint8_t *region;
        int count;

        if (c->asked) {
            MUST(c->asked <= c->first + c->count && !c->interfaces[c->asked - 1].met);
            c->interfaces[c->asked - 1].met = 1;
        }
        region = exactly(left);
        count = lrx_capture_again(c, (uintptr_t)descriptors, rows, (uintptr_t)region);

        MUST(count >= 0);
        if (count)
            take_rows(r, descriptors, rows, (uint32_t)count, region, left, base, file, size);
        free(region);
        if (count || c->asked)
            continue;
        if (c->damage || !now)
            break;
        MUST(c->rest_end - c->rest_at < LRX_CAPTURE_WHOLE);
        {
            const uint32_t kept = c->rest_end - c->rest_at;

            region = exactly((size_t)kept + now);
            memcpy(region + kept, file + at, now);
            number++;
            count = lrx_capture_walk(c, (uintptr_t)descriptors, rows, (uintptr_t)region, now, number);
            at += now;
            MUST(count >= 0);
            if (count)
                take_rows(r, descriptors, rows, (uint32_t)count, region, kept + now, at - now - kept, file, size);
            MUST(lrx_capture_walk(c, (uintptr_t)descriptors, rows, (uintptr_t)region, now, number) == 0);
            free(region);
        }
    }
    r->damage = c->damage;
    r->whole = lrx_capture_end(c);
    MUST(r->whole == !c->damage);
    r->damage = c->damage;
    r->offset = c->offset;
    MUST(c->first + c->count <= LRX_CAPTURE_INTERFACES && r->offset <= size);
    free(descriptors);
    lrx_capture_free(c);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    const uint32_t piece = 1 + take(&in, 255), rows = 1 + take(&in, 3);
    static struct result whole, pieces;

    read_file(&whole, in.at, in.left, LRX_CAPTURE_PIECE, PACKETS_MOST);
    read_file(&pieces, in.at, in.left, piece, rows);
    MUST(whole.count == pieces.count && whole.damage == pieces.damage && whole.whole == pieces.whole);
    MUST(whole.offset == pieces.offset);
    MUST(memcmp(whole.packets, pieces.packets, sizeof whole.packets) == 0);
    return 0;
}
