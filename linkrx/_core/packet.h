#pragma once

/* Numbers that Python and C share. A test holds linkrx/packets/headers.py, memory/columns.py and memory/counters.py to them. */

/* Words of the header in front of a backend's descriptors; behind them the address of a struct lrx_classifier, or 0. */
#define LRX_COUNT 0       /* packets that the backend received and nobody classified yet */
#define LRX_RECEIVES 1    /* system calls that took */
#define LRX_END 2         /* bytes that they use of the region */
#define LRX_ERROR 3       /* an errno that follows these packets */
#define LRX_CLASSIFIED 4  /* one more than the packets that classification left; 0 before it */
#define LRX_ROWS 5        /* rows of the table it wrote */
#define LRX_HELD 6        /* packets that the backend has received and keeps for the next fill */
#define LRX_MOST 7        /* how many packets the next fill may receive; 0: as many as there are rows */
#define LRX_CLASSIFIER_AT 32
#define LRX_MANY_AT 40      /* void (*)(void *) and its argument, or NULL: see lrx_tell_many() */
#define LRX_HEADER_BYTES 56
#define LRX_ROW_BYTES 32  /* of the table behind the header: one element of each column */

/* Bits of a packet's flags. */
#define LRX_TRUNCATED 1
#define LRX_OUTGOING 2
#define LRX_VLAN 4
#define LRX_TIMESTAMP 8
#define LRX_CHECKSUM_UNFINISHED 16
/* Between splitter and classifier only: no frame, and nothing of it may be read. No packet has it. */
#define LRX_MALFORMED 0x8000

/* Slots of the counters that classification adds to. */
#define LRX_PACKETS 0
#define LRX_BYTES 1
#define LRX_RUNTS 2
#define LRX_EMPTY 3
#define LRX_UNKNOWN_PROTOCOL 4
#define LRX_CUT 5
#define LRX_COUNT_MALFORMED 6
