/* What the harnesses share: the input, memory of exact size, the table as columns.py lays it out, and the packets
 * and errors that the kernel has in its queue. */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(truth) ((truth) ? (void)0 : wrong(#truth, __FILE__, __LINE__))

static inline void wrong(const char *truth, const char *file, int line)
{
    fprintf(stderr, "%s:%d: not so: %s\n", file, line, truth);
    abort();
}

struct input {
    const uint8_t *at;
    size_t left;
};

/* A number from 0 to `most`; 0 behind the end of the input. */
static inline uint32_t take(struct input *in, uint32_t most)
{
    uint64_t value = 0;
    size_t bytes = most <= 0xFF ? 1 : most <= 0xFFFF ? 2 : 4;

    for (; bytes && in->left; bytes--, in->left--)
        value = value << 8 | *in->at++;
    return (uint32_t)(value % ((uint64_t)most + 1));
}

/* `size` bytes of the heap and not one more, so that a step over the edge is seen. */
static inline uint8_t *exactly(size_t size)
{
    uint8_t *memory = malloc(size);

    MUST(memory || !size);
    if (size)
        memset(memory, 0xA5, size);
    return memory;
}

/* linkrx/memory/columns.py _LAYOUT: where in a row's share of a table each column is, and how wide. */
#define ROW_BYTES 48
#define TIMESTAMP 0, 8
#define ADDRESS 8, 8
#define START 16, 4
#define LENGTH 20, 4
#define WIRE_LENGTH 24, 4
#define INTERFACE 28, 4
#define FILE_TYPE 32, 4
#define PROTOCOL 36, 2
#define FLAGS 38, 2
#define VLAN_TCI 40, 2
#define VLAN_TPID 42, 2
#define LINK_TYPE 44, 2
#define ADDRESS_LENGTH 46, 1
#define LINK_HEADER 47, 1

static inline void put(uint8_t *table, size_t rows, size_t row, size_t offset, size_t width, uint64_t value)
{
    memcpy(table + rows * offset + row * width, &value, width);
}

static inline uint64_t get(const uint8_t *table, size_t rows, size_t row, size_t offset, size_t width)
{
    uint64_t value = 0;

    memcpy(&value, table + rows * offset + row * width, width);
    return value;
}

/* Byte i of packet `number`: no two packets, and no two places in one, look alike for long. */
static inline uint8_t content(uint32_t number, uint32_t i)
{
    return (uint8_t)(number * 151 + i * 7 + (i >> 8) * 29);
}

/* What the kernel's queue has next. */
struct event {
    enum { PACKET, NOTHING, INTERRUPTED, FAILS } kind;
    uint32_t length;
    int error;
};

/* Mostly packets: around `capacity` bytes, short, or far longer than any buffer. */
static inline struct event next_event(struct input *in, uint32_t capacity)
{
    static const int errors[] = {ENETDOWN, EBADFD, EFAULT, EOPNOTSUPP, ENOSYS, EPERM, ENOBUFS, ECONNREFUSED};
    struct event event = {NOTHING, 0, EAGAIN};

    if (!in->left)
        return event;
    switch (take(in, 7)) {
    case 0:
        break;
    case 1:
        event.kind = INTERRUPTED;
        event.error = EINTR;
        break;
    case 2:
        event.kind = FAILS;
        event.error = errors[take(in, sizeof errors / sizeof *errors - 1)];
        break;
    case 3:
        event.kind = PACKET;
        event.length = capacity + 4 - take(in, 8 < capacity ? 8 : capacity);
        break;
    case 4:
        event.kind = PACKET;
        event.length = take(in, 70000);
        break;
    default:
        event.kind = PACKET;
        event.length = take(in, 255);
    }
    return event;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
