#pragma once
#include <stdint.h>

/* The kernel writes packets into the arena. Each packet has a near place of at most 2,048 bytes, and a far place for the rest of a
 * longer one. The near places are adjacent, so that ordinary packets use few pages and stay in the cache. Far places are rarely
 * written, and memory that is not written is not allocated. The beginning of a packet that reaches its far place is copied to
 * the bytes in front of that place. */
struct lrx_recvmmsg;

#define LRX_MESSAGES_MAX 1024

/* Make the state for `messages` packets of up to `capacity` bytes per system call. `metadata`: receive struct sockaddr_ll and control
 * messages of AF_PACKET. `sender`: report the protocol, link type and link address that it has. NULL with errno if there is no
 * memory. */
struct lrx_recvmmsg *lrx_recvmmsg_open(int fd, uint32_t messages, uint32_t capacity, int metadata, int sender);
void lrx_recvmmsg_close(struct lrx_recvmmsg *s);

/* Bytes of the arena for each packet: both places. */
uint64_t lrx_recvmmsg_stride(uint32_t capacity);

/* Receive at most `rows` packets into `size` bytes at `region`, with system calls until the queue is empty. `size` is at least one
 * stride. Returns the number of packets, or -errno if there are none. The report has the errno, also one that followed packets. */
int lrx_recvmmsg_fill(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region,
                      uint32_t size);
