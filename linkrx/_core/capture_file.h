#pragma once
#include <stdint.h>

/* Parses the records of a capture file, pcap or pcapng, piece by piece. */

#define LRX_CAPTURE_PIECE 262144     /* bytes that are read at once */
#define LRX_CAPTURE_LONGEST 262144   /* bytes of a packet: MAXIMUM_SNAPLEN of libpcap */
#define LRX_CAPTURE_WHOLE 327680     /* the longest record that is kept whole; of a longer one the bytes after the packet are skipped */
#define LRX_CAPTURE_BLOCK 16777216   /* bytes of a pcapng block: libpcap's initial MAX_BLOCKSIZE */
#define LRX_CAPTURE_INTERFACES 262144 /* interfaces of a file */
#define LRX_CAPTURE_NAME 64

/* Values of lrx_capture.damage. `value` has the number that is wrong. */
#define LRX_CAPTURE_MAGIC 1        /* the magic number of no known format */
#define LRX_CAPTURE_VERSION 2      /* an unknown version of the format */
#define LRX_CAPTURE_LENGTH 3       /* a packet is longer than its record, or than LRX_CAPTURE_LONGEST */
#define LRX_CAPTURE_BLOCK_LENGTH 4 /* a block is too short for its type, too long, or no multiple of 4 */
#define LRX_CAPTURE_TRAILER 5      /* the lengths at the beginning and the end of a block differ */
#define LRX_CAPTURE_BYTE_ORDER 6   /* the byte-order magic of a section is wrong */
#define LRX_CAPTURE_INTERFACE 7    /* a packet of an interface that no block describes */
#define LRX_CAPTURE_OPTION 8       /* an option of an interface is longer than its block */
#define LRX_CAPTURE_TOO_MANY 9     /* too many interfaces */
#define LRX_CAPTURE_CUT 10         /* the file ends within a record, after `value` bytes of it */
#define LRX_CAPTURE_LINK_TYPE 11   /* a link type of more than 16 bits */

/* An interface of a file. A pcap file has one, without a name. */
struct lrx_capture_interface {
    uint32_t link_type;    /* LINKTYPE_* */
    uint32_t file_type;    /* the file type of its packets: report.h */
    uint32_t snaplen;      /* 0: no limit */
    uint32_t multiply;     /* nanoseconds per unit of time; 0: `shift` or `divide` applies */
    uint32_t shift;        /* not 0: a unit is 2^-shift seconds */
    uint64_t divide;       /* units per nanosecond */
    int64_t offset;        /* seconds to add */
    uint32_t met;          /* the backend knows this interface. Before that, its packets are not parsed */
    char name[LRX_CAPTURE_NAME];
};

struct lrx_capture {
    uint64_t offset;     /* of the next record in the file */
    uint64_t skip;       /* bytes to skip from there */
    uint32_t pcapng;     /* 1: pcapng; 0: pcap */
    uint32_t begun;      /* the format is known */
    uint32_t swapped;    /* the file is not in host byte order */
    uint32_t header;     /* pcap: bytes of a record header */
    uint32_t lengths;    /* pcap: 1 if captured and original length are swapped, 2 if they may be */
    uint32_t first;      /* pcapng: the number of interfaces of earlier sections */
    uint32_t count;      /* the number of interfaces of this section, which follow those */
    struct lrx_capture_interface *interfaces; /* LRX_CAPTURE_INTERFACES */
    uint32_t needed;     /* bytes of the next record that must be in memory to parse it */
    uint32_t piece;      /* the number of the last parsed piece */
    uint32_t pieces;     /* pieces that were parsed since packets were reported */
    uint32_t more;       /* the data read so far has more records, so the next fill needs no readable file */
    uint32_t asked;      /* 1 + the number of an interface whose first packet comes next; 0: none */
    uint32_t damage;     /* LRX_CAPTURE_*: the damage at `offset` */
    uint64_t value;
    /* The data that was read and not parsed yet. */
    uint8_t *rest;
    uint32_t rest_at, rest_end;
};

/* NULL if there is no memory. */
struct lrx_capture *lrx_capture_open(void);
void lrx_capture_free(struct lrx_capture *c);

/* Parse the rest of the data that was read before. Returns the number of packets. */
int lrx_capture_again(struct lrx_capture *c, uintptr_t descriptors, uint32_t rows, uintptr_t region);

/* Parse the rest, and `size` new bytes. They lie in the region after a gap of `rest_end - rest_at` bytes, into which the rest is
 * copied. Data that is no whole record, or has no row, becomes the rest. Returns the number of packets.
 * `piece` is a different number for each piece, and not 0. A piece that was parsed is not parsed again, so a caller that was
 * interrupted after this call can repeat it. */
int lrx_capture_walk(struct lrx_capture *c, uintptr_t descriptors, uint32_t rows, uintptr_t region, uint32_t size,
                     uint32_t piece);

/* Handle the end of the file. Returns 1 if it is between two records, else 0, with the reason in `damage`. */
int lrx_capture_end(struct lrx_capture *c);
