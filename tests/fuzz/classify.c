/* Fuzzes the classifier: whatever a backend reported, each packet stands in the table or in one counter. */
#include "fuzz.h"

#include <classify.c>

#define PACKETS_MOST 12
#define COUNTERS LRX_COUNTERS

static uint32_t some_link_type(struct input *in)
{
    static const uint32_t types[] = {0, 1, 772, 0xFFFE, 519, 768, 769, 776, 778, 32};

    return types[take(in, sizeof types / sizeof *types - 1)];
}

static int is_ethernet(uint32_t type)
{
    return type == 1 || type == 772;
}

static int is_bare(uint32_t type)
{
    return type == 0xFFFE || type == 519 || type == 768 || type == 769 || type == 776;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint32_t vnet_header_sizes[] = {0, 10, 12, 24};
    struct input in = {data, size};
    uint32_t packet_info = take(&in, 1) * 4;
    uint32_t prefix = packet_info + vnet_header_sizes[take(&in, 3)];
    uint32_t link_header = take(&in, 1) * 14;
    uint32_t per_packet = take(&in, 2), link_type = some_link_type(&in);
    uint32_t count = take(&in, PACKETS_MOST);
    uint32_t rows = count + take(&in, 2);
    uint32_t bytes = take(&in, 400);
    uint8_t *region = exactly(bytes);
    uint8_t *table = exactly(ROW_BYTES * count);
    uint8_t *expected = exactly(ROW_BYTES * count);
    uint8_t *descriptors = exactly(sizeof(struct lrx_report) + ROW_BYTES * rows);
    uint8_t *in_table = descriptors + sizeof(struct lrx_report);
    uint32_t interface = take(&in, 1) * 77;
    uint64_t *counters = (uint64_t *)exactly(COUNTERS * sizeof *counters);
    uint64_t expected_counters[COUNTERS];
    struct lrx_report due = {.count = count, .receives = 1, .end = (bytes + 7) & ~7u}, *report = &due;
    uint32_t n = 0;
    /* The last byte is a filter as well. */
    const uint32_t filters = size && data[size - 1] % 4 == 3, keeps = size ? data[size - 1] / 4 : 0;
    const struct lrx_instruction keep = {0x06, 0, 0, keeps}; /* ret #keeps */

    memcpy(descriptors, report, sizeof *report);
    for (int k = 0; k < COUNTERS; k++)
        expected_counters[k] = counters[k] = take(&in, 0xFFFFFFFF);
    for (uint32_t k = 0; k < count; k++) {
        /* A frame may lie anywhere, and often ends where the region does. */
        uint32_t start = take(&in, bytes);
        uint32_t edge = prefix + take(&in, 31), length = take(&in, bytes - start);
        uint32_t wire = take(&in, 1) ? take(&in, 0xFFFFFFFF) : length + take(&in, 4) - 2;

        if (edge < prefix + 16 && edge <= bytes - start)
            length = edge; /* headers end here */
        else if (edge < prefix + 24)
            length = bytes - start;
        put(in_table, rows, k, START, start);
        put(in_table, rows, k, LENGTH, length);
        put(in_table, rows, k, WIRE_LENGTH, wire);
        uint32_t flags = take(&in, 255);
        put(in_table, rows, k, FLAGS, flags < 248 ? flags % 32 : LRX_MALFORMED | flags % 32);
        put(in_table, rows, k, TIMESTAMP, (uint64_t)take(&in, 0xFFFF) << 48 | k);
        put(in_table, rows, k, INTERFACE, k % 3 * 1000); /* 0: not reported */
        put(in_table, rows, k, FILE_TYPE, k % 5);
        put(in_table, rows, k, VLAN_TCI, take(&in, 0xFFFF));
        put(in_table, rows, k, VLAN_TPID, take(&in, 0xFFFF));
        put(in_table, rows, k, PROTOCOL, (uint32_t[]){0, 0x0800, 0x86DD, 0x8100, 0x88A8, 4, 0x0806, 0x88B5}[take(&in, 7)]);
        put(in_table, rows, k, LINK_TYPE, some_link_type(&in));
        put(in_table, rows, k, ADDRESS, (uint64_t)take(&in, 0xFFFF) << 40 | k);
        put(in_table, rows, k, ADDRESS_LENGTH, take(&in, 8));
        put(in_table, rows, k, LINK_HEADER, take(&in, 255)); /* of what a backend writes there only LRX_NO_LINK_HEADER is read */
    }
    for (uint32_t i = 0; i < bytes; i++)
        region[i] = in.left ? (uint8_t)take(&in, 0xFF) : content(0, i);

    for (uint32_t k = 0; k < count; k++) {
        uint32_t start = (uint32_t)get(in_table, rows, k, START);
        uint32_t length = (uint32_t)get(in_table, rows, k, LENGTH);
        uint32_t wire = (uint32_t)get(in_table, rows, k, WIRE_LENGTH);
        uint32_t flags = (uint32_t)get(in_table, rows, k, FLAGS);
        const uint8_t *frame = region + start + prefix;
        uint32_t protocol = 0;

        if (flags & LRX_MALFORMED) {
            expected_counters[LRX_COUNT_MALFORMED]++;
            expected_counters[LRX_CUT] += flags % 2;
            continue;
        }
        if (length <= prefix) {
            expected_counters[LRX_EMPTY]++;
            continue;
        }
        /* struct tun_pi: flags first, in the order of the host. */
        uint16_t strip = 0;
        if (packet_info)
            memcpy(&strip, region + start, 2);
        const uint32_t whole = length;
        const uint32_t own_type = (uint32_t)get(in_table, rows, k, LINK_TYPE) ? (uint32_t)get(in_table, rows, k, LINK_TYPE) : link_type;

        const int bare = per_packet && get(in_table, rows, k, LINK_HEADER) == LRX_NO_LINK_HEADER;

        if (per_packet && !interface && !bare && flags & LRX_OUTGOING && own_type == 772) { /* of lo: it comes in as well */
            expected_counters[LRX_FILTERED]++;
            continue;
        }
        if (filters && length - prefix > keeps)
            length = prefix + keeps;
        if (length == prefix) {
            expected_counters[LRX_FILTERED]++;
            continue;
        }
        if (wire > length || whole > length || strip % 2)
            flags |= LRX_TRUNCATED;
        expected_counters[LRX_CUT] += flags % 2;
        uint32_t header = link_header, type = 0, left = length - prefix;
        int guess = 1;
        if (per_packet) {
            type = (uint32_t)get(in_table, rows, k, LINK_TYPE);
            if (!type)
                type = link_type;
            header = bare || per_packet == LRX_PER_PACKET_NO_HEADER || is_bare(type) ? 0 : is_ethernet(type) ? 14 : link_header;
            protocol = packet_info ? region[start + 2] * 256u + region[start + 3]
                                   : (uint32_t)get(in_table, rows, k, PROTOCOL);
            guess = is_bare(type) || is_ethernet(type);
        }
        if (header && left < header) {
            expected_counters[LRX_RUNTS]++;
            continue;
        }
        /* The type behind an inner tag, where the kernel tells what comes behind that. */
        if (protocol && protocol != 0x8100 && protocol != 0x88A8 && flags & LRX_VLAN && !header && left >= 4) {
            uint32_t inner = frame[2] * 256u + frame[3], all = (wire > whole ? wire : whole) - prefix;
            int known = inner == protocol || inner == 0x8100 || inner == 0x88A8;
            int true_ip = protocol == 0x0800   ? frame[0] / 16 == 4 && frame[0] % 16 >= 5 && inner <= all
                          : protocol == 0x86DD ? frame[0] / 16 == 6 && (left < 6 || frame[4] * 256u + frame[5] + 40 <= all)
                                               : 0;
            if (known && !true_ip)
                protocol = 0x8100;
        }
        if (protocol)
            ;
        else if (header)
            protocol = frame[12] * 256u + frame[13];
        else if (guess && frame[0] / 16 == 4)
            protocol = 0x0800;
        else if (guess && frame[0] / 16 == 6)
            protocol = 0x86DD;
        else if (guess) {
            expected_counters[LRX_UNKNOWN_PROTOCOL]++;
            continue;
        }
        if (per_packet) {
            put(expected, count, n, FILE_TYPE, k % 5);
            put(expected, count, n, LINK_TYPE, type);
            put(expected, count, n, ADDRESS, get(in_table, rows, k, ADDRESS));
            put(expected, count, n, ADDRESS_LENGTH, get(in_table, rows, k, ADDRESS_LENGTH));
            put(expected, count, n, LINK_HEADER, header);
        }
        put(expected, count, n, TIMESTAMP, get(in_table, rows, k, TIMESTAMP));
        put(expected, count, n, START, start + prefix);
        put(expected, count, n, LENGTH, length - prefix);
        put(expected, count, n, WIRE_LENGTH, (wire > whole ? wire : whole) - prefix);
        put(expected, count, n, INTERFACE, k % 3 ? k % 3 * 1000 : interface);
        put(expected, count, n, PROTOCOL, protocol);
        put(expected, count, n, FLAGS, flags);
        put(expected, count, n, VLAN_TCI, get(in_table, rows, k, VLAN_TCI));
        put(expected, count, n, VLAN_TPID, get(in_table, rows, k, VLAN_TPID));
        expected_counters[LRX_PACKETS]++;
        expected_counters[LRX_BYTES] += length - prefix;
        n++;
    }

    uint8_t *untouched_region = exactly(bytes);
    uint8_t *untouched_table = exactly(ROW_BYTES * rows);
    if (bytes)
        memcpy(untouched_region, region, bytes);
    if (rows)
        memcpy(untouched_table, in_table, ROW_BYTES * rows);
    const struct lrx_classifier classifier = {(uintptr_t)descriptors, rows,      prefix,
                                              packet_info,            link_header, link_type,
                                              per_packet,             interface,   (uintptr_t)counters,
                                              {.program = filters ? &keep : NULL}};
    lrx_classify(&classifier, (uintptr_t)region, count, (uintptr_t)table);

    report->count = 0;
    report->classified = n + 1;
    report->rows = count;
    MUST(!memcmp(descriptors, report, sizeof *report));
    MUST(!count || !memcmp(table, expected, ROW_BYTES * count));
    MUST(!bytes || !memcmp(region, untouched_region, bytes));
    MUST(!rows || !memcmp(in_table, untouched_table, ROW_BYTES * rows));
    MUST(!memcmp(counters, expected_counters, sizeof expected_counters));
    free(region);
    free(table);
    free(expected);
    free(descriptors);
    free(counters);
    free(untouched_region);
    free(untouched_table);
    return 0;
}
