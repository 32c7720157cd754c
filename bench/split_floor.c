/* Minimal C loops that read super-packets, and that split them into frames: TCP and UDP behind an Ethernet header and an IP
 * header without options. They copy and add up bytes as linkrx does, but check no header and write no metadata. */
#include <arpa/inet.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include "checksum.inc"

#define ROOM 65600
#define VNET 10
#define GSO_SIZE_AT 4
#define ETHERNET 14

/* read() super-packets into `memory`, one after the other, until the queue is empty. Returns their number. */
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

/* The same, and splits each super-packet while it is in the cache. Returns the number of frames. It reads into the first
 * ROOM bytes of `memory`, and writes contiguous frames to the rest. */
long drain_split(int fd, uint8_t *memory, long size, uint64_t *bytes)
{
    const uint8_t *frame = memory + VNET;
    long frames = 0, cursor = ROOM;

    for (;;) {
        ssize_t got = read(fd, memory, ROOM);
        if (got < 0)
            return frames;
        uint32_t length = (uint32_t)got - VNET, segment = word_at(memory + GSO_SIZE_AT);
        int four = frame[ETHERNET - 2] == 0x08;
        uint32_t transport = ETHERNET + (four ? 20 : 40);
        int tcp = frame[ETHERNET + (four ? 9 : 6)] == 6;
        uint32_t header = tcp ? (frame[transport + 12] >> 4) * 4u : 8, headers = transport + header;
        uint32_t checksum_at = tcp ? 16 : 6;
        uint16_t id = ntohs(word_at(frame + ETHERNET + 4));
        uint32_t sequence;
        /* The sums that are the same for all frames: of the IP header, the pseudo-header and the TCP header, without the fields that differ. */
        uint64_t ip_sum = sum_of(frame + ETHERNET, 20) - word_at(frame + ETHERNET + 2) - word_at(frame + ETHERNET + 4) -
                          word_at(frame + ETHERNET + 10);
        uint64_t l4_sum = sum_of(frame + transport, header) + (uint16_t)~htons((uint16_t)(length - transport));

        memcpy(&sequence, frame + transport + 4, sizeof sequence);
        l4_sum += tcp ? 0xFFFFFFFFu - sequence : (uint16_t)~word_at(frame + transport + 4);
        l4_sum += tcp ? (uint16_t)~word_at(frame + transport + 12) : 0u;
        sequence = ntohl(sequence);
        for (uint32_t at = headers; at < length; at += segment) {
            uint32_t payload = length - at < segment ? length - at : segment, whole = headers + payload;
            if (cursor + whole > size)
                cursor = ROOM;
            uint8_t *out = memory + cursor, *ip = out + ETHERNET, *l4 = out + transport;
            uint16_t l4_length = htons((uint16_t)(header + payload));
            uint64_t sum = l4_sum + copied(out + headers, frame + at, payload) + l4_length;

            memcpy(out, frame, headers);
            if (four) {
                put_word(ip + 2, htons((uint16_t)(whole - ETHERNET)));
                put_word(ip + 4, htons(id));
                put_word(ip + 10, (uint16_t)~folded(ip_sum + word_at(ip + 2) + word_at(ip + 4)));
                id++;
            } else {
                put_word(ip + 4, l4_length);
            }
            if (tcp) {
                uint32_t number = htonl(sequence);

                memcpy(l4 + 4, &number, sizeof number);
                sequence += segment;
                if (at + segment < length)
                    l4[13] &= (uint8_t)~0x09; /* FIN, PSH */
                sum += (uint64_t)number + word_at(l4 + 12);
            } else {
                put_word(l4 + 4, l4_length);
                sum += l4_length;
            }
            uint16_t found = (uint16_t)~folded(sum);
            put_word(l4 + checksum_at, found || tcp ? found : 0xFFFF);
            *bytes += whole;
            cursor += (whole + 7) & ~7u;
            frames++;
        }
    }
}
