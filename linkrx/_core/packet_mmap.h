#pragma once
#include <stdint.h>

/* Receive at most `rows` packets of a ring. Copies them into `size` bytes at `region`, and releases each block after its last packet.
 * After lrx_ring_read_in_place() it describes them in place instead. Packets that do not fit stay in their block for the next
 * call. Returns the number of packets, or -errno; the report has the errno too. It is the socket's error, after all packets that
 * came before it, or EFBIG after a frame that is longer than a block was cut. */
int lrx_packet_mmap_fill(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region, uint32_t size);
