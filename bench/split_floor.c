/* The barest loops in C that read super-packets, and that make frames of them: TCP and UDP behind an Ethernet header and
 * an IP header without options, known to be what they say. What linkrx looks at and writes down of each is left out. */
#include <arpa/inet.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#define ROOM 65600
#define VNET 10
#define GSO_SIZE_AT 4
#define ETHERNET 14

/* As in linkrx/_core/segment.c: only what adds up bytes gains from it. */
#if defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((optimize("O3")))
#else
#define VECTORISED
#endif

static inline uint16_t get(const uint8_t *at)
{
    uint16_t word;

    memcpy(&word, at, sizeof word);
    return word;
}

static inline void put(uint8_t *at, uint16_t word)
{
    memcpy(at, &word, sizeof word);
}

static inline uint16_t checksum(uint64_t sum)
{
    sum = (sum >> 32) + (sum & 0xFFFFFFFF);
    sum = (sum >> 32) + (sum & 0xFFFFFFFF);
    sum = (sum >> 16) + (sum & 0xFFFF);
    sum = (sum >> 16) + (sum & 0xFFFF);
    return (uint16_t)~sum;
}

VECTORISED
static uint64_t sum_of(const uint8_t *from, uint32_t n)
{
    uint64_t low = 0, high = 0, word;
    size_t words = n / sizeof word;

    for (size_t k = 0; k < words; k++) {
        memcpy(&word, from + k * sizeof word, sizeof word);
        low += word;
        high += word >> 32;
    }
    word = 0;
    memcpy(&word, from + words * sizeof word, n % sizeof word);
    low += word;
    high += word >> 32;
    return low - (high << 32) + high;
}

/* read() into `memory`, one super-packet behind the other, until nothing is left. Returns how many. */
long drain_whole(int fd, uint8_t *memory, long size, uint64_t *bytes)
{
    long packets = 0, cursor = 0;

    for (;;) {
        if (cursor + ROOM > size)
            cursor = 0;
        ssize_t got = read(fd, memory + cursor, ROOM);
        if (got < 0)
            return packets;
        *bytes += (uint64_t)(got - VNET);
        cursor += (got + 7) & ~7;
        packets++;
    }
}

/* The same, and each super-packet, while it is in the cache, into frames. Returns how many frames. The first ROOM bytes of
 * `memory` are read into, the rest is written to, one frame behind the other. */
long drain_split(int fd, uint8_t *memory, long size, uint64_t *bytes)
{
    const uint8_t *frame = memory + VNET;
    long frames = 0, cursor = ROOM;

    for (;;) {
        ssize_t got = read(fd, memory, ROOM);
        if (got < 0)
            return frames;
        uint32_t length = (uint32_t)got - VNET, segment = get(memory + GSO_SIZE_AT);
        int four = frame[ETHERNET - 2] == 0x08;
        uint32_t transport = ETHERNET + (four ? 20 : 40);
        int tcp = frame[ETHERNET + (four ? 9 : 6)] == 6;
        uint32_t header = tcp ? (frame[transport + 12] >> 4) * 4u : 8, headers = transport + header;
        uint32_t checksum_at = tcp ? 16 : 6;
        uint16_t id = ntohs(get(frame + ETHERNET + 4));
        uint32_t sequence;
        /* The sums that all frames have: of the IP header, of the pseudo-header and of TCP's, each without what differs. */
        uint64_t ip_sum = sum_of(frame + ETHERNET, 20) - get(frame + ETHERNET + 2) - get(frame + ETHERNET + 4) -
                          get(frame + ETHERNET + 10);
        uint64_t l4_sum = sum_of(frame + transport, header) + (uint16_t)~htons((uint16_t)(length - transport));

        memcpy(&sequence, frame + transport + 4, sizeof sequence);
        l4_sum += tcp ? 0xFFFFFFFFu - sequence : (uint16_t)~get(frame + transport + 4);
        l4_sum += tcp ? (uint16_t)~get(frame + transport + 12) : 0u;
        sequence = ntohl(sequence);
        for (uint32_t at = headers; at < length; at += segment) {
            uint32_t payload = length - at < segment ? length - at : segment, whole = headers + payload;
            if (cursor + whole > size)
                cursor = ROOM;
            uint8_t *out = memory + cursor, *ip = out + ETHERNET, *l4 = out + transport;
            uint16_t l4_length = htons((uint16_t)(header + payload));
            uint64_t sum = l4_sum + sum_of(frame + at, payload) + l4_length;

            memcpy(out, frame, headers);
            memcpy(out + headers, frame + at, payload);
            if (four) {
                put(ip + 2, htons((uint16_t)(whole - ETHERNET)));
                put(ip + 4, htons(id));
                put(ip + 10, checksum(ip_sum + get(ip + 2) + get(ip + 4)));
                id++;
            } else {
                put(ip + 4, l4_length);
            }
            if (tcp) {
                uint32_t number = htonl(sequence);

                memcpy(l4 + 4, &number, sizeof number);
                sequence += segment;
                if (at + segment < length)
                    l4[13] &= (uint8_t)~0x09; /* FIN, PSH */
                sum += (uint64_t)number + get(l4 + 12);
            } else {
                put(l4 + 4, l4_length);
                sum += l4_length;
            }
            uint16_t found = checksum(sum);
            put(l4 + checksum_at, found || tcp ? found : 0xFFFF);
            *bytes += whole;
            cursor += (whole + 7) & ~7u;
            frames++;
        }
    }
}
