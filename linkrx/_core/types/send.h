/* Frames to send, and the messages made of them. */
#pragma once
#include "types.h"

#include <sys/uio.h>

#define PACKET_INFO 4 /* linux/if_tun.h struct tun_pi: flags, EtherType */
#define TAG 4

/* Reasons why linkrx refuses to send a frame. */
enum unsendable { UNFINISHED = -1, SUPER_PACKET = -2, NO_PROTOCOL = -3 };

/* A frame and its metadata. */
typedef struct {
    const uint8_t *bytes;
    size_t length;
    const uint8_t *vnet; /* the virtio-net header, or NULL */
    bool big_endian;     /* the byte order of that header */
    uint16_t protocol, flags, vlan_tci, vlan_tpid;
} Frame;

/* A frame with the headers that the kernel expects, in pieces. */
typedef struct {
    struct iovec pieces[5]; /* headers, the rest of a long virtio-net header, addresses, VLAN tag, the rest of the frame */
    unsigned count;
    uint8_t headers[PACKET_INFO + VNET_HEADER];
    uint8_t tag[TAG];
} Message;

/* message.c: describe a frame as a message. Returns 0, or the reason why it cannot be sent. */
int lrx_describe(const Receiver *r, Message *m, const Frame *f);
