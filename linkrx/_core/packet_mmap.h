#pragma once
#include <stdint.h>

/* Receive at most `rows` packets of a ring. They are copied into `size` bytes at `region`, and each block goes back to the
 * kernel with its last packet; or, see lrx_ring_read_in_place(), they are described where they lie. What does not fit waits
 * in its block for the next call. Returns the number, or -errno, which the header keeps too: the socket's error, told only
 * when everything that came before it has been received; or EFBIG once a frame was cut that is longer than a block. */
int lrx_packet_mmap_fill(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region, uint32_t size);
