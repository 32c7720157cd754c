/* One pass over what a backend received: which are packets, and what is known about each. */
#include <string.h>

#include "report.h"
#include "columns.inc"
#include "classify.h"

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86DD
/* linux/if_tun.h: the queue cut the packet to the buffer. Told only with packet information. */
#define TUN_PKT_STRIP 0x0001

/* How many bytes of a frame the filter keeps; 0: it rejects the packet. */
static uint32_t filtered(const struct lrx_classifier *c, const struct lrx_columns *in, uint32_t k, const uint8_t *frame,
                         uint32_t length, uint32_t wire_length)
{
    const struct lrx_filtered packet = {
        .frame = frame,
        .length = length,
        .wire_length = wire_length,
        .link_header = c->link_header,
        .interface = in->interfaces[k] ? in->interfaces[k] : c->interface,
        .outgoing = in->flags[k] & LRX_OUTGOING,
        .tagged = in->flags[k] & LRX_VLAN,
        .vlan_tci = in->vlan_tcis[k],
        .vlan_tpid = in->vlan_tpids[k],
    };

    return lrx_filter_run(&c->filter, &packet);
}

void lrx_classify(const struct lrx_classifier *c, uintptr_t region, uint32_t count, uintptr_t table)
{
    const struct lrx_columns in = lrx_descriptors_at(c->descriptors, c->rows);
    const struct lrx_columns out = lrx_columns_at(table, count);
    struct lrx_report *report = lrx_report_at(c->descriptors);
    const uint8_t *memory = (const uint8_t *)region;
    uint64_t *counters = (uint64_t *)c->counters;
    uint64_t bytes = 0;
    uint32_t n = 0;

    for (uint32_t k = 0; k < count; k++) {
        uint32_t length = in.lengths[k];
        uint32_t wire_length = in.wire_lengths[k];
        uint16_t flags = in.flags[k];
        uint16_t protocol;
        const uint8_t *frame = memory + in.starts[k] + c->prefix;

        if (flags & LRX_MALFORMED) {
            counters[LRX_COUNT_MALFORMED]++;
            counters[LRX_CUT] += flags & LRX_TRUNCATED;
            continue;
        }
        if (length <= c->prefix) {
            counters[LRX_EMPTY]++;
            continue;
        }
        if (c->packet_info) {
            uint16_t pi_flags;
            memcpy(&pi_flags, memory + in.starts[k], sizeof pi_flags);
            if (pi_flags & TUN_PKT_STRIP)
                flags |= LRX_TRUNCATED;
        }
        length -= c->prefix;
        wire_length = wire_length > length + c->prefix ? wire_length - c->prefix : length;
        if (c->filter.program) {
            length = filtered(c, &in, k, frame, length, wire_length);
            if (!length) {
                counters[LRX_FILTERED]++;
                continue;
            }
        }
        if (wire_length > length)
            flags |= LRX_TRUNCATED;
        if (flags & LRX_TRUNCATED)
            counters[LRX_CUT]++;
        if (c->link_header) {
            if (length < c->link_header) {
                counters[LRX_RUNTS]++;
                continue;
            }
            protocol = (uint16_t)(frame[12] << 8 | frame[13]);
        } else {
            switch (frame[0] >> 4) {
            case 4:
                protocol = ETHERTYPE_IPV4;
                break;
            case 6:
                protocol = ETHERTYPE_IPV6;
                break;
            default:
                counters[LRX_UNKNOWN_PROTOCOL]++;
                continue;
            }
        }
        out.timestamps[n] = in.timestamps[k];
        out.starts[n] = in.starts[k] + c->prefix;
        out.lengths[n] = length;
        out.wire_lengths[n] = wire_length;
        out.interfaces[n] = in.interfaces[k] ? in.interfaces[k] : c->interface;
        out.protocols[n] = protocol;
        out.flags[n] = flags;
        out.vlan_tcis[n] = in.vlan_tcis[k];
        out.vlan_tpids[n] = in.vlan_tpids[k];
        bytes += length;
        n++;
    }
    counters[LRX_PACKETS] += n;
    counters[LRX_BYTES] += bytes;
    report->classified = n + 1;
    report->rows = count;
    report->count = 0;
}

int lrx_received(uintptr_t descriptors, uintptr_t frames, uint32_t count, uint32_t receives, uintptr_t region,
                 uint32_t end)
{
    struct lrx_report *report = lrx_report_at(descriptors);
    const struct lrx_classifier *c = report->classifier;

    /* All is kept here as well: a signal handler that raises takes the return value from Python. */
    report->count = count;
    report->receives = receives;
    report->end = end;
    if (c && count)
        lrx_classify(c, frames, count, region + end);
    return (int)count;
}
