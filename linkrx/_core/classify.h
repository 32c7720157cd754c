#pragma once
#include <stdint.h>

#include "bpf.h"

/* The format of a source's frames, and the counters. */
struct lrx_classifier {
    uintptr_t descriptors;  /* the report and table that the backend filled */
    uint32_t rows;          /* the size of that table */
    uint32_t prefix;        /* bytes in front of every frame: packet information, virtio-net header */
    uint32_t packet_info;   /* bytes of struct tun_pi in the prefix: 4 or 0 */
    uint32_t link_header;   /* 14 for Ethernet, 0 for none; with LRX_PER_PACKET_LINK_TYPE, for unknown link types */
    uint32_t link_type;     /* ARPHRD_*, for packets whose link type the backend does not report */
    uint32_t per_packet;    /* LRX_PER_PACKET_*, or 0 */
    uint32_t interface;     /* for packets whose interface the backend does not report; 0: unknown */
    uintptr_t counters;     /* uint64_t[LRX_COUNTERS] */
    struct lrx_filter filter;
};

/* Classify the first `count` descriptors of `region`. Writes the rows of packets into a table of `count` rows at `table`, counts the
 * other frames, and marks the descriptors as classified. */
void lrx_classify(const struct lrx_classifier *c, uintptr_t region, uint32_t count, uintptr_t table);

/* End a fill: report `count` packets, which took `receives` system calls and use the first `end` bytes of the fill's region. Their
 * starts count from `frames`. If the report has a classifier, classify them now, while the frames are in the cache. Returns `count`. */
int lrx_received(uintptr_t descriptors, uintptr_t frames, uint32_t count, uint32_t receives, uint32_t end);
