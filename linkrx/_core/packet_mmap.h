#pragma once
#include <stdint.h>

/* Copy at most `rows` packets of a ring into `size` bytes at `region`, and give each block back to the kernel with its
 * last packet. What does not fit stays in its block for the next call. Returns the number, or -errno, which the header
 * keeps too: the socket's error, told only when everything that came before it has been received. */
int lrx_packet_mmap_fill(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region, uint32_t size);
