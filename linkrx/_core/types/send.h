/* What is sent: a frame, and the same as the kernel takes it. */
#pragma once
#include "types.h"

#include <sys/uio.h>

#define PACKET_INFO 4 /* linux/if_tun.h struct tun_pi: flags, EtherType */
#define TAG 4

/* Why a frame is not given to the kernel. */
enum unsendable { UNFINISHED = -1, SUPER_PACKET = -2, NO_PROTOCOL = -3 };

/* A frame, and what is known of it. */
typedef struct {
    const uint8_t *bytes;
    size_t length;
    const uint8_t *vnet; /* NULL: none */
    bool big_endian;     /* its numbers */
    uint16_t protocol, flags, vlan_tci, vlan_tpid;
} Frame;

/* The same as the kernel takes it. */
typedef struct {
    struct iovec pieces[5]; /* headers, the rest of a long one, addresses, a VLAN tag, what follows */
    unsigned count;
    uint8_t headers[PACKET_INFO + VNET_HEADER];
    uint8_t tag[TAG];
} Message;

/* message.c: 0, or why it cannot be sent as it is. */
int lrx_describe(const Receiver *r, Message *m, const Frame *f);
