/* Loads that are relative to a header, and ancillary loads. */
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/if_packet.h>
#include <sched.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "bpf.h"
#include "bpf_view.inc"

/* linux/if_ether.h conflicts with the C library's headers. */
#define ETHER_HEADER 14 /* linux/if_ether.h: ETH_HLEN */
#define ETH_P_802_3 0x0001
#define ETH_P_802_2 0x0004
#define ETH_P_802_3_MIN 0x0600
#define ETH_P_IP 0x0800
#define ETH_P_ARP 0x0806
#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88A8
#define ETH_P_IPV6 0x86DD

static uint8_t byte_at(const struct view *v, uint32_t at)
{
    const struct lrx_filtered *p = v->packet;
    const uint8_t tag[TAG] = {(uint8_t)(p->vlan_tpid >> 8), (uint8_t)p->vlan_tpid, (uint8_t)(p->vlan_tci >> 8), (uint8_t)p->vlan_tci};

    if (!v->tag || at < TAG_AT)
        return p->frame[at];
    return at < TAG_AT + TAG ? tag[at - TAG_AT] : p->frame[at - TAG];
}

bool lrx_load(const struct view *v, int32_t at, uint32_t size, uint32_t *value)
{
    uint64_t from = (uint32_t)at;

    if (at < 0) {
        if (at >= SKF_NET_OFF)
            from = (uint64_t)(at - SKF_NET_OFF) + v->packet->link_header;
        else if (at >= SKF_LL_OFF)
            from = (uint64_t)(at - SKF_LL_OFF);
        else
            return false;
    }
    if (from + size > v->length)
        return false;
    *value = 0;
    for (uint32_t k = 0; k < size; k++)
        *value = *value << 8 | byte_at(v, (uint32_t)from + k);
    return true;
}

/* eth_type_trans(): the EtherType, or the kernel's number for a frame with a length instead. */
static uint32_t protocol_of(const struct view *v)
{
    const struct lrx_filtered *p = v->packet;
    uint32_t type, start;

    if (p->protocol)
        return p->protocol;
    if (p->link_header != ETHER_HEADER) {
        const uint32_t version = p->length > p->link_header ? p->frame[p->link_header] >> 4 : 0;

        return version == 4 ? ETH_P_IP : version == 6 ? ETH_P_IPV6 : 0;
    }
    if (p->length < p->link_header)
        return 0;
    type = (uint32_t)(p->frame[12] << 8 | p->frame[13]);
    if (type >= ETH_P_802_3_MIN)
        return type;
    start = p->length >= 16 ? (uint32_t)(p->frame[14] << 8 | p->frame[15]) : 0;
    return start == 0xFFFF ? ETH_P_802_3 : ETH_P_802_2;
}

static uint32_t packet_type_of(const struct lrx_filtered *p)
{
    static const uint8_t broadcast[6] = {0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF};

    if (p->outgoing)
        return PACKET_OUTGOING;
    if (p->link_header != ETHER_HEADER || p->length < sizeof broadcast || !(p->frame[0] & 1))
        return PACKET_HOST;
    return memcmp(p->frame, broadcast, sizeof broadcast) == 0 ? PACKET_BROADCAST : PACKET_MULTICAST;
}

/* The offset of the payload of the transport protocol. The kernel's skb_get_poff() knows more protocols, and tunnels. */
static uint32_t payload_of(const struct view *v)
{
    uint32_t type = protocol_of(v), at = v->packet->link_header, word, protocol = 0;
    bool first = true; /* the first fragment, or no fragment */

    while (type == ETH_P_8021Q || type == ETH_P_8021AD) {
        if (!lrx_load(v, (int32_t)at + 2, 2, &type))
            return 0;
        at += TAG;
    }
    if (type == ETH_P_IP) {
        uint32_t start;

        if (!lrx_load(v, (int32_t)at + 16, 4, &word) || !lrx_load(v, (int32_t)at, 1, &start) || (start & 15) < 5)
            return 0;
        (void)lrx_load(v, (int32_t)at + 9, 1, &protocol);
        (void)lrx_load(v, (int32_t)at + 6, 2, &word);
        first = !(word & 0x1FFF);
        at += 4 * (start & 15);
    } else if (type == ETH_P_IPV6) {
        if (!lrx_load(v, (int32_t)at + 36, 4, &word) || !lrx_load(v, (int32_t)at + 6, 1, &protocol))
            return 0;
        at += 40;
        while (protocol == 0 || protocol == 43 || protocol == 60) { /* hop-by-hop, routing, destination options */
            if (!lrx_load(v, (int32_t)at, 2, &word))
                return 0;
            protocol = word >> 8;
            at += 8 * ((word & 0xFF) + 1);
        }
        if (protocol == 44) {
            if (!lrx_load(v, (int32_t)at, 4, &word))
                return 0;
            protocol = word >> 24;
            first = !(word & 0xFFF8);
            at += 8;
        }
    } else if (type != ETH_P_ARP) {
        return 0;
    }
    at = at < v->length ? at : v->length;
    if (type == ETH_P_ARP || !first)
        return at;
    switch (protocol) {
    case 6: /* TCP */
        if (!lrx_load(v, (int32_t)at + 12, 1, &word))
            return at;
        word = (word & 0xF0) >> 2;
        return at + (word > 20 ? word : 20);
    case 33: /* DCCP: struct dccp_hdr */
    case 132: /* SCTP: struct sctphdr */
        return at + 12;
    case 1: /* ICMP */
    case 2: /* IGMP */
    case 17: /* UDP */
    case 58: /* ICMPv6 */
    case 136: /* UDP-Lite */
        return at + 8;
    }
    return at;
}

/* bpf_skb_get_nlattr(): the offset of the attribute of this type at or after `at`; nested: inside the attribute at `at`. */
static uint32_t attribute_of(const struct view *v, uint32_t at, uint32_t type, bool nested)
{
    const struct lrx_filtered *p = v->packet;
    uint64_t end = p->length;
    uint16_t header[2]; /* struct nlattr: length and type, in host byte order */

    if (end < sizeof header || at > end - sizeof header)
        return 0;
    if (nested) {
        memcpy(header, p->frame + at, sizeof header);
        if (header[0] > end - at || header[0] < sizeof header)
            return 0;
        end = (uint64_t)at + header[0];
        at += sizeof header;
    }
    while (at + sizeof header <= end) {
        memcpy(header, p->frame + at, sizeof header);
        if (header[0] < sizeof header || header[0] > end - at)
            return 0;
        if ((header[1] & 0x3FFF) == type) /* NLA_TYPE_MASK */
            return at;
        at += (header[0] + 3u) & ~3u;
    }
    return 0;
}

bool lrx_load_ancillary(const struct view *v, uint32_t k, uint32_t x, uint32_t *a)
{
    const struct lrx_filtered *p = v->packet;
    struct timespec now;

    switch (k) {
    case AD(SKF_AD_PROTOCOL):
        *a = protocol_of(v);
        return true;
    case AD(SKF_AD_PKTTYPE):
        *a = packet_type_of(p);
        return true;
    case AD(SKF_AD_IFINDEX):
    case AD(SKF_AD_HATYPE):
        if (!p->interface && !p->file_type) /* a packet of a file may have no interface */
            return false;
        *a = k == AD(SKF_AD_IFINDEX) ? p->interface : p->link_type;
        return true;
    case AD(SKF_AD_NLATTR):
    case AD(SKF_AD_NLATTR_NEST):
        *a = attribute_of(v, *a, x, k == AD(SKF_AD_NLATTR_NEST));
        return true;
    case AD(SKF_AD_CPU):
        *a = (uint32_t)sched_getcpu();
        return true;
    case AD(SKF_AD_ALU_XOR_X):
        *a ^= x;
        return true;
    case AD(SKF_AD_VLAN_TAG):
        *a = p->tagged ? p->vlan_tci : 0;
        return true;
    case AD(SKF_AD_VLAN_TAG_PRESENT):
        *a = p->tagged != 0;
        return true;
    case AD(SKF_AD_VLAN_TPID):
        *a = p->tagged ? p->vlan_tpid : 0;
        return true;
    case AD(SKF_AD_PAY_OFFSET):
        *a = payload_of(v);
        return true;
    case AD(SKF_AD_RANDOM):
        if (getrandom(a, sizeof *a, GRND_NONBLOCK) != sizeof *a) {
            clock_gettime(CLOCK_MONOTONIC, &now);
            *a = (uint32_t)now.tv_nsec * 2654435761u;
        }
        return true;
    default: /* mark, queue and receive hash: outside of the kernel a packet has none */
        *a = 0;
        return true;
    }
}
