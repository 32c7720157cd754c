/* What the kernel allows: the barest loops in C that do the same receive. */
#define _GNU_SOURCE
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/if_packet.h>
#include <unistd.h>

#define ROOM 65600
#define MESSAGES 64
#define SLOT 2048

/* read() one packet behind the other into `size` bytes until nothing is left. Returns the packets; the sum of
 * their lengths and of their first bytes proves that they were there. */
long drain_read(int fd, uint8_t *memory, long size, uint64_t *bytes)
{
    long packets = 0, cursor = 0;

    for (;;) {
        if (cursor + ROOM > size)
            cursor = 0;
        ssize_t got = read(fd, memory + cursor, ROOM);
        if (got < 0)
            return packets;
        *bytes += (uint64_t)got;
        cursor += (got + 7) & ~7;
        packets++;
    }
}

/* recvmmsg() batches of 64 into fixed slots; with metadata as linkrx asks for it on a packet socket. */
long drain_recvmmsg(int fd, uint8_t *memory, int metadata, uint64_t *bytes)
{
    static struct mmsghdr headers[MESSAGES];
    static struct iovec iovecs[MESSAGES];
    static struct sockaddr_ll names[MESSAGES];
    static uint8_t controls[MESSAGES][128];
    long packets = 0;

    memset(headers, 0, sizeof headers);
    for (int k = 0; k < MESSAGES; k++) {
        iovecs[k].iov_base = memory + (long)k * SLOT;
        iovecs[k].iov_len = SLOT;
        headers[k].msg_hdr.msg_iov = &iovecs[k];
        headers[k].msg_hdr.msg_iovlen = 1;
        if (metadata) {
            headers[k].msg_hdr.msg_name = &names[k];
            headers[k].msg_hdr.msg_control = controls[k];
        }
    }
    for (;;) {
        for (int k = 0; metadata && k < MESSAGES; k++) {
            headers[k].msg_hdr.msg_namelen = sizeof names[k];
            headers[k].msg_hdr.msg_controllen = sizeof controls[k];
        }
        int got = recvmmsg(fd, headers, MESSAGES, MSG_DONTWAIT | MSG_TRUNC, NULL);
        if (got < 0)
            return packets;
        for (int k = 0; k < got; k++)
            *bytes += headers[k].msg_len;
        packets += got;
        if (got < MESSAGES)
            return packets;
    }
}
