/* Fuzzes readv's fill: the kernel's queue is the input, and every packet it hands out must stand in a row. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "fuzz.h"

static int fake_fcntl(int fd, int command);
static int fake_poll(struct pollfd *ready, nfds_t count, int timeout);
static ssize_t fake_preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags);
static ssize_t fake_read(int fd, void *memory, size_t size);
static ssize_t fake_readv(int fd, const struct iovec *iov, int count);
static ssize_t fake_recv(int fd, void *memory, size_t size, int flags);
static ssize_t fake_recvmsg(int fd, struct msghdr *message, int flags);

#define fcntl fake_fcntl
#define poll fake_poll
#define preadv2 fake_preadv2
#define read fake_read
#define readv fake_readv
#define recv fake_recv
#define recvmsg fake_recvmsg
#include <readv.c>

/* The source, and what it did in this fill. */
#define FD 77
#define HANDED_MOST 64

static struct {
    struct input *in;
    uint32_t capacity;
    int method;
    int nonblocking; /* O_NONBLOCK is set in this fill */
    int plain;       /* and it was looked at */
    struct event next;
    int known;    /* `next` is what comes next */
    int readable; /* poll() said so, and nothing was read since */
    int error;    /* what ended this fill; nothing may be asked for behind it */
    uint32_t handed, first;
    uint32_t tags[HANDED_MOST];    /* the metadata of each packet of an AF_PACKET socket: a number that is both link type and VLAN tag; 0: none */
    uint32_t cuts[HANDED_MOST];    /* and how much a filter had cut off */
    uint32_t lengths[HANDED_MOST]; /* of packets handed out in this fill, from number `first` on */
} kernel;

static const struct event *look(void)
{
    MUST(!kernel.error);
    if (!kernel.known)
        kernel.next = next_event(kernel.in, kernel.capacity);
    kernel.known = 1;
    return &kernel.next;
}

static int fail(void)
{
    errno = kernel.next.error;
    kernel.known = 0;
    if ((errno == EOPNOTSUPP || errno == ENOSYS || errno == EPERM) && kernel.method == LRX_READ && !kernel.plain)
        kernel.method = LRX_POLL; /* what is to be done about it: nobody else need know */
    else if (errno != EINTR)
        kernel.error = errno;
    return -1;
}

/* Takes the next packet: its length, which may exceed the room. */
static ssize_t hand_out(const struct iovec *iov, int count)
{
    const struct event *event = look();
    uint32_t at = 0, number = kernel.first + kernel.handed;
    size_t room = 0;

    for (int k = 0; k < count; k++)
        room += iov[k].iov_len;
    MUST(room == (size_t)kernel.capacity + 1);
    if (event->kind != PACKET)
        return fail();
    for (int k = 0; k < count; k++)
        for (size_t i = 0; i < iov[k].iov_len && at < event->length; i++, at++)
            ((uint8_t *)iov[k].iov_base)[i] = content(number, at);
    MUST(kernel.handed < HANDED_MOST);
    kernel.lengths[kernel.handed++] = event->length;
    kernel.known = kernel.readable = 0;
    return event->length;
}

/* Without MSG_TRUNC the result counts only the bytes that were copied. */
static ssize_t fake_readv(int fd, const struct iovec *iov, int count)
{
    MUST(fd == FD && (kernel.plain || (kernel.method == LRX_POLL && kernel.readable)));
    ssize_t length = hand_out(iov, count);
    return length > (ssize_t)kernel.capacity + 1 ? (ssize_t)kernel.capacity + 1 : length;
}

static ssize_t fake_read(int fd, void *memory, size_t size)
{
    struct iovec iov = {memory, size};

    return fake_readv(fd, &iov, 1);
}

static ssize_t fake_preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
    MUST(fd == FD && kernel.method == LRX_READ && !kernel.plain && offset == -1 && flags == RWF_NOWAIT);
    ssize_t length = hand_out(iov, count);
    return length > (ssize_t)kernel.capacity + 1 ? (ssize_t)kernel.capacity + 1 : length;
}

/* Looked at once, behind the first packet. */
static int fake_fcntl(int fd, int command)
{
    MUST(fd == FD && command == F_GETFL && kernel.handed == 1 && kernel.method == LRX_READ);
    kernel.plain = kernel.nonblocking;
    return kernel.nonblocking ? O_RDWR | O_NONBLOCK : O_RDWR;
}

/* As an AF_PACKET socket does it, with a name and PACKET_AUXDATA, or with neither. */
static ssize_t hand_out_with_metadata(struct msghdr *message)
{
    struct sockaddr_ll name = {.sll_family = AF_PACKET};
    struct tpacket_auxdata aux = {.tp_status = TP_STATUS_VLAN_VALID};
    struct cmsghdr header = {CMSG_LEN(sizeof aux), SOL_PACKET, PACKET_AUXDATA};
    const uint32_t number = kernel.handed;
    ssize_t length;

    MUST(message->msg_namelen == sizeof name && message->msg_controllen == CONTROL);
    length = hand_out(message->msg_iov, (int)message->msg_iovlen);
    if (length < 0)
        return length;
    kernel.tags[number] = take(kernel.in, 0xFFFF);
    kernel.cuts[number] = kernel.tags[number] ? take(kernel.in, 0xFF) : 0;
    name.sll_hatype = aux.tp_vlan_tci = (uint16_t)kernel.tags[number];
    aux.tp_len = kernel.cuts[number];
    memcpy(message->msg_name, &name, sizeof name);
    memcpy(message->msg_control, &header, sizeof header);
    memcpy((uint8_t *)message->msg_control + sizeof header, &aux, sizeof aux);
    message->msg_namelen = kernel.tags[number] ? sizeof name : 0;
    message->msg_controllen = kernel.tags[number] ? CMSG_SPACE(sizeof aux) : 0;
    return length;
}

static ssize_t fake_recvmsg(int fd, struct msghdr *message, int flags)
{
    MUST(fd == FD && flags == (MSG_DONTWAIT | MSG_TRUNC));
    if (kernel.method == LRX_RECVMSG)
        return hand_out_with_metadata(message);
    MUST(kernel.method == LRX_RECV);
    MUST(!message->msg_name && !message->msg_control && !message->msg_namelen && !message->msg_controllen);
    return hand_out(message->msg_iov, (int)message->msg_iovlen);
}

static ssize_t fake_recv(int fd, void *memory, size_t size, int flags)
{
    struct iovec iov = {memory, size};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};

    return fake_recvmsg(fd, &message, flags);
}

/* A signal interrupts poll() even when it is not to wait: do_poll() looks for one whatever the timeout. An error of
 * the descriptor is no error of poll() but makes it readable. */
static int fake_poll(struct pollfd *ready, nfds_t count, int timeout)
{
    MUST(count == 1 && ready->fd == FD && ready->events == POLLIN && timeout == 0);
    MUST(kernel.method == LRX_POLL && !kernel.plain);
    switch (look()->kind) {
    case NOTHING:
        fail();
        return 0;
    case INTERRUPTED:
        return fail();
    default:
        kernel.readable = 1;
        ready->revents = POLLIN;
        return 1;
    }
}

/* Rows show the packets that were handed out, whole or cut, one behind the other. */
static void check_rows(const uint8_t *table, uint32_t rows, const uint8_t *region, uint32_t end)
{
    uint32_t free_from = 0;

    for (uint32_t k = 0; k < kernel.handed; k++) {
        uint32_t start = (uint32_t)get(table, rows, k, START), length = (uint32_t)get(table, rows, k, LENGTH);
        int cut = kernel.lengths[k] > kernel.capacity;

        MUST(start % 8 == 0 && start >= free_from && start + length <= end);
        free_from = start + length;
        MUST(length == (cut ? kernel.capacity : kernel.lengths[k]));
        int has_metadata = kernel.method == LRX_RECVMSG && kernel.tags[k], socket = kernel.method == LRX_RECV || kernel.method == LRX_RECVMSG;

        MUST(get(table, rows, k, WIRE_LENGTH) == (socket ? kernel.lengths[k] : length) + (has_metadata ? kernel.cuts[k] : 0));
        MUST(get(table, rows, k, FLAGS) == (uint64_t)((cut ? LRX_TRUNCATED : 0) | (has_metadata ? LRX_VLAN : 0)));
        MUST(!get(table, rows, k, TIMESTAMP));
        MUST(get(table, rows, k, VLAN_TCI) == (has_metadata ? kernel.tags[k] : 0));
        MUST(get(table, rows, k, VLAN_TPID) == (has_metadata ? 0x8100 : 0));
        MUST(get(table, rows, k, LINK_TYPE) == (has_metadata ? kernel.tags[k] : 0));
        for (uint32_t i = 0; i < length; i++)
            MUST(region[start + i] == content(kernel.first + k, i));
    }
    MUST(end == ((free_from + 7) & ~7u));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    const int methods[] = {LRX_READ, LRX_READ, LRX_RECV, LRX_POLL, LRX_RECVMSG};
    struct lrx_readv r = {.fd = FD, .method = methods[take(&in, 4)]};
    uint32_t rows = 1 + take(&in, 7), table_bytes = sizeof(struct lrx_report) + ROW_BYTES * rows;
    struct lrx_report *report = (struct lrx_report *)exactly(table_bytes);

    r.sizes_count = take(&in, 3) ? 0 : take(&in, LRX_SIZES_MAX + 1);
    for (uint32_t k = 0; k < r.sizes_count && k < LRX_SIZES_MAX; k++)
        r.capacity += r.sizes[k] = 1 + take(&in, 40);
    if (!r.sizes_count)
        r.capacity = 1 + take(&in, 2000);
    memset(report, 0, table_bytes);
    memset(&kernel, 0, sizeof kernel);
    kernel.in = &in;
    kernel.capacity = r.capacity;
    kernel.method = r.method;

    for (int fills = 0; fills < 16; fills++) {
        uint32_t room = (r.capacity + 8 + take(&in, 4000)) & ~7u;
        uint8_t *region = exactly(room);
        kernel.nonblocking = fills % 2 == 0;
        kernel.plain = 0;
        int got = lrx_readv_fill(&r, (uintptr_t)report, rows, (uintptr_t)region, room);
        int error = kernel.error == EAGAIN ? 0 : kernel.error;

        if (r.sizes_count > LRX_SIZES_MAX) {
            MUST(got == -EINVAL && !kernel.handed && !kernel.error && !kernel.known);
        } else if (kernel.handed) {
            MUST(got == (int)kernel.handed && report->count == kernel.handed);
            MUST(report->receives == kernel.handed && report->error == (uint32_t)error);
        } else {
            MUST(kernel.error && got == -error && report->count == 0);
            MUST(report->error == (uint32_t)error);
        }
        if (got > 0) {
            check_rows((uint8_t *)(report + 1), rows, region, report->end);
            /* It stops for a reason only. */
            MUST(kernel.error || kernel.handed == rows || room - report->end < r.capacity + 1);
        }
        MUST(report->end <= room && !report->classified && !report->rows);
        free(region);
        report->count = report->end = report->error = 0; /* as who takes it does */
        kernel.first += kernel.handed;
        kernel.handed = 0;
        kernel.error = 0;
        if (!in.left && !kernel.known)
            break;
    }
    free(report);
    return 0;
}
