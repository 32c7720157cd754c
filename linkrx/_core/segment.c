/* Software segmentation of super-packets, as in the kernel: tcp_gso_segment, __udp_gso_segment, inet_gso_segment,
 * ipv6_gso_segment. Finishes the checksums of other packets as skb_checksum_help does. */
#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <linux/if_tun.h>
#include <string.h>

#include "report.h"
#include "checksum.inc"
#include "columns.inc"
#include "classify.h"
#include "link.inc"
#include "segment.h"

/* linux/virtio_net.h. Older headers lack some of these names. */
struct vnet {
    uint8_t flags, gso_type;
    uint16_t hdr_len, gso_size, csum_start, csum_offset;
};
#define VNET_BYTES 10
#define NEEDS_CSUM 1
#define GSO_NONE 0
#define GSO_TCPV4 1
#define GSO_TCPV6 4
#define GSO_UDP_L4 5
#define GSO_ECN 0x80

#define VLAN_TAGS_MOST 2

#define IPV4_HEADER 20
#define IPV4_LENGTH_AT 2
#define IPV4_ID_AT 4
#define IPV4_FRAGMENT_AT 6
#define IPV4_FRAGMENT 0x3FFF /* more fragments, or an offset */
#define IPV4_PROTOCOL_AT 9
#define IPV4_CHECKSUM_AT 10
#define IPV4_ADDRESSES_AT 12

#define IPV6_HEADER 40
#define IPV6_LENGTH_AT 4
#define IPV6_NEXT_AT 6
#define IPV6_ADDRESSES_AT 8
#define IP_LENGTH_MOST 65535
/* RFC 2675. The kernel inserts a jumbo payload option in front of TCP if the packet is longer than 65,536 bytes. */
#define JUMBO_BYTES 8
#define JUMBO_OPTION_AT 2
#define JUMBO_OPTION 194
#define JUMBO_LEAST 65536

#define TCP_HEADER 20
#define TCP_HEADER_MOST 60
#define TCP_SEQUENCE_AT 4
#define TCP_OFFSET_AT 12
#define TCP_FLAGS_AT 13
#define TCP_CHECKSUM_AT 16
#define TCP_FIN_PSH 0x09
#define TCP_CWR 0x80

#define UDP_HEADER 8
#define UDP_LENGTH_AT 4
#define UDP_CHECKSUM_AT 6

/* A super-packet, or a packet with an unfinished checksum. Offsets are in the frame. */
struct parsed {
    const uint8_t *frame;
    uint32_t length;
    uint32_t network;   /* the offset of the IP header */
    uint32_t transport; /* the offset of the TCP or UDP header */
    uint32_t payload;   /* the offset of its payload */
    uint32_t size;      /* bytes of payload of every segment but the last */
    uint32_t segments;  /* at least two */
    uint32_t version;   /* 4 or 6 */
    uint32_t protocol;  /* IPPROTO_TCP or IPPROTO_UDP */
    uint32_t left_out;  /* bytes of a jumbo payload option after the fixed IPv6 header, which segments do not have */
    uint64_t network_sum;   /* the sum of the IPv4 header without length, id and checksum */
    uint64_t transport_sum; /* the sum of pseudo-header and header without the fields that differ between segments */
};

enum verdict { COPY, FINISH, SPLIT, MALFORMED };

/* The length of the IP header with options and extension headers; 0 if the packet cannot be split. */
static uint32_t ip_header(struct parsed *p)
{
    const uint8_t *ip = p->frame + p->network;
    uint32_t room = p->length - p->network, size = IPV6_HEADER;

    if (p->version == 4) {
        if (room < IPV4_HEADER || ip[0] >> 4 != 4 || read16(ip + IPV4_FRAGMENT_AT) & IPV4_FRAGMENT)
            return 0;
        p->protocol = ip[IPV4_PROTOCOL_AT];
        size = (ip[0] & 0x0Fu) * 4;
        return size >= IPV4_HEADER && size <= room ? size : 0;
    }
    if (room < IPV6_HEADER || ip[0] >> 4 != 6)
        return 0;
    p->protocol = ip[IPV6_NEXT_AT];
    while (p->protocol == IPPROTO_HOPOPTS || p->protocol == IPPROTO_ROUTING || p->protocol == IPPROTO_DSTOPTS) {
        if (room - size < 8)
            return 0;
        p->protocol = ip[size];
        size += (ip[size + 1] + 1u) * 8;
        if (size > room)
            return 0;
    }
    ip += IPV6_HEADER;
    if (room > JUMBO_LEAST && p->frame[p->network + IPV6_NEXT_AT] == IPPROTO_HOPOPTS && ip[0] == IPPROTO_TCP &&
        ip[1] == 0 && ip[JUMBO_OPTION_AT] == JUMBO_OPTION)
        p->left_out = JUMBO_BYTES;
    return size;
}

/* Find the IP header and its version by the link header. Returns 0 if there is none. */
static int network_found(struct parsed *p, uint32_t link_header)
{
    uint32_t at = 2 * ETH_ALEN, ethertype;

    if (p->length <= link_header)
        return 0;
    if (!link_header) {
        p->network = 0;
        p->version = p->frame[0] >> 4;
        return p->version == 4 || p->version == 6;
    }
    ethertype = read16(p->frame + at);
    for (int tags = 0; ethertype == ETH_P_8021Q || ethertype == ETH_P_8021AD; tags++) {
        at += 4;
        if (tags == VLAN_TAGS_MOST || p->length < at + 2)
            return 0;
        ethertype = read16(p->frame + at);
    }
    p->network = at + 2;
    p->version = ethertype == ETH_P_IP ? 4 : 6;
    return (ethertype == ETH_P_IP || ethertype == ETH_P_IPV6) && p->network < p->length;
}

/* Find the headers of a super-packet. Returns 0 if they are not all inside the frame, or differ from the virtio-net header. */
static int headers_found(struct parsed *p, const struct vnet *v, uint32_t link_header)
{
    uint32_t size, room, checksum_at;

    p->left_out = 0;
    if (!network_found(p, link_header) || !(size = ip_header(p)))
        return 0;
    p->transport = p->network + size;
    room = p->length - p->transport;
    if (v->gso_type == GSO_UDP_L4) {
        /* The kernel refuses them without NEEDS_CSUM. */
        if (p->protocol != IPPROTO_UDP || room < UDP_HEADER || !(v->flags & NEEDS_CSUM))
            return 0;
        size = UDP_HEADER;
        checksum_at = UDP_CHECKSUM_AT;
    } else {
        if ((v->gso_type & ~GSO_ECN) != (p->version == 4 ? GSO_TCPV4 : GSO_TCPV6) ||
            p->protocol != IPPROTO_TCP || room < TCP_HEADER)
            return 0;
        size = (p->frame[p->transport + TCP_OFFSET_AT] >> 4) * 4u;
        if (size < TCP_HEADER || size > room)
            return 0;
        checksum_at = TCP_CHECKSUM_AT;
    }
    p->payload = p->transport + size;
    return !(v->flags & NEEDS_CSUM) || (v->csum_start == p->transport && v->csum_offset == checksum_at);
}

/* Compute the sums that all segments share. With NEEDS_CSUM the checksum field has the sender's sum of the pseudo-header, with the
 * length of the whole packet. Use it, as the kernel does: with a routing header, only the sender knows the final destination. */
static void add_up(struct parsed *p, const struct vnet *v)
{
    const uint8_t *ip = p->frame + p->network, *l4 = p->frame + p->transport;
    uint32_t tcp = p->protocol == IPPROTO_TCP, checksum_at = tcp ? TCP_CHECKSUM_AT : UDP_CHECKSUM_AT;
    uint8_t header[TCP_HEADER_MOST];

    if (p->version == 4) {
        memcpy(header, ip, p->transport - p->network);
        put_word(header + IPV4_LENGTH_AT, 0);
        put_word(header + IPV4_ID_AT, 0);
        put_word(header + IPV4_CHECKSUM_AT, 0);
        p->network_sum = sum_of(header, p->transport - p->network);
    }
    memcpy(header, l4, p->payload - p->transport);
    put_word(header + checksum_at, 0);
    if (tcp) {
        memset(header + TCP_SEQUENCE_AT, 0, 4);
        put_word(header + TCP_OFFSET_AT, 0);
    } else {
        put_word(header + UDP_LENGTH_AT, 0);
    }
    p->transport_sum = sum_of(header, p->payload - p->transport);
    if (v->flags & NEEDS_CSUM) {
        p->transport_sum += word_at(l4 + checksum_at);
        p->transport_sum += tcp ? (uint32_t)~htonl(p->length - p->transport)
                                : (uint16_t)~word_at(l4 + UDP_LENGTH_AT);
    } else {
        p->transport_sum += htons((uint16_t)p->protocol);
        p->transport_sum += p->version == 4 ? sum_of(ip + IPV4_ADDRESSES_AT, 8) : sum_of(ip + IPV6_ADDRESSES_AT, 32);
    }
}

static enum verdict judged(struct parsed *p, const struct vnet *v, uint32_t link_header, int truncated)
{
    if (v->gso_type != GSO_NONE) {
        uint32_t payload;

        if (truncated || !v->gso_size || !headers_found(p, v, link_header))
            return MALFORMED;
        payload = p->length - p->payload;
        if (payload > v->gso_size) {
            if (p->payload - p->network + v->gso_size > IP_LENGTH_MOST)
                return MALFORMED;
            p->size = v->gso_size;
            p->segments = (payload + p->size - 1) / p->size;
            add_up(p, v);
            return SPLIT;
        }
        /* One segment: the kernel treats it as an ordinary packet. */
    }
    if (!(v->flags & NEEDS_CSUM) || truncated)
        return COPY;
    return (uint32_t)v->csum_start + v->csum_offset + 2 <= p->length ? FINISH : MALFORMED;
}

/* skb_checksum_help: for every protocol, a sum of zero is written as 0xffff. */
static void finish(uint8_t *frame, uint32_t length, const struct vnet *v)
{
    uint16_t sum = (uint16_t)~folded(sum_of(frame + v->csum_start, length - v->csum_start));

    put_word(frame + v->csum_start + v->csum_offset, sum ? sum : 0xFFFF);
}

/* Write segment k of the super-packet: `length` bytes with headers. */
static void write_segment(const struct parsed *p, uint32_t k, uint8_t *out, uint32_t length)
{
    uint32_t headers = p->payload - p->left_out, payload = length - headers;
    const uint8_t *from = p->frame + p->payload + (size_t)k * p->size;
    uint8_t *ip = out + p->network, *l4 = out + p->transport - p->left_out;
    uint64_t sum = p->transport_sum + copied(out + headers, from, payload);
    uint32_t l4_length = headers - (p->transport - p->left_out) + payload;

    if (p->left_out) {
        uint32_t kept = p->network + IPV6_HEADER;

        memcpy(out, p->frame, kept);
        memcpy(out + kept, p->frame + kept + p->left_out, headers - kept);
        ip[IPV6_NEXT_AT] = IPPROTO_TCP;
    } else {
        memcpy(out, p->frame, headers);
    }
    if (p->version == 4) {
        uint16_t total = htons((uint16_t)(length - p->network));
        uint16_t id = htons((uint16_t)(read16(ip + IPV4_ID_AT) + k));

        put_word(ip + IPV4_LENGTH_AT, total);
        put_word(ip + IPV4_ID_AT, id);
        put_word(ip + IPV4_CHECKSUM_AT, (uint16_t)~folded(p->network_sum + total + id));
    } else {
        put_word(ip + IPV6_LENGTH_AT, htons((uint16_t)(length - p->network - IPV6_HEADER)));
    }
    if (p->protocol == IPPROTO_TCP) {
        uint32_t sequence;

        memcpy(&sequence, l4 + TCP_SEQUENCE_AT, sizeof sequence);
        sequence = htonl(ntohl(sequence) + k * p->size);
        memcpy(l4 + TCP_SEQUENCE_AT, &sequence, sizeof sequence);
        if (k)
            l4[TCP_FLAGS_AT] &= (uint8_t)~TCP_CWR;
        if (k + 1 < p->segments)
            l4[TCP_FLAGS_AT] &= (uint8_t)~TCP_FIN_PSH;
        sum += (uint64_t)sequence + word_at(l4 + TCP_OFFSET_AT) + htonl(l4_length);
        put_word(l4 + TCP_CHECKSUM_AT, (uint16_t)~folded(sum));
    } else {
        uint16_t udp_length = htons((uint16_t)l4_length), checksum;

        put_word(l4 + UDP_LENGTH_AT, udp_length);
        checksum = (uint16_t)~folded(sum + 2ull * udp_length);
        put_word(l4 + UDP_CHECKSUM_AT, checksum ? checksum : 0xFFFF);
    }
}

/* The frames that were written so far. */
struct output {
    struct lrx_columns columns;
    uint8_t *memory;
    uint64_t size;
    uint32_t rows, n, cursor;
};

/* Reserve memory for a frame of `length` bytes with prefix, and copy its metadata from row k of `in`. NULL: there is no room. */
static uint8_t *place(struct output *o, uint32_t length, const struct lrx_columns *in, uint32_t k)
{
    uint64_t end = ((uint64_t)o->cursor + length + 7) & ~7ull;
    uint32_t n = o->n, start = o->cursor;

    if (n == o->rows || end > o->size)
        return NULL;
    o->columns.starts[n] = start;
    o->columns.lengths[n] = length;
    o->columns.wire_lengths[n] = in->wire_lengths[k];
    o->columns.interfaces[n] = in->interfaces[k];
    o->columns.timestamps[n] = in->timestamps[k];
    o->columns.flags[n] = in->flags[k];
    o->columns.vlan_tcis[n] = in->vlan_tcis[k];
    o->columns.vlan_tpids[n] = in->vlan_tpids[k];
    o->columns.protocols[n] = in->protocols[k];
    o->columns.file_types[n] = in->file_types[k];
    o->columns.link_types[n] = in->link_types[k];
    o->columns.addresses[n] = in->addresses[k];
    o->columns.address_lengths[n] = in->address_lengths[k];
    o->n++;
    o->cursor = (uint32_t)end;
    return o->memory + start;
}

static uint16_t in_order(uint16_t number, uint32_t swapped)
{
    return swapped ? (uint16_t)(number << 8 | number >> 8) : number;
}

static uint32_t link_header_of(const struct lrx_segmenter *s, uint16_t link_type)
{
    return s->per_packet ? lrx_link_header_of(link_type ? link_type : (uint16_t)s->link_type, s->per_packet, s->link_header) : s->link_header;
}

/* Write row k of `taken`, beginning with segment s->done. Returns 0 if there is no room for all of it. */
static int give(struct lrx_segmenter *s, const uint8_t *received, const struct lrx_columns *in, uint32_t k,
                struct output *o)
{
    const uint32_t prefix = s->packet_info + s->vnet, length = in->lengths[k];
    enum verdict verdict = COPY;
    uint16_t strip = 0, truncated = 0;
    struct parsed p = {0};
    struct vnet v = {0};
    uint8_t *out;

    if (length > prefix) {
        if (s->packet_info)
            memcpy(&strip, received, sizeof strip);
        truncated = in->flags[k] & LRX_TRUNCATED || in->wire_lengths[k] > length || strip & TUN_PKT_STRIP;
        memcpy(&v, received + s->packet_info, VNET_BYTES);
        v.gso_size = in_order(v.gso_size, s->swapped);
        v.csum_start = in_order(v.csum_start, s->swapped);
        v.csum_offset = in_order(v.csum_offset, s->swapped);
        p.frame = received + prefix;
        p.length = length - prefix;
        verdict = judged(&p, &v, link_header_of(s, in->link_types[k]), truncated);
    }
    if (verdict == SPLIT) {
        const uint32_t headers = prefix + p.payload - p.left_out;

        for (; s->done < p.segments; s->done++) {
            uint32_t rest = p.length - p.payload - s->done * p.size;
            uint32_t whole = headers + (rest < p.size ? rest : p.size);

            if (!(out = place(o, whole, in, k)))
                return 0;
            o->columns.wire_lengths[o->n - 1] = 0;
            o->columns.flags[o->n - 1] &= (uint16_t)~LRX_CHECKSUM_UNFINISHED;
            memcpy(out, received, s->packet_info);
            memset(out + s->packet_info, 0, s->vnet);
            write_segment(&p, s->done, out + prefix, whole - prefix);
        }
        return 1;
    }
    if (!(out = place(o, verdict == MALFORMED ? 0 : length, in, k)))
        return 0;
    if (verdict == MALFORMED) {
        o->columns.wire_lengths[o->n - 1] = 0;
        o->columns.flags[o->n - 1] |= LRX_MALFORMED | (truncated ? LRX_TRUNCATED : 0);
        return 1;
    }
    memcpy(out, received, length);
    if (verdict == FINISH) {
        finish(out + prefix, p.length, &v);
        o->columns.flags[o->n - 1] &= (uint16_t)~LRX_CHECKSUM_UNFINISHED;
    }
    if (verdict == FINISH || v.gso_type != GSO_NONE)
        memset(out + s->packet_info, 0, VNET_BYTES);
    return 1;
}

/* Receive a few super-packets, so that they are still in the cache when they are split. Returns 0 if there are none. */
static int receive(const struct lrx_segmenter *s, uintptr_t staging, const struct output *o)
{
    const struct lrx_mechanism *m = s->mechanism;

    return m && o->n < o->rows && (o->n == 0 || o->size - o->cursor >= s->spare) &&
           (m->fill(m->state, s->taken, s->taken_rows, staging, s->staged) > 0 ||
            lrx_report_at(s->taken)->error);
}

int lrx_segment(struct lrx_segmenter *s, uintptr_t staging, uintptr_t region, uint32_t size)
{
    const struct lrx_columns in = lrx_descriptors_at(s->taken, s->taken_rows);
    struct lrx_report *taken = lrx_report_at(s->taken), *given = lrx_report_at(s->given);
    uint32_t receives = 0;
    struct output o = {
        .columns = lrx_descriptors_at(s->given, s->given_rows),
        .memory = (uint8_t *)region,
        .size = size,
        /* Frames that are held back take rows of the same batch. */
        .rows = s->given_rows - (given->held_back < s->given_rows ? given->held_back : 0),
    };

    do {
        while (s->next < taken->count &&
               give(s, (const uint8_t *)staging + in.starts[s->next], &in, s->next, &o)) {
            s->next++;
            s->done = 0;
        }
        receives += taken->receives;
        taken->receives = 0;
        if (s->next < taken->count)
            break;
        taken->count = s->next = s->done = 0;
        /* The errno follows the last packet. */
        if (taken->error)
            given->error = taken->error;
        taken->error = 0;
    } while (!given->error && receive(s, staging, &o));
    return lrx_received(s->given, region, o.n, receives, o.cursor);
}
