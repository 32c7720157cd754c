#pragma once
#include <stdint.h>

/* The call that receives one packet without waiting. */
#define LRX_READ 0    /* preadv2(RWF_NOWAIT) first, then read() or readv() if O_NONBLOCK is set */
#define LRX_RECV 1    /* sockets: recvmsg(MSG_DONTWAIT | MSG_TRUNC), which returns the length before cutting */
#define LRX_RECVMSG 3 /* AF_PACKET sockets: the same, with the metadata of the packet */
#define LRX_POLL 2    /* drivers without RWF_NOWAIT: poll() before read() */

#define LRX_SIZES_MAX 64

struct lrx_readv {
    int fd;
    int method;
    uint32_t capacity;      /* bytes of one packet that are kept, prefix included */
    uint32_t sizes_count;   /* the number of the caller's buffers, whose sizes add up to `capacity`; 0: one buffer */
    uint32_t sizes[LRX_SIZES_MAX];
};

/* Receive packets into `size` bytes at `region` until the queue is empty, `rows` descriptors are full, or another packet might not
 * fit. `state` is a struct lrx_readv; its method changes to LRX_POLL if the driver does not support RWF_NOWAIT. Returns the number
 * of packets, or -errno if there are none. The report has the errno, also one that followed packets. */
int lrx_readv_fill(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region, uint32_t size);
