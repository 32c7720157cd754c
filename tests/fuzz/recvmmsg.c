/* Fuzzes recvmmsg's fill: the kernel's queue is the input, with names and control messages as the kernel writes them
 * and as it never would. */
#define _GNU_SOURCE
#include <linux/if_packet.h>
#include <stddef.h>
#include <sys/socket.h>
#include <time.h>

#include "fuzz.h"

static void *fake_calloc(size_t count, size_t size);
static int fake_recvmmsg(int fd, struct mmsghdr *headers, unsigned count, int flags, struct timespec *timeout);

/* Small, so that a kilobyte of input has packets that reach their far place. */
#define LRX_NEAR_MOST 200u
#define calloc fake_calloc
#define recvmmsg fake_recvmmsg
#include <recvmmsg.c>
#undef calloc

#define FD 77
#define MESSAGES_MOST 8

/* The metadata that the core must report for a packet. */
struct reported {
    uint32_t length, wire_length, flags, vlan_tci, vlan_tpid, interface, protocol, link_type, address_length;
    uint64_t address;
    int64_t timestamp;
};

static struct {
    struct input *in;
    uint32_t capacity;
    int metadata, sender;
    uint32_t rows, messages;
    uint32_t receives;         /* calls of this fill that had packets */
    int empty;                 /* the last call of this fill had fewer than were asked for */
    int error;                 /* what the last call ended with */
    int kept_error;            /* behind packets: for the next call, as the kernel's sk_err */
    uint32_t handed, taken;    /* packets that it handed out, and of these those that rows showed */
    struct reported reported[MESSAGES_MOST]; /* of packet `number`, at its remainder */
    int allocations_left;
    const uint8_t *region;     /* of this fill */
    uint32_t room, places; /* that the room has, no more than rows */
} kernel;

static uint32_t near_bytes(void)
{
    return kernel.capacity < LRX_NEAR_MOST ? kernel.capacity : LRX_NEAR_MOST;
}

/* Where a packet of that length has its place: the near ones lie in front of the far ones, an odd number of cache lines apart. */
static uint64_t place(uint32_t number, uint32_t length)
{
    uint32_t near = (near_bytes() + 63) / 64 * 64;

    near += near / 64 % 2 ? 0 : 64;
    if (length <= near_bytes())
        return (uint64_t)number * near;
    return (uint64_t)kernel.places * near + (uint64_t)number * ((kernel.capacity + 63) / 64 * 64);
}

static void *fake_calloc(size_t count, size_t size)
{
    errno = ENOMEM;
    return kernel.allocations_left-- > 0 ? calloc(count, size) : NULL;
}

/* As put_cmsg() does it; but the length that the header claims may be any. False when nothing can be found behind. */
static int put_control(struct msghdr *message, size_t *used, int level, int type, const void *data, size_t size,
                       size_t claimed)
{
    struct cmsghdr header = {claimed, level, type};

    if (message->msg_controllen - *used < CMSG_SPACE(size))
        return 0;
    memcpy((uint8_t *)message->msg_control + *used, &header, sizeof header);
    memcpy((uint8_t *)message->msg_control + *used + sizeof header, data, size);
    *used += CMSG_SPACE(size);
    return 1;
}

/* A claim is mostly true; or too short for its data; or for a header; or beyond all that the kernel wrote. */
static size_t claim(size_t size)
{
    switch (take(kernel.in, 7)) {
    case 0:
        return CMSG_LEN(take(kernel.in, (uint32_t)size - 1));
    case 1:
        return take(kernel.in, sizeof(struct cmsghdr) - 1);
    case 2:
        return CONTROL + (size_t)1 + take(kernel.in, 0xFFFFFFFF);
    default:
        return CMSG_LEN(size);
    }
}

static void write_control(struct msghdr *message, struct reported *reported)
{
    struct input *in = kernel.in;
    size_t used = 0;

    for (uint32_t left = take(in, 12); left; left--) {
        struct tpacket_auxdata aux = {0};
        struct timespec when = {0};
        uint32_t other = take(in, 0xFFFF), kind = take(in, 3);
        size_t claimed, size;
        int put;

        if (kind == 0) {
            aux.tp_status = take(in, 0xFF);
            aux.tp_len = take(in, 0xFFFF);
            aux.tp_snaplen = take(in, 0xFFFF);
            aux.tp_vlan_tci = (uint16_t)take(in, 0xFFFF);
            aux.tp_vlan_tpid = (uint16_t)take(in, 0xFFFF);
            claimed = claim(size = sizeof aux);
            put = put_control(message, &used, SOL_PACKET, PACKET_AUXDATA, &aux, size, claimed);
        } else if (kind == 1) {
            when.tv_sec = take(in, 0xFFFFFFFF);
            when.tv_nsec = take(in, 999999999);
            claimed = claim(size = sizeof when);
            put = put_control(message, &used, SOL_SOCKET, SO_TIMESTAMPNS, &when, size, claimed);
        } else {
            /* The right type on the wrong level, and one that nobody asked for. */
            int level = kind == 2 ? SOL_SOCKET : SOL_PACKET;
            int type = kind == 2 ? PACKET_AUXDATA : SO_TIMESTAMPNS;
            uint8_t data[64];

            memset(data, (int)other, sizeof data);
            size = 1 + other % sizeof data;
            claimed = claim(size);
            put = put_control(message, &used, level, type, data, size, claimed);
        }
        if (!put || claimed < sizeof(struct cmsghdr) || claimed > CONTROL)
            break;
        if (claimed != CMSG_LEN(size)) {
            /* Behind a header that lies within bounds the next one stands where the lie says. */
            used += CMSG_ALIGN(claimed) - CMSG_SPACE(size);
            continue;
        }
        if (kind == 0) {
            reported->wire_length += aux.tp_len > aux.tp_snaplen ? aux.tp_len - aux.tp_snaplen : 0;
            if (aux.tp_status & TP_STATUS_CSUMNOTREADY)
                reported->flags |= LRX_CHECKSUM_UNFINISHED;
            if (aux.tp_status & TP_STATUS_VLAN_VALID) {
                reported->flags |= LRX_VLAN;
                reported->vlan_tci = aux.tp_vlan_tci;
                reported->vlan_tpid = aux.tp_status & TP_STATUS_VLAN_TPID_VALID ? aux.tp_vlan_tpid : 0x8100;
            }
        } else if (kind == 1) {
            reported->flags |= LRX_TIMESTAMP;
            reported->timestamp = when.tv_sec * INT64_C(1000000000) + when.tv_nsec;
        }
    }
    message->msg_controllen = used;
}

/* A packet socket tells 20 bytes, before Linux 5.1 only those that the address fills, 18 on Ethernet; and of a longer
 * address its full length, although only what there is room for is written. */
static void write_name(struct msghdr *message, struct reported *reported)
{
    static const socklen_t lengths[] = {20, 18, 32, 0};
    struct sockaddr_ll name = {.sll_family = AF_PACKET, .sll_pkttype = (uint8_t)take(kernel.in, 6)};
    socklen_t length = lengths[take(kernel.in, 3)];
    uint32_t room = length > 20 ? 8 : length ? length - 12 : 0;

    name.sll_ifindex = (int)take(kernel.in, 0xFFFF);
    name.sll_protocol = htons((uint16_t)take(kernel.in, 0xFFFF));
    name.sll_hatype = (uint16_t)take(kernel.in, 0xFFFF);
    name.sll_halen = (uint8_t)take(kernel.in, 0xFF);
    for (uint32_t i = 0; i < 8; i++)
        name.sll_addr[i] = content(name.sll_hatype, i);
    if (length) {
        reported->interface = (uint32_t)name.sll_ifindex;
        reported->protocol = ntohs(name.sll_protocol);
        reported->link_type = name.sll_hatype;
        reported->address_length = name.sll_halen < room ? name.sll_halen : room;
        memcpy(&reported->address, name.sll_addr, reported->address_length);
    }

    memcpy(message->msg_name, &name, length < sizeof name ? length : sizeof name);
    message->msg_namelen = length;
    if (length && name.sll_pkttype == PACKET_OUTGOING)
        reported->flags |= LRX_OUTGOING;
}

static int fake_recvmmsg(int fd, struct mmsghdr *headers, unsigned count, int flags, struct timespec *timeout)
{
    unsigned n = 0;

    const uint32_t before = kernel.handed - kernel.taken, left = kernel.places - before, near = near_bytes();

    MUST(fd == FD && flags == (MSG_DONTWAIT | MSG_TRUNC) && !timeout && count);
    MUST(count == (left < kernel.messages ? left : kernel.messages)); /* no fewer than there is room for */
    MUST(!kernel.empty); /* no call after one that found the queue empty */
    kernel.error = kernel.kept_error;
    for (kernel.kept_error = 0; n < count && !kernel.error; n++) {
        struct msghdr *message = &headers[n].msg_hdr;
        const struct event event = next_event(kernel.in, kernel.capacity);
        const uint32_t number = kernel.handed;
        struct reported reported = {.length = event.length, .wire_length = event.length};
        size_t room = 0;

        if (event.kind != PACKET) {
            kernel.error = event.error;
            break;
        }
        MUST(message->msg_iov[0].iov_base == kernel.region + place(before + n, near) && message->msg_iov[0].iov_len == near);
        MUST(place(before + n, near) + near <= kernel.room);
        MUST(message->msg_iovlen == (kernel.capacity > near ? 2 : 1));
        if (kernel.capacity > near) {
            MUST(message->msg_iov[1].iov_base == kernel.region + place(before + n, kernel.capacity) + near);
            MUST(place(before + n, kernel.capacity) + kernel.capacity <= kernel.room);
        }
        for (uint32_t k = 0, at = 0; k < message->msg_iovlen; k++) {
            room += message->msg_iov[k].iov_len;
            for (size_t i = 0; i < message->msg_iov[k].iov_len && at < event.length; i++, at++)
                ((uint8_t *)message->msg_iov[k].iov_base)[i] = content(number, at);
        }
        MUST(room == kernel.capacity);
        message->msg_flags = event.length > room ? MSG_TRUNC : 0;
        if (kernel.metadata) {
            MUST(message->msg_namelen == sizeof(struct sockaddr_ll) && message->msg_controllen == CONTROL);
            write_name(message, &reported);
            write_control(message, &reported);
        } else {
            MUST(!message->msg_name && !message->msg_control);
        }
        headers[n].msg_len = event.length;
        kernel.reported[number % MESSAGES_MOST] = reported;
        kernel.handed++;
    }
    if (n && kernel.error != EAGAIN && kernel.error != EINTR)
        kernel.kept_error = kernel.error;
    if (n)
        kernel.error = 0;
    kernel.receives += n > 0;
    kernel.empty = n < count && kernel.error != EINTR;
    errno = kernel.error;
    return n ? (int)n : -1;
}

/* The rows show the packets that come next in the order of arrival. */
static void check_rows(const uint8_t *table, uint32_t rows, uint32_t count, const uint8_t *region, uint32_t end)
{
    uint32_t last = 0;

    for (uint32_t k = 0; k < count; k++, kernel.taken++) {
        const struct reported *reported = &kernel.reported[kernel.taken % MESSAGES_MOST];
        uint32_t start = (uint32_t)get(table, rows, k, START), length = (uint32_t)get(table, rows, k, LENGTH);

        MUST(start == place(k, length) && start + length <= end);
        last = last < start + length ? start + length : last;
        MUST(length == (reported->length < kernel.capacity ? reported->length : kernel.capacity));
        MUST(get(table, rows, k, WIRE_LENGTH) == reported->wire_length);
        MUST(get(table, rows, k, FLAGS) == reported->flags);
        MUST(get(table, rows, k, TIMESTAMP) == (uint64_t)reported->timestamp);
        MUST(get(table, rows, k, VLAN_TCI) == reported->vlan_tci);
        MUST(get(table, rows, k, VLAN_TPID) == reported->vlan_tpid);
        MUST(get(table, rows, k, INTERFACE) == reported->interface);
        MUST(get(table, rows, k, PROTOCOL) == (kernel.sender ? reported->protocol : 0));
        MUST(get(table, rows, k, LINK_TYPE) == (kernel.sender ? reported->link_type : 0));
        MUST(get(table, rows, k, ADDRESS) == (kernel.sender ? reported->address : 0));
        MUST(get(table, rows, k, ADDRESS_LENGTH) == (kernel.sender ? reported->address_length : 0));
        for (uint32_t i = 0; i < length; i++)
            MUST(region[start + i] == content(kernel.taken, i));
    }
    MUST(end == ((last + 7) & ~7u));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    uint32_t messages = take(&in, MESSAGES_MOST), rows = 1 + take(&in, MESSAGES_MOST - 1);
    uint32_t capacity = take(&in, 2000);
    uint32_t table_bytes = sizeof(struct lrx_report) + ROW_BYTES * rows;

    memset(&kernel, 0, sizeof kernel);
    kernel.in = &in;
    kernel.capacity = capacity;
    const uint32_t wanted = take(&in, 3);
    kernel.metadata = wanted & 1;
    kernel.sender = !(wanted & 2);
    kernel.rows = rows;
    kernel.messages = messages;
    kernel.allocations_left = take(&in, 7) ? 5 : (int)take(&in, 4);
    int enough = messages && capacity && kernel.allocations_left == 5;
    struct lrx_recvmmsg *s = lrx_recvmmsg_open(FD, messages, capacity, kernel.metadata, kernel.sender);
    MUST(!s == !enough);
    MUST(s || errno == (messages && capacity ? ENOMEM : EINVAL));
    if (!s)
        return 0;

    struct lrx_report *report = (struct lrx_report *)exactly(table_bytes);
    memset(report, 0, table_bytes);
    for (int fills = 0; fills < 16; fills++) {
        int error;
        /* Room for a packet of any size and for some more, and sometimes not even that. */
        const uint64_t stride = lrx_recvmmsg_stride(capacity);
        uint32_t room = take(&in, 7) ? (uint32_t)stride + (take(&in, 9000) & ~7u) : take(&in, (uint32_t)stride) & ~7u;
        uint8_t *region = exactly(room);

        kernel.region = region;
        kernel.room = room;
        kernel.places = room / stride < rows ? (uint32_t)(room / stride) : rows;

        int got = lrx_recvmmsg_fill(s, (uintptr_t)report, rows, (uintptr_t)region, room);
        uint32_t came = kernel.handed - kernel.taken;

        error = kernel.error == EAGAIN ? 0 : kernel.error;
        MUST(report->error == (uint32_t)error);
        if (!kernel.places) {
            MUST(got == -EMSGSIZE && !report->count && !came);
        } else if (!came) {
            MUST(got == -error && !report->count);
        } else {
            MUST(got > 0 && report->count == (uint32_t)got && (uint32_t)got == came);
            MUST(report->receives == kernel.receives && report->end <= room + 7);
            check_rows((uint8_t *)(report + 1), rows, (uint32_t)got, region, report->end);
            /* It stops for a reason only. */
            MUST((uint32_t)got == kernel.places || kernel.empty);
        }
        MUST(!report->classified && !report->rows);
        free(region);
        report->count = report->end = report->receives = report->error = 0; /* as who takes it does */
        kernel.error = kernel.empty = 0;
        kernel.receives = 0;
        if (!in.left && !kernel.kept_error)
            break;
    }
    lrx_recvmmsg_close(s);
    free(report);
    return 0;
}
