#pragma once
#include <stdint.h>

#include "mechanism.h"

/* Splits super-packets into the frames that the kernel would make of them, and finishes unfinished checksums. */
struct lrx_segmenter {
    uintptr_t taken;       /* the descriptors that a backend filled */
    uint32_t taken_rows;
    uint32_t packet_info;  /* bytes of struct tun_pi in front of every frame: 4 or 0 */
    uint32_t vnet;         /* bytes of the virtio-net header after it: at least 10 */
    uint32_t swapped;      /* the virtio-net header is not in host byte order */
    uint32_t link_header;  /* as in struct lrx_classifier */
    uint32_t link_type;
    uint32_t per_packet;
    uintptr_t given;       /* the descriptors of the resulting frames */
    uint32_t given_rows;
    uint32_t next;         /* the next row of `taken` */
    uint32_t done;         /* segments of that row that were written */
    struct lrx_mechanism *mechanism; /* a backend, or NULL */
    uint32_t staged;       /* bytes that the backend may fill */
    uint32_t spare;        /* free bytes that another fill needs; the frames of most fills take fewer */
};

/* Write the packets of `taken`, which lie in `staging`, as frames into `size` bytes at `region`, and describe them in `given`.
 * Stops when the packets, the bytes or the rows of `given` are used up; the next call goes on there. With a mechanism, receive
 * more while there is room. The virtio-net header of each frame is zeroed, because nothing is left to do. A packet that cannot be
 * split is described with LRX_MALFORMED. The errno of `taken` moves to `given` after the last packet. Returns the number of
 * frames. */
int lrx_segment(struct lrx_segmenter *s, uintptr_t staging, uintptr_t region, uint32_t size);
