#pragma once
#include <stdint.h>

/* Receive slots of its own: packets land here and move into the arena, so that what is kept of a batch
 * costs its length and not a slot. */
struct lrx_recvmmsg;

#define LRX_MESSAGES_MAX 1024

/* Slots for `messages` packets of up to `capacity` bytes, the first `slot` of them in dense memory and
 * the rest in memory that is touched only by packets that need it. `metadata` asks for struct sockaddr_ll
 * and control messages, as AF_PACKET sends them. NULL and errno when memory is short. */
struct lrx_recvmmsg *lrx_recvmmsg_open(int fd, uint32_t messages, uint32_t slot, uint32_t capacity,
                                       int metadata);
void lrx_recvmmsg_close(struct lrx_recvmmsg *s);

/* Receive at most `rows` packets, with as many system calls as it takes until the queue is empty, and move them into
 * `size` bytes at `region`. Packets that do not fit stay in their slots for the next call. Returns the number moved, or
 * -errno where there is none; the header keeps the errno, also one that came behind packets. */
int lrx_recvmmsg_fill(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region,
                      uint32_t size);

/* Packets that were received and wait in their slots. */
uint32_t lrx_recvmmsg_waiting(const struct lrx_recvmmsg *s);
