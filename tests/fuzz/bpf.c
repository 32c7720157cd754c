#define _GNU_SOURCE
/* Fuzzes filters against the kernel: the same program on an AF_UNIX socket takes, cuts and rejects the same frames. */
#include <linux/filter.h>
#include <linux/if_packet.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuzz.h"

#include <bpf.c>
#include <bpf_check.c>
/* Such a socket has no link header: in the kernel no load finds one. */
#undef SKF_LL_OFF
#define SKF_LL_OFF SKF_NET_OFF
#include <bpf_loads.c>

#define INSTRUCTIONS_MOST 24
#define FRAME_MOST 80
#define FRAMES 3

/* A socket's packets have no device and no protocol, and two of the answers are the kernel's own, or another each time. */
static int is_comparable(uint32_t k)
{
    switch (k) {
    case AD(SKF_AD_PROTOCOL):
    case AD(SKF_AD_PAY_OFFSET):
    case AD(SKF_AD_CPU):
    case AD(SKF_AD_RANDOM):
        return 0;
    }
    return 1;
}

static struct lrx_instruction next_instruction(struct input *in, uint32_t left, int *comparable)
{
    static const uint16_t loads[] = {0x20, 0x28, 0x30, 0x40, 0x48, 0x50, 0xb1, 0x80, 0x81, 0x60, 0x61, 0x00, 0x01};
    static const uint16_t others[] = {0x02, 0x03, 0x07, 0x87, 0x04, 0x14, 0x24, 0x34, 0x44, 0x54, 0x64, 0x74, 0x94, 0xa4, 0x0c,
                                      0x1c, 0x2c, 0x3c, 0x4c, 0x5c, 0x6c, 0x7c, 0x9c, 0xac, 0x84, 0x16, 0x06};
    static const uint16_t jumps[] = {0x05, 0x15, 0x1d, 0x25, 0x2d, 0x35, 0x3d, 0x45, 0x4d};
    struct lrx_instruction made = {0};

    switch (take(in, 7)) {
    case 0:
        made.code = (uint16_t)take(in, 0x1FF); /* anything */
        made.jt = (uint8_t)take(in, 255);
        made.jf = (uint8_t)take(in, 255);
        made.k = take(in, 0xFFFFFFFF);
        break;
    case 1:
    case 2:
        made.code = jumps[take(in, 8)];
        made.jt = (uint8_t)take(in, left);
        made.jf = (uint8_t)take(in, left);
        made.k = made.code == 0x05 ? take(in, left) : take(in, 255);
        break;
    case 3:
    case 4:
    case 5:
        made.code = loads[take(in, 12)];
        made.k = take(in, FRAME_MOST + 3);
        break;
    case 6:
        made.code = loads[take(in, 5)];
        switch (take(in, 2)) {
        case 0:
            made.k = AD(take(in, 16) * 4);
            break;
        case 1:
            made.k = (uint32_t)SKF_NET_OFF + take(in, FRAME_MOST);
            break;
        default:
            made.k = take(in, 0xFFFFFFFF);
        }
        break;
    default:
        made.code = others[take(in, 26)];
        made.k = take(in, 34);
    }
    if ((made.code & ~0x18u) == (BPF_LD | BPF_ABS))
        *comparable &= is_comparable(made.k);
    return made;
}

/* Of a capture file the program reads the whole record, and what it keeps is counted from behind the header in front of the packet. */
static void of_file(const struct lrx_instruction *program, const uint8_t *record, uint32_t length, int comparable)
{
    static const uint32_t link_types[] = {LINKTYPE_NULL, LINKTYPE_ETHERNET, LINKTYPE_LINUX_SLL, LINKTYPE_LINUX_SLL2};

    for (unsigned k = 0; k < sizeof link_types / sizeof *link_types; k++) {
        const uint32_t head = lrx_file_head(link_types[k]);
        const struct lrx_file_programs files = {1, {LRX_OF_FILE | link_types[k]}, {program}};
        const struct lrx_filter whole = {.program = program}, filter = {.files = &files};
        struct lrx_filtered packet = {.frame = record, .length = length, .wire_length = length, .link_header = head, .protocol = 0x0800, .interface = 1};
        uint32_t kept;

        if (length <= head)
            continue;
        kept = lrx_filter_run(&whole, &packet);
        packet.frame += head;
        packet.length -= head;
        packet.wire_length -= head;
        packet.link_header = 0;
        packet.file_type = LRX_OF_FILE | link_types[k];
        MUST(lrx_filter_run(&filter, &packet) == (kept > head ? kept - head : 0) || !comparable);
        packet.file_type = LRX_OF_FILE | LINKTYPE_RAW;
        MUST(lrx_filter_run(&filter, &packet) == 0); /* no program: nothing passes */
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    const uint32_t count = take(&in, INSTRUCTIONS_MOST);
    struct lrx_instruction *program = (struct lrx_instruction *)exactly(count * sizeof *program);
    struct sock_fprog attached = {.len = (unsigned short)count, .filter = (struct sock_filter *)program};
    int comparable = 1, pair[2], refused;

    for (uint32_t k = 0; k < count; k++)
        program[k] = next_instruction(&in, count - k, &comparable);
    if (count && take(&in, 7)) /* most end well */
        program[count - 1] = (struct lrx_instruction){take(&in, 1) ? 0x06 : 0x16, 0, 0, take(&in, 1) ? 0xFFFFFFFF : take(&in, 100)};
    MUST(!socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, pair));
    refused = setsockopt(pair[0], SOL_SOCKET, SO_ATTACH_FILTER, &attached, sizeof attached) < 0;
    MUST(!refused || errno == EINVAL);
    MUST(refused == (lrx_filter_check(program, count) != 0));
    for (int frames = 0; !refused && frames < FRAMES; frames++) {
        const uint32_t length = 1 + take(&in, FRAME_MOST - 1);
        uint8_t *frame = exactly(length), received[FRAME_MOST];
        struct lrx_filtered packet = {.frame = frame, .length = length, .wire_length = length};
        struct lrx_filter filter = {.program = program};
        ssize_t got;
        uint32_t kept;

        for (uint32_t i = 0; i < length; i++)
            frame[i] = in.left ? (uint8_t)take(&in, 255) : content((uint32_t)frames, i);
        MUST(send(pair[1], frame, length, 0) == (ssize_t)length);
        got = recv(pair[0], received, sizeof received, 0);
        kept = lrx_filter_run(&filter, &packet);
        MUST(kept <= length);
        if (comparable)
            MUST(kept == (got < 0 ? 0 : (uint32_t)got));
        /* On a device, and with the tag put back: nothing is read that is not there. */
        packet.link_header = length < 14 ? 0 : 14;
        packet.interface = packet.link_type = 1;
        packet.tagged = 1;
        packet.vlan_tpid = 0x8100;
        packet.vlan_tci = 0x2005;
        for (filter.tags = 0; filter.tags < 2; filter.tags++)
            MUST(lrx_filter_run(&filter, &packet) <= length);
        of_file(program, frame, length, comparable);
        free(frame);
    }
    close(pair[0]);
    close(pair[1]);
    free(program);
    return 0;
}
