#pragma once
#include <stdint.h>

#include "bpf.h"

/* What the frames of one source look like, and where their classification goes. */
struct lrx_classifier {
    uintptr_t descriptors;  /* header and table that the backend filled */
    uint32_t rows;          /* rows that table was made for */
    uint32_t prefix;        /* bytes in front of every frame: packet information, virtio-net header */
    uint32_t packet_info;   /* of these, the size of struct tun_pi: 4 or 0 */
    uint32_t link_header;   /* 14 for Ethernet, 0 for none; LRX_PER_PACKET_LINK_TYPE: of link types that linkrx does not know */
    uint32_t link_type;     /* ARPHRD_*: of every packet whose backend does not tell it */
    uint32_t per_packet;    /* LRX_PER_PACKET_*, or 0 */
    uint32_t interface;     /* of every packet whose backend does not tell it; 0 where nobody knows */
    uintptr_t counters;     /* uint64_t slots, LRX_PACKETS and on */
    struct lrx_filter filter;
};

/* Write a table of `count` rows at `table` for the first `count` descriptors of `region`, leaving out
 * what is not a packet, and mark the descriptors as classified. */
void lrx_classify(const struct lrx_classifier *c, uintptr_t region, uint32_t count, uintptr_t table);

/* The end of a fill: report `count` packets, whose starts count from `frames`, that took `receives` system calls and of
 * `region` its first `end` bytes.
 * Where the descriptors name a classifier, that is one crossing with the fill, while the frames are in the cache; its
 * table goes behind `end`. Returns `count`. */
int lrx_received(uintptr_t descriptors, uintptr_t frames, uint32_t count, uint32_t receives, uintptr_t region,
                 uint32_t end);
