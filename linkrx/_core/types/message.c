/* Adds headers to a frame that is sent: packet information, the virtio-net header, and a VLAN tag. */
#include "send.h"

#include <string.h>

#define IPV4 0x0800
#define IPV6 0x86DD

/* linux/virtio_net.h: offsets in struct virtio_net_hdr, and bits. */
#define VNET_FLAGS 0
#define VNET_GSO_TYPE 1
#define VNET_HDR_LEN 2
#define VNET_CSUM_START 6
#define NEEDS_CSUM 1
#define GSO_ECN 0x80

static const uint8_t zeroes[LRX_VNET_MOST];

static void add(Message *m, const void *at, size_t length)
{
    m->pieces[m->count++] = (struct iovec){.iov_base = (void *)at, .iov_len = length};
}

static void put16(uint8_t *at, unsigned number)
{
    at[0] = (uint8_t)(number >> 8);
    at[1] = (uint8_t)number;
}

/* Copy a number of a virtio-net header from one byte order to another. Adds `more` unless the number is 0. */
static void carry(uint8_t *to, const uint8_t *from, bool big, bool as_big, unsigned more)
{
    unsigned number = big ? from[0] << 8 | from[1] : from[1] << 8 | from[0];

    if (number)
        number += more;
    put16(to, as_big ? number : (number & 0xff) << 8 | number >> 8);
}

static void carry_vnet(uint8_t *to, const Frame *f, bool as_big)
{
    const unsigned tag = f->flags & LRX_VLAN ? TAG : 0; /* the tag is inserted, so offsets after it grow */

    to[VNET_FLAGS] = f->vnet[VNET_FLAGS];
    to[VNET_GSO_TYPE] = f->vnet[VNET_GSO_TYPE];
    for (int at = VNET_HDR_LEN; at < VNET_HEADER; at += 2)
        carry(to + at, f->vnet + at, f->big_endian, as_big, at == VNET_HDR_LEN || at == VNET_CSUM_START ? tag : 0);
}

static unsigned protocol_of(const Receiver *r, const Frame *f)
{
    if (f->protocol)
        return f->protocol;
    if (r->framing.link_header)
        return f->length < ETHER_HEADER ? 0 : (unsigned)(f->bytes[12] << 8 | f->bytes[13]);
    switch (f->length ? f->bytes[0] >> 4 : 0) {
    case 4:
        return IPV4;
    case 6:
        return IPV6;
    }
    return 0;
}

int lrx_describe(const Receiver *r, Message *m, const Frame *f)
{
    const size_t vnet = r->framing.vnet, split = f->length < 2 * ETHER_ADDRESS ? f->length : 2 * ETHER_ADDRESS;
    size_t headers = 0;

    m->count = 0;
    if (r->classifier.packet_info) {
        const unsigned protocol = protocol_of(r, f);

        if (!protocol && !r->framing.link_header)
            return NO_PROTOCOL;
        memset(m->headers, 0, PACKET_INFO);
        put16(m->headers + 2, protocol);
        headers = PACKET_INFO;
    }
    if (vnet) {
        memset(m->headers + headers, 0, VNET_HEADER);
        if (f->vnet)
            carry_vnet(m->headers + headers, f, r->framing.big_endian);
        else if (f->flags & LRX_CHECKSUM_UNFINISHED)
            return UNFINISHED;
        headers += VNET_HEADER;
    } else {
        if (f->vnet && f->vnet[VNET_GSO_TYPE] & ~GSO_ECN)
            return SUPER_PACKET;
        if (f->flags & LRX_CHECKSUM_UNFINISHED || (f->vnet && f->vnet[VNET_FLAGS] & NEEDS_CSUM))
            return UNFINISHED;
    }
    if (headers)
        add(m, m->headers, headers);
    if (vnet > VNET_HEADER)
        add(m, zeroes, vnet - VNET_HEADER);
    if (!(f->flags & LRX_VLAN)) {
        add(m, f->bytes, f->length);
        return 0;
    }
    put16(m->tag, f->vlan_tpid);
    put16(m->tag + 2, f->vlan_tci);
    add(m, f->bytes, split);
    add(m, m->tag, TAG);
    add(m, f->bytes + split, f->length - split);
    return 0;
}
