#pragma once
#include <stdint.h>

#include "mechanism.h"

/* A TPACKET_V3 ring: made, counted, and removed. */
struct lrx_ring;

/* With LRX_TIMESTAMP and LRX_OUTGOING a value of `wanted`: protocol, link type and link address of each packet. */
#define LRX_WANT_SENDER 0x100

/* The state of a ring that is not open yet; NULL if there is no memory. */
struct lrx_ring *lrx_ring_new(void);
/* Free the state. It does not close the ring, which in a forked child belongs to the parent. */
void lrx_ring_free(struct lrx_ring *s);

/* Put a ring of `blocks` blocks of `block_size` bytes on an AF_PACKET socket. The kernel closes a block when it is full, or after
 * `retire_ms` milliseconds if it is not empty. `vnet` is the size of the virtio-net header in front of frames. `capacity` is the
 * number of bytes that are kept of a packet, with that header. `wanted` has LRX_TIMESTAMP, LRX_OUTGOING and LRX_WANT_SENDER for
 * wanted columns. -1 with errno if the kernel refuses; then the socket has not changed. */
int lrx_ring_open(struct lrx_ring *s, int fd, uint32_t block_size, uint32_t blocks, uint32_t retire_ms, uint32_t vnet,
                  uint32_t capacity, uint32_t wanted);

/* Close a new ring to the kernel, and open it again. In between, the socket drops all packets, and the drops of the time before it
 * joined its fanout group can be subtracted. */
void lrx_ring_shut(struct lrx_ring *s);
void lrx_ring_forget_drops(struct lrx_ring *s);
void lrx_ring_start(struct lrx_ring *s);

/* Remove the ring, and restore the PACKET_VERSION of the socket. With an `unmap` of 0, because packets still refer to it, the
 * mapping stays and the socket keeps the ring. Afterwards only counters may be asked for. Does nothing if it is not open. */
void lrx_ring_close(struct lrx_ring *s, int unmap);

/* Packets of the current block that are not read yet. */
uint32_t lrx_ring_held(const struct lrx_ring *s);

/* Packets dropped since the ring was made, because it was full, and how often it became full; -1 if unknown. */
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
