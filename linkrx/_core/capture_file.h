#pragma once
#include <stdint.h>

/* A walk over the records of a capture file, pcap or pcapng, that goes on from one piece of the file to the next. */

#define LRX_CAPTURE_PIECE 262144     /* bytes that are read at once */
#define LRX_CAPTURE_LONGEST 262144   /* of a packet: MAXIMUM_SNAPLEN of libpcap */
#define LRX_CAPTURE_WHOLE 327680     /* of a record that lies in memory whole; of a longer one what stands behind the packet is passed over */
#define LRX_CAPTURE_BLOCK 16777216   /* of a pcapng block: MAX_BLOCKSIZE of libpcap's reader at its start */
#define LRX_CAPTURE_INTERFACES 262144 /* of a file */
#define LRX_CAPTURE_NAME 64

/* What is wrong with a file, in lrx_capture.damage; `value` is the number that cannot be. */
#define LRX_CAPTURE_MAGIC 1        /* no capture file */
#define LRX_CAPTURE_VERSION 2      /* of the format: not known */
#define LRX_CAPTURE_LENGTH 3       /* of a packet: longer than any */
#define LRX_CAPTURE_BLOCK_LENGTH 4 /* of a block: too short for its kind, too long, or no multiple of 4 */
#define LRX_CAPTURE_TRAILER 5      /* the length behind a block is not the one in front of it */
#define LRX_CAPTURE_BYTE_ORDER 6   /* of a section: no byte-order magic */
#define LRX_CAPTURE_INTERFACE 7    /* of a packet: there is none of that number */
#define LRX_CAPTURE_OPTION 8       /* of an interface: longer than its block */
#define LRX_CAPTURE_TOO_MANY 9     /* interfaces */
#define LRX_CAPTURE_MEMORY 10      /* for another interface: there is none */
#define LRX_CAPTURE_CUT 11         /* the file ends within a record of so many bytes */
#define LRX_CAPTURE_LINK_TYPE 12   /* more than the 16 bits that there are for it */

/* An interface of a file. The only one of a pcap file has no name. */
struct lrx_capture_interface {
    uint32_t link_type;    /* LINKTYPE_* */
    uint32_t file_type;    /* what its packets have of that in their column: report.h */
    uint32_t snaplen;      /* 0: no limit */
    uint32_t multiply;     /* nanoseconds of one unit of time; 0 where `shift` or `divide` say it */
    uint32_t shift;        /* a unit is 2^-shift seconds, if that is not 0 */
    uint64_t divide;       /* so many units are a nanosecond */
    int64_t offset;        /* seconds to add */
    uint32_t met;          /* whoever fills knows of it. The walk does not go over a packet before */
    char name[LRX_CAPTURE_NAME];
};

struct lrx_capture {
    uint64_t offset;     /* in the file, of the next record */
    uint64_t skip;       /* bytes to pass over from there */
    uint32_t pcapng;     /* or pcap */
    uint32_t begun;      /* the format is known */
    uint32_t swapped;    /* the other byte order than this host's */
    uint32_t header;     /* pcap: bytes of a record's header */
    uint32_t lengths;    /* pcap: 1 where captured and true length stand the other way round, 2 where they may */
    uint32_t first;      /* pcapng: interfaces of the sections before */
    uint32_t count;      /* interfaces of this section, which come behind those */
    uint32_t room;       /* of `interfaces` */
    struct lrx_capture_interface *interfaces;
    uint32_t needed;     /* bytes of the next record that must be in memory together */
    uint32_t piece;      /* that was walked over last */
    uint32_t pieces;     /* that were walked over since packets were reported */
    uint32_t more;       /* what was read has more to tell: whoever fills needs no readable file for it */
    uint32_t asked;      /* one more than the number of an interface whose first packet comes next; 0: none */
    uint32_t damage;     /* what is wrong at `offset` */
    uint64_t value;
    /* What was read and not walked over yet. */
    uint8_t *rest;
    uint32_t rest_at, rest_end;
};

/* NULL without memory. */
struct lrx_capture *lrx_capture_open(void);
void lrx_capture_close(struct lrx_capture *c);

/* Packets of what was read before, with the rest of it, without any new piece. */
int lrx_capture_again(struct lrx_capture *c, uintptr_t descriptors, uint32_t rows, uintptr_t region);

/* Packets of what was read before, and of `size` bytes that were read now: they lie in the region behind as much room as what was
 * read before takes, `rest_end - rest_at` bytes. What is no whole record, or finds no row, is kept. Returns their number.
 * `piece` is another number for each piece, and not 0: one that was walked over is not walked over again, so that whoever was
 * interrupted behind this call can repeat it. */
int lrx_capture_walk(struct lrx_capture *c, uintptr_t descriptors, uint32_t rows, uintptr_t region, uint32_t size,
                     uint32_t piece);

/* The file has ended: whether that is between two records; else `damage` says so. */
int lrx_capture_end(struct lrx_capture *c);
