#pragma once

#include <stdint.h>

/* What Python and C share. Tests hold linkrx/memory/report.py, linkrx/packets/headers.py and linkrx/memory/counters.py to it. */

struct lrx_classifier;

/* What a fill reports, in front of the table of its packets. */
struct lrx_report {
    uint32_t count;      /* packets that the backend received and nobody classified yet */
    uint32_t receives;   /* system calls that took */
    uint32_t end;        /* bytes that they use of the region */
    uint32_t error;      /* an errno that follows these packets */
    uint32_t classified; /* one more than the packets that classification left; 0 before it */
    uint32_t rows;       /* rows of the table it wrote */
    uint32_t held;       /* packets that the backend has received and keeps for the next fill */
    uint32_t most;       /* how many packets the next fill may receive; 0: as many as there are rows */
    const struct lrx_classifier *classifier; /* or NULL: classify what is received with it */
    void (*release_gil)(void *);             /* or NULL: for lrx_release_gil() */
    void *release_gil_argument;
};

#define LRX_ROW_BYTES 48  /* of the table behind the header: one element of each column */

/* Bits of a packet's flags. */
#define LRX_TRUNCATED 1
#define LRX_OUTGOING 2
#define LRX_VLAN 4
#define LRX_TIMESTAMP 8
#define LRX_CHECKSUM_UNFINISHED 16
/* Between splitter and classifier only: no frame, and nothing of it may be read. No packet has it. */
#define LRX_MALFORMED 0x8000

/* What the kernel tells about each packet of a source that differs from packet to packet: protocol, link type, link address.
 * 0: nothing, all packets are alike. The frames of some such sources have no link header; of others the link type tells. */
#define LRX_PER_PACKET_NO_HEADER 1
#define LRX_PER_PACKET_LINK_TYPE 2
/* In a backend's column of link headers: there is none, whatever the link type says. */
#define LRX_NO_LINK_HEADER 255

/* In the column of file types: the link type that the capture file has for the packet, LINKTYPE_*, which has 16 bits. 0: not of a file. */
#define LRX_OF_FILE 0x10000
#define LRX_FILE_SWAPPED 0x20000 /* and the file is of the other byte order than this host's */
#define LRX_FILE_LINK_TYPE 0xFFFF

/* Slots of the counters that classification adds to. */
#define LRX_PACKETS 0
#define LRX_BYTES 1
#define LRX_RUNTS 2
#define LRX_EMPTY 3
#define LRX_UNKNOWN_PROTOCOL 4
#define LRX_CUT 5
#define LRX_COUNT_MALFORMED 6
#define LRX_FILTERED 7
#define LRX_COUNTERS 8
