#pragma once
#include <stdint.h>

/* Classic BPF, as the kernel's socket filters have it. linkrx/kernel/bpf.py is the same in Python. */

#define LRX_FILTER_MOST 4096 /* linux/bpf_common.h: BPF_MAXINSNS */

/* linux/filter.h: struct sock_filter. */
struct lrx_instruction {
    uint16_t code;
    uint8_t jt;
    uint8_t jf;
    uint32_t k;
};

#define LRX_FILE_PROGRAMS 64

/* Of a capture file: a program that lrx_filter_check() accepts for the packets of each link type. Whoever fills adds one when the first
 * packet of that link type comes. */
struct lrx_file_programs {
    uint32_t count;
    uint32_t file_types[LRX_FILE_PROGRAMS]; /* as in the column: report.h */
    const struct lrx_instruction *programs[LRX_FILE_PROGRAMS];
};

struct lrx_filter {
    const struct lrx_instruction *program; /* that lrx_filter_check() accepts; NULL: everything passes */
    uint32_t tags; /* 1: it reads frames with the tag that the kernel took out put back */
    const struct lrx_file_programs *files; /* or NULL: of a capture file, in place of `program` */
};

/* One frame, and what a program may ask about it. */
struct lrx_filtered {
    const uint8_t *frame;
    uint32_t length;      /* bytes that there are; nothing behind them is read */
    uint32_t wire_length; /* of the packet, before anything cut it */
    uint32_t link_header; /* the network header's offset */
    uint32_t link_type;   /* ARPHRD_* of the device */
    uint32_t protocol;    /* that the kernel told; 0: as the frame says */
    uint32_t file_type;   /* of a capture file's: report.h */
    uint32_t interface;   /* 0: not known */
    uint32_t outgoing;
    uint32_t tagged;      /* the kernel has taken a tag out */
    uint16_t vlan_tci;
    uint16_t vlan_tpid;
};

/* What the kernel's bpf_check_classic() looks at. 0, or one more than the index of the instruction that is wrong. */
uint32_t lrx_filter_check(const struct lrx_instruction *program, uint32_t count);

/* Run a program that was checked: how many bytes of the frame are kept. 0: none, the packet is rejected. Of a packet of a capture file a
 * program reads all that the file has, with the header in front of the packet. */
uint32_t lrx_filter_run(const struct lrx_filter *filter, const struct lrx_filtered *packet);
