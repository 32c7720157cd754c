/* Sends numbered frames. Each depends only on its number and the seed: `Traffic.frame` in traffic.py makes the same frame. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define HEAD 14
#define LONGEST 9014
#define SHORT_SPREAD 200
#define LEAST 60
#define LAST_LENGTH 9000

/* Shared with Python, which reads and writes single words while `send_numbered` runs. */
struct traffic {
    volatile uint64_t stop, burst, pause_us;   /* written by Python; `burst` 0 sends nothing */
    volatile uint64_t idle;                    /* 1: it has seen `burst` 0 */
    volatile uint64_t next, limit;             /* the numbers of the next frame, and behind the last one */
    volatile uint64_t accepted, refused_full, refused_down, refused_other, last_errno;
    uint64_t seed, ethernet, prefix, strange, handled;
    const uint8_t *block;                      /* 65536 + LONGEST bytes, of which frames take their contents */
};

/* The second half is used with `handled` only: LLC and VLAN, for which the kernel may have a handler. */
static const uint16_t ethertypes[8] = {0x88b5, 0x88b6, 0xffff, 0x88b5, 0x0000, 0x05dc, 0x0003, 0x8100};

uint64_t mix(uint64_t number, uint64_t seed)
{
    uint64_t z = (number + 1) * 0x9e3779b97f4a7c15u + seed;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static void put_number(uint8_t *at, uint64_t number)
{
    for (int k = 0; k < 5; k++)
        at[k] = (uint8_t)(number >> (32 - 8 * k));
}

/* Bits of `mix`: 0-7 whether it is strange, 8-15 long or short, 16-31 the length, 32-34 the ethertype, 40-55 the offset in
 * the block. Without `strange` all frames are LEAST bytes of the first ethertype. */
static long build(const struct traffic *t, uint64_t number, uint8_t *frame)
{
    uint64_t z = mix(number, t->seed);
    int strange = t->strange && (z & 0xff) < 16;
    long spread = (z >> 8 & 0xff) < 32 ? LAST_LENGTH - LEAST + 1 : SHORT_SPREAD;
    long length = t->strange ? LEAST + (long)((z >> 16 & 0xffff) % (uint64_t)spread) : LEAST;
    const uint8_t *content = t->block + (z >> 40 & 0xffff);

    if (t->ethernet) {
        uint16_t type = ethertypes[strange ? (z >> 32) % (t->handled ? 8 : 4) : 0];
        if (strange && (z & 1) && type != 0x8100)
            length = HEAD;                     /* only the link header */
        memcpy(frame, content, (size_t)length);
        memcpy(frame, "\x02\0\0\0\0\x01\x02", 7);
        put_number(frame + 7, number);
        frame[12] = (uint8_t)(type >> 8);
        frame[13] = (uint8_t)type;
        return length;
    }
    if (t->prefix) {                           /* a link header that a cooked packet socket does not show */
        memcpy(frame, "\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x88\xb5", HEAD);
        frame += HEAD;
    }
    if (strange && (z & 1) && !t->prefix)      /* a cooked socket gets its protocol from the kernel, and delivers it */
        length = 1;
    memcpy(frame, content, (size_t)length);
    frame[0] = strange ? 0x17 : number & 1 ? 0x45 : 0x60;   /* 1 is no version of IP */
    if (length > 1)
        put_number(frame + 1, number);
    return length + (t->prefix ? HEAD : 0);
}

static void nap(uint64_t microseconds)
{
    struct timespec time = {(time_t)(microseconds / 1000000), (long)(microseconds % 1000000) * 1000};
    nanosleep(&time, NULL);
}

/* Send bursts with a pause after each, until `stop` or `limit`. A frame that the kernel refuses uses up its number too, so the
 * reader sees increasing numbers with gaps. */
void send_numbered(int fd, struct traffic *t)
{
    uint8_t frame[LONGEST + HEAD];

    while (!t->stop && t->next < t->limit) {
        uint64_t burst = t->burst;
        t->idle = burst == 0;
        for (uint64_t k = 0; k < burst && t->next < t->limit; k++) {
            long length = build(t, t->next, frame);
            t->next++;
            if (send(fd, frame, (size_t)length, 0) >= 0) {
                t->accepted++;
            } else if (errno == ENOBUFS) {
                t->refused_full++;
            } else if (errno == ENETDOWN) {
                t->refused_down++;
                nap(50);
            } else {
                t->refused_other++;
                t->last_errno = (uint64_t)errno;
            }
        }
        if (!burst || t->pause_us)
            nap(burst ? t->pause_us : 100);
    }
    t->idle = 1;
}
