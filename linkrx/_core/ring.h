#pragma once
#include <stdint.h>

#include "mechanism.h"

/* A TPACKET_V3 ring: put on a socket, counted, and taken off. */
struct lrx_ring;

/* Beside LRX_TIMESTAMP and LRX_OUTGOING: protocol, link type and link address of each packet. */
#define LRX_WANT_SENDER 0x100

/* Put a ring of `blocks` blocks of `block_size` bytes on an AF_PACKET socket; the kernel hands a block over
 * when it is full, or when `retire_ms` milliseconds are up and something is in it. `vnet` is the size of the
 * virtio-net header that the socket puts in front of frames, `capacity` what is kept of a packet, that header
 * included, and `wanted` the LRX_TIMESTAMP, LRX_OUTGOING and LRX_WANT_SENDER that are asked for. NULL and errno, and the socket as it
 * was, when the kernel refuses. */
struct lrx_ring *lrx_ring_open(int fd, uint32_t block_size, uint32_t blocks, uint32_t retire_ms, uint32_t vnet,
                               uint32_t capacity, uint32_t wanted);

/* Leave the kernel no room in a ring that is new, and give it room: what is not yet a member of a fanout group drops what the
 * group receives too. In between, drops up to now can be forgotten. */
void lrx_ring_shut(struct lrx_ring *s);
void lrx_ring_forget_drops(struct lrx_ring *s);
void lrx_ring_start(struct lrx_ring *s);

/* Take the ring off the socket, which gets back the PACKET_VERSION it had. `unmap` is 0 where somebody still reads there:
 * the mapping stays, and the socket keeps the ring. */
void lrx_ring_close(struct lrx_ring *s, int unmap);

/* In a forked child: the ring is the parent's. */
void lrx_ring_abandon(struct lrx_ring *s);

/* Packets in the block that was begun and not yet given back. */
uint32_t lrx_ring_held(const struct lrx_ring *s);

/* Since the ring was made: packets that found no room in it, and how often it was found full; -1 where that cannot be told. */
uint64_t lrx_ring_drops(struct lrx_ring *s);
int64_t lrx_ring_freezes(struct lrx_ring *s);

/* From the next fill on packets are described where they lie, `most` blocks at a time: what lrx_mechanism needs for that, or
 * NULL where the kernel writes no virtio-net header of that size, and all is copied as before. */
struct lrx_slots *lrx_ring_read_in_place(struct lrx_ring *s, uint32_t most);

/* Where it is mapped. */
uintptr_t lrx_ring_memory(const struct lrx_ring *s);

/* Bytes of the ring. */
uint64_t lrx_ring_size(const struct lrx_ring *s);

/* Nobody reads there any more: the blocks of the slot go back to the kernel. `state` is the ring. */
void lrx_ring_release(void *state, uint32_t slot);
