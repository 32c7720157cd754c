#pragma once
#include <stdint.h>

/* The call that receives one packet without waiting. */
#define LRX_READ 0    /* preadv2(RWF_NOWAIT), and read() or readv() behind it while O_NONBLOCK is set */
#define LRX_RECV 1    /* a socket: recvmsg(MSG_DONTWAIT | MSG_TRUNC), which tells the true length */
#define LRX_RECVMSG 3 /* an AF_PACKET socket: the same, with all that the kernel tells about the packet */
#define LRX_POLL 2    /* a driver that knows no RWF_NOWAIT: poll() before read() */

#define LRX_SIZES_MAX 64

struct lrx_readv {
    int fd;
    int method;
    uint32_t capacity;      /* bytes of one packet that are kept, prefix included */
    uint32_t sizes_count;   /* entries of an iovec ladder, 0 for one buffer; they sum to capacity */
    uint32_t sizes[LRX_SIZES_MAX];
};

/* Receive packets into `size` bytes at `region` until the queue is empty, `rows` descriptors are full or no further packet
 * is sure to fit. `state` is a struct lrx_readv, whose method is another where the driver knows no RWF_NOWAIT. Returns
 * their number, or -errno when there is none. The header keeps the errno, also one that came behind received packets. */
int lrx_readv_fill(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region, uint32_t size);
