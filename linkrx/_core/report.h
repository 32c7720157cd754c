#pragma once

#include <stdint.h>

/* What Python and C share. Tests hold linkrx/memory/report.py, linkrx/packets/headers.py and linkrx/memory/counters.py to it. */

struct lrx_classifier;

/* The report of a fill. The table of its frames follows. */
struct lrx_report {
    uint32_t count;      /* packets that were received and not classified yet */
    uint32_t receives;   /* system calls that received */
    uint32_t end;        /* bytes of the region that the packets use */
    uint32_t error;      /* an errno that follows these packets */
    uint32_t classified; /* 1 + the number of packets after classification; 0 before it */
    uint32_t rows;       /* rows of the table that classification wrote */
    uint32_t held;       /* packets that the backend has received and keeps for the next fill */
    uint32_t most;       /* how many packets the next fill may receive; 0: as many as there are rows */
    uint32_t held_back;  /* frames of earlier fills that are to be in the same batch; they take that many of its rows */
    uint32_t unused;
    const struct lrx_classifier *classifier; /* lrx_received() classifies with it; or NULL */
    uintptr_t table;     /* the address of the memory for the table that classification writes */
    void (*release_gil)(void *);             /* lrx_release_gil() calls it; or NULL */
    void *release_gil_argument;
};

#define LRX_ROW_BYTES 48  /* bytes of one row of the table: one element of each column */

/* Bits of a packet's flags. */
#define LRX_TRUNCATED 1
#define LRX_OUTGOING 2
#define LRX_VLAN 4
#define LRX_TIMESTAMP 8
#define LRX_CHECKSUM_UNFINISHED 16
/* Only between segmentation and classification: the row has no valid frame. Packets never have this flag. */
#define LRX_MALFORMED 0x8000

/* Whether protocol, link type and link address differ from packet to packet; 0: they do not. With NO_HEADER, frames have no link
 * header. With LINK_TYPE, the link type says which link header a frame has. */
#define LRX_PER_PACKET_NO_HEADER 1
#define LRX_PER_PACKET_LINK_TYPE 2
/* In a backend's column of link headers: the frame has none, whatever its link type is. */
#define LRX_NO_LINK_HEADER 255

/* File types: LRX_OF_FILE, and the packet's LINKTYPE_* number in the capture file, which has 16 bits. 0: not from a file. */
#define LRX_OF_FILE 0x10000
#define LRX_FILE_SWAPPED 0x20000 /* the file is not in host byte order */
#define LRX_FILE_LINK_TYPE 0xFFFF

/* Slots of the counters that classification increments. */
#define LRX_PACKETS 0
#define LRX_BYTES 1
#define LRX_RUNTS 2
#define LRX_EMPTY 3
#define LRX_UNKNOWN_PROTOCOL 4
#define LRX_CUT 5
#define LRX_COUNT_MALFORMED 6
#define LRX_FILTERED 7
#define LRX_COUNTERS 8
