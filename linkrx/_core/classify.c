/* Classification: decides which received frames are packets, and writes the columns of a batch in one pass. */
#include <stdbool.h>
#include <string.h>

#include "report.h"
#include "columns.inc"
#include "classify.h"
#include "link.inc"

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86DD
#define ETHERTYPE_VLAN 0x8100
#define ETHERTYPE_SERVICE_VLAN 0x88A8
/* linux/if_tun.h: the queue cut the packet to the buffer. Only packet information has this flag. */
#define TUN_PKT_STRIP 0x0001

/* The number of bytes of a frame that the filter keeps; 0 if it rejects the packet. */
static uint32_t filtered(const struct lrx_classifier *c, const struct lrx_columns *in, uint32_t k, const uint8_t *frame,
                         uint32_t length, uint32_t wire_length, uint32_t link_header, uint32_t link_type, uint32_t protocol)
{
    const struct lrx_filtered packet = {
        .frame = frame,
        .length = length,
        .wire_length = wire_length,
        .link_header = link_header,
        .link_type = link_type,
        .protocol = protocol,
        .file_type = in->file_types[k],
        .interface = in->interfaces[k] ? in->interfaces[k] : c->interface,
        .outgoing = in->flags[k] & LRX_OUTGOING,
        .tagged = in->flags[k] & LRX_VLAN,
        .vlan_tci = in->vlan_tcis[k],
        .vlan_tpid = in->vlan_tpids[k],
    };

    return lrx_filter_run(&c->filter, &packet);
}

static uint16_t word_at(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

/* Whether data of a cooked socket begin with the TCI and EtherType of an inner tag. The kernel takes out the outer tag of a frame
 * with two, and its data begin after the TPID of the inner one. Since Linux 6.10 the reported protocol is that of the packet after
 * the inner tag (vlan_get_protocol_dgram() in net/packet/af_packet.c). So there is a tag if the EtherType fits, and the header of
 * the reported protocol is not at the beginning. */
static bool has_inner_tag(const uint8_t *data, uint32_t length, uint32_t wire_length, uint16_t reported)
{
    uint16_t type;

    if (length < 4 || reported == ETHERTYPE_VLAN || reported == ETHERTYPE_SERVICE_VLAN)
        return false;
    type = word_at(data + 2);
    if (type != reported && type != ETHERTYPE_VLAN && type != ETHERTYPE_SERVICE_VLAN)
        return false;
    if (reported == ETHERTYPE_IPV4) /* version, header length, total length */
        return data[0] >> 4 != 4 || (data[0] & 15) < 5 || type > wire_length;
    if (reported == ETHERTYPE_IPV6) /* version, payload length */
        return data[0] >> 4 != 6 || (length >= 6 && word_at(data + 4) + 40u > wire_length);
    return true;
}

/* The protocol in struct tun_pi, or the one that the backend reports. */
static uint16_t reported_protocol(const struct lrx_classifier *c, const uint8_t *packet, uint16_t reported)
{
    return c->packet_info ? (uint16_t)(packet[2] << 8 | packet[3]) : reported;
}

/* Inlined twice with a constant `per_packet`, so that other sources do not pay for the checks. */
static inline __attribute__((always_inline)) void classify(const struct lrx_classifier *c, uintptr_t region, uint32_t count,
                                                           uintptr_t table, const bool per_packet)
{
    const struct lrx_columns in = lrx_descriptors_at(c->descriptors, c->rows);
    const struct lrx_columns out = lrx_columns_at(table, count);
    struct lrx_report *report = lrx_report_at(c->descriptors);
    const uint8_t *memory = (const uint8_t *)region;
    uint64_t *counters = (uint64_t *)c->counters;
    /* Copies, because the compiler must expect that a column or a counter lies in the classifier. */
    const uint32_t prefix = c->prefix, packet_info = c->packet_info, usual_link_header = c->link_header, usual_interface = c->interface;
    const bool filters = c->filter.program || (per_packet && c->filter.files);
    uint64_t bytes = 0;
    uint32_t n = 0;

    for (uint32_t k = 0; k < count; k++) {
        uint32_t length = in.lengths[k];
        uint32_t wire_length = in.wire_lengths[k];
        uint16_t flags = in.flags[k];
        uint32_t link_header = usual_link_header;
        uint16_t protocol = 0, link_type = 0;
        const uint8_t *frame = memory + in.starts[k] + prefix;

        if (flags & LRX_MALFORMED) {
            counters[LRX_COUNT_MALFORMED]++;
            counters[LRX_CUT] += flags & LRX_TRUNCATED;
            continue;
        }
        if (length <= prefix) {
            counters[LRX_EMPTY]++;
            continue;
        }
        if (packet_info) {
            uint16_t pi_flags;
            memcpy(&pi_flags, memory + in.starts[k], sizeof pi_flags);
            if (pi_flags & TUN_PKT_STRIP)
                flags |= LRX_TRUNCATED;
        }
        length -= prefix;
        wire_length = wire_length > length + prefix ? wire_length - prefix : length;
        if (per_packet) {
            const bool bare = in.link_headers[k] == LRX_NO_LINK_HEADER;

            link_type = in.link_types[k] ? in.link_types[k] : (uint16_t)c->link_type;
            link_header = bare ? 0 : lrx_link_header_of(link_type, c->per_packet, c->link_header);
            protocol = reported_protocol(c, memory + in.starts[k], in.protocols[k]);
            /* A socket on every interface gets each packet of lo twice, outgoing and incoming. Drop the outgoing one; not in files. */
            if (flags & LRX_OUTGOING && link_type == ARPHRD_LOOPBACK && !c->interface && !bare) {
                counters[LRX_FILTERED]++;
                continue;
            }
        }
        if (filters) {
            length = filtered(c, &in, k, frame, length, wire_length, link_header, per_packet ? link_type : c->link_type, protocol);
            if (!length) {
                counters[LRX_FILTERED]++;
                continue;
            }
        }
        if (wire_length > length)
            flags |= LRX_TRUNCATED;
        if (flags & LRX_TRUNCATED)
            counters[LRX_CUT]++;
        if (per_packet && protocol && flags & LRX_VLAN && !link_header && has_inner_tag(frame, length, wire_length, protocol)) {
            protocol = ETHERTYPE_VLAN;
        }
        if (link_header && length < link_header) {
            counters[LRX_RUNTS]++;
            continue;
        }
        if (per_packet && protocol) {
            ;
        } else if (link_header) {
            protocol = (uint16_t)(frame[12] << 8 | frame[13]);
        } else if (!per_packet || lrx_is_ethernet(link_type) || lrx_is_bare_ip(link_type)) {
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
        out.starts[n] = in.starts[k] + prefix;
        out.lengths[n] = length;
        out.wire_lengths[n] = wire_length;
        out.interfaces[n] = in.interfaces[k] ? in.interfaces[k] : usual_interface;
        out.protocols[n] = protocol;
        out.flags[n] = flags;
        out.vlan_tcis[n] = in.vlan_tcis[k];
        out.vlan_tpids[n] = in.vlan_tpids[k];
        if (per_packet) {
            out.file_types[n] = in.file_types[k];
            out.link_types[n] = link_type;
            out.addresses[n] = in.addresses[k];
            out.address_lengths[n] = in.address_lengths[k];
            out.link_headers[n] = (uint8_t)link_header;
        }
        bytes += length;
        n++;
    }
    counters[LRX_PACKETS] += n;
    counters[LRX_BYTES] += bytes;
    report->classified = n + 1;
    report->rows = count;
    report->count = 0;
}

void lrx_classify(const struct lrx_classifier *c, uintptr_t region, uint32_t count, uintptr_t table)
{
    if (c->per_packet)
        classify(c, region, count, table, true);
    else
        classify(c, region, count, table, false);
}

int lrx_received(uintptr_t descriptors, uintptr_t frames, uint32_t count, uint32_t receives, uint32_t end)
{
    struct lrx_report *report = lrx_report_at(descriptors);
    const struct lrx_classifier *c = report->classifier;

    /* The report has all of this, because an exception of a signal handler may discard the return value. */
    report->count = count;
    report->receives = receives;
    report->end = end;
    if (c && count)
        lrx_classify(c, frames, count, report->table);
    return (int)count;
}
