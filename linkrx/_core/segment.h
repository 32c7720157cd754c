#pragma once
#include <stdint.h>

#include "mechanism.h"

/* Super-packets become the frames that the kernel would have made of them, and unfinished checksums are finished. */
struct lrx_segmenter {
    uintptr_t taken;       /* descriptors that a backend filled */
    uint32_t taken_rows;
    uint32_t packet_info;  /* bytes of struct tun_pi in front of every frame: 4 or 0 */
    uint32_t vnet;         /* bytes of the virtio-net header behind it: 10 at the least */
    uint32_t swapped;      /* its numbers are in the other byte order than this machine's */
    uint32_t link_header;  /* 14 for Ethernet, 0 for none; as in struct lrx_classifier */
    uint32_t link_type;    /* as there */
    uint32_t per_packet;
    uintptr_t given;       /* descriptors of what comes out */
    uint32_t given_rows;
    uint32_t next;         /* the row of `taken` that comes next */
    uint32_t done;         /* segments of it that are out already */
    struct lrx_mechanism *mechanism; /* a backend, or NULL */
    uint32_t staged;       /* bytes that it may fill */
    uint32_t spare;        /* bytes that there must be room for if it is asked again: what becomes of it is likely less */
};

/* Write what `taken` describes in `staging` as frames into `size` bytes at `region`, and describe them in `given`, until
 * one of the three is used up; the next call goes on in between. With a `fill`, receive more for as long as there is room
 * to spare. Each frame has its prefix in front, with a virtio-net
 * header that asks for nothing any more. What cannot be split is described with LRX_MALFORMED. Returns how many frames
 * were described. The errno in the header of `taken` moves on with the last of its packets. */
int lrx_segment(struct lrx_segmenter *s, uintptr_t staging, uintptr_t region, uint32_t size);
