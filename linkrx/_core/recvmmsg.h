#pragma once
#include <stdint.h>

/* Packets land in the arena itself. Each has a near place of at most 2,048 bytes, and a far one for what is longer. The
 * near places lie side by side, so that a receive of ordinary packets finds them in the cache and its pages in the TLB. The far
 * ones are hardly ever written, and what is not written takes no memory. A packet that reaches its far place gets its start
 * copied to the room in front of it. */
struct lrx_recvmmsg;

#define LRX_MESSAGES_MAX 1024

/* For `messages` packets of up to `capacity` bytes by one system call. `metadata` asks for struct sockaddr_ll and control
 * messages, as AF_PACKET sends them. NULL and errno when memory is short. */
struct lrx_recvmmsg *lrx_recvmmsg_open(int fd, uint32_t messages, uint32_t capacity, int metadata);
void lrx_recvmmsg_close(struct lrx_recvmmsg *s);

/* Bytes of the arena that each packet takes, both places together. */
uint64_t lrx_recvmmsg_stride(uint32_t capacity);

/* Receive at most `rows` packets, with as many system calls as it takes until the queue is empty, into `size` bytes at
 * `region`, which are a stride at least. Returns how many, or -errno where there is none; the report keeps the errno, also
 * one that came behind packets. */
int lrx_recvmmsg_fill(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region,
                      uint32_t size);
