#pragma once
#include <stdint.h>

#include "mechanism.h"

/* A TPACKET_V3 ring: made, counted, and removed. */
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

/* Leave the kernel no room in a new ring, and give it room. A socket that is not yet a member of a fanout group drops the packets
 * that the group receives. In between, the drops up to now can be forgotten. */
void lrx_ring_shut(struct lrx_ring *s);
void lrx_ring_forget_drops(struct lrx_ring *s);
void lrx_ring_start(struct lrx_ring *s);

/* Remove the ring, and restore the PACKET_VERSION of the socket. With an `unmap` of 0, because packets still refer to it, the
 * mapping stays and the socket keeps the ring. */
void lrx_ring_close(struct lrx_ring *s, int unmap);

/* In a forked child, where the ring belongs to the parent. */
void lrx_ring_abandon(struct lrx_ring *s);

/* Packets that are not read yet of the block that is partly read. */
uint32_t lrx_ring_held(const struct lrx_ring *s);

/* Since the ring was made: packets without room in it, and how often it was full; -1 if that is not known. */
uint64_t lrx_ring_drops(struct lrx_ring *s);
int64_t lrx_ring_freezes(struct lrx_ring *s);

/* Describe packets in place from the next fill on, `most` blocks at a time. Returns the slots for lrx_mechanism, or NULL if the
 * kernel writes no virtio-net header of that size: packets are copied then. */
struct lrx_slots *lrx_ring_read_in_place(struct lrx_ring *s, uint32_t most);

/* The address of the mapping. */
uintptr_t lrx_ring_memory(const struct lrx_ring *s);

/* The size of the ring in bytes. */
uint64_t lrx_ring_size(const struct lrx_ring *s);

/* Release the blocks of a slot, which must not be read any more. `state` is the ring. */
void lrx_ring_release(void *state, uint32_t slot);
