#pragma once
#include <stdint.h>

/* Classic BPF, as for the kernel's socket filters. linkrx/kernel/bpf.py is the same in Python. */

#define LRX_FILTER_MOST 4096 /* linux/bpf_common.h: BPF_MAXINSNS */

/* linux/filter.h: struct sock_filter. */
struct lrx_instruction {
    uint16_t code;
    uint8_t jt;
    uint8_t jf;
    uint32_t k;
};

#define LRX_FILE_PROGRAMS 64

/* The filter of a capture file: a program for each link type, accepted by lrx_filter_check(). The backend adds one before the
 * first packet of a link type. */
struct lrx_file_programs {
    uint32_t count;
    uint32_t file_types[LRX_FILE_PROGRAMS]; /* report.h */
    const struct lrx_instruction *programs[LRX_FILE_PROGRAMS];
};

struct lrx_filter {
    const struct lrx_instruction *program; /* accepted by lrx_filter_check(); NULL: everything passes */
    uint32_t tags; /* 1: the program reads frames with their VLAN tag, which the kernel took out */
    const struct lrx_file_programs *files; /* for capture files, instead of `program`; or NULL */
};

/* A frame and its metadata. */
struct lrx_filtered {
    const uint8_t *frame;
    uint32_t length;      /* bytes of the frame in memory */
    uint32_t wire_length; /* bytes before the frame was cut */
    uint32_t link_header; /* the offset of the network header */
    uint32_t link_type;   /* ARPHRD_* of the device */
    uint32_t protocol;    /* reported by the kernel; 0: in the frame */
    uint32_t file_type;   /* of a packet of a capture file: report.h */
    uint32_t interface;   /* 0: unknown */
    uint32_t outgoing;
    uint32_t tagged;      /* the kernel took a VLAN tag out */
    uint16_t vlan_tci;
    uint16_t vlan_tpid;
};

/* The checks of the kernel's bpf_check_classic(). Returns 0, or 1 + the index of the invalid instruction. */
uint32_t lrx_filter_check(const struct lrx_instruction *program, uint32_t count);

/* Run a checked program. Returns how many bytes of the frame to keep; 0 rejects the packet. For a packet of a capture file the
 * program also reads the pseudo-header in front of the packet. */
uint32_t lrx_filter_run(const struct lrx_filter *filter, const struct lrx_filtered *packet);
