/* Fuzzes the splitter: whatever was taken, what is given is the whole of it, once, in frames whose checksums hold. */
#include "fuzz.h"

#include <segment.c>

#define ROWS_MOST 3
#define GIVEN_MOST 16
#define CALLS_MOST 300000

struct row {
    uint8_t *data;
    uint32_t length, wire, flags, sound; /* sound: built by the rules, and nothing was changed */
};

/* A frame and what its virtio-net header says, read one byte at a time. */
struct seen {
    const uint8_t *frame;
    uint32_t length, flags, kind, size, csum_start, csum_offset;
    uint32_t network, transport, payload, version, tcp, jumbo;
};

static uint32_t byte(const struct seen *s, uint32_t at)
{
    return at < s->length ? s->frame[at] : 0x1000; /* no byte: it equals none, and is out of any range */
}

static uint32_t pair(const struct seen *s, uint32_t at)
{
    return byte(s, at) * 256 + byte(s, at + 1);
}

/* RFC 1071, a byte at a time; `from` counts as even. */
static uint32_t slow_sum(uint32_t sum, const uint8_t *at, uint32_t from, uint32_t to)
{
    for (uint32_t i = from; i < to; i++) {
        sum += (i - from) % 2 ? at[i] : at[i] * 256u;
        sum = sum % 65536 + sum / 65536;
    }
    return sum;
}

static uint32_t plus(uint32_t sum, uint32_t number)
{
    sum += number % 65536 + number / 65536;
    sum = sum % 65536 + sum / 65536;
    return sum % 65536 + sum / 65536;
}

/* Whether it is a super-packet that can be split, with its headers found. */
static int splits(struct seen *s, uint32_t link_header)
{
    uint32_t at = 0, type, next;

    if (!s->size || s->length <= link_header)
        return 0;
    if (link_header) {
        for (at = 12; at < 20 && (pair(s, at) == 0x8100 || pair(s, at) == 0x88A8);)
            at += 4;
        type = pair(s, at);
        at += 2;
        s->version = type == 0x0800 ? 4 : type == 0x86DD ? 6 : 0;
    } else {
        s->version = byte(s, 0) / 16;
    }
    s->network = at;
    if ((s->version != 4 && s->version != 6) || byte(s, at) / 16 != s->version)
        return 0;
    if (at + (s->version == 4 ? 20 : 40) > s->length)
        return 0;
    s->jumbo = 0;
    if (s->version == 4) {
        if (pair(s, at + 6) & 0x3FFF || byte(s, at) % 16 < 5)
            return 0;
        next = byte(s, at + 9);
        at += byte(s, at) % 16 * 4;
    } else {
        next = byte(s, at + 6);
        s->jumbo = s->length - at > 65536 && !next && pair(s, at + 40) == 6 * 256 && byte(s, at + 42) == 194;
        for (at += 40; next == 0 || next == 43 || next == 60;) {
            if (at + 8 > s->length)
                return 0;
            next = byte(s, at);
            at += 8 + 8 * byte(s, at + 1);
        }
    }
    s->transport = at;
    s->tcp = next == 6;
    if (at + (s->tcp ? 20 : 8) > s->length || (next != 6 && next != 17))
        return 0;
    if (s->tcp) {
        if (byte(s, at + 12) / 16 < 5 || (s->kind | 0x80) != (s->version == 4 ? 0x81 : 0x84))
            return 0;
        at += byte(s, at + 12) / 16 * 4;
    } else {
        if (s->kind != 5 || s->flags % 2 == 0)
            return 0;
        at += 8;
    }
    s->payload = at;
    if (at > s->length)
        return 0;
    if (s->flags % 2 && (s->csum_start != s->transport || s->csum_offset != (s->tcp ? 16 : 6)))
        return 0;
    return s->length - at <= s->size || at - s->network + s->size <= 65535;
}

/* Segment k is what it must be: `out`, `length` bytes. */
static void check_segment(const struct seen *s, uint32_t k, const uint8_t *out, uint32_t length, int sound)
{
    uint32_t cut = s->jumbo ? 8 : 0, l4 = s->transport - cut, at = k * s->size;
    uint32_t rest = s->length - s->payload - at;
    uint32_t size = rest < s->size ? rest : s->size, place = l4 + (s->tcp ? 16 : 6), sum;
    const uint8_t *ip = out + s->network, *in = s->frame + s->transport;

    MUST(length == s->payload - cut + size);
    MUST(!memcmp(out + s->payload - cut, s->frame + s->payload + at, size));
    for (uint32_t i = 0; i < s->payload - cut; i++) {
        uint32_t n = i - s->network, m = i - l4, from = cut && i >= s->network + 40 ? i + cut : i;
        int differs = 0; /* checked below */

        if (i >= s->network && i < l4)
            differs = s->version == 4 ? (n >= 2 && n < 6) || n / 2 == 5 : n / 2 == 2 || (cut && n == 6);
        else if (i >= l4)
            differs = s->tcp ? (m >= 4 && m < 8) || m == 13 || m == 16 || m == 17 : m >= 4;
        MUST(differs || out[i] == s->frame[from]);
    }
    if (s->version == 4) {
        MUST(ip[2] * 256u + ip[3] == length - s->network);
        MUST((ip[4] * 256u + ip[5]) % 65536 == (pair(s, s->network + 4) + k) % 65536);
        MUST(slow_sum(0, ip, 0, l4 - s->network) == 0xFFFF);
    } else {
        MUST(ip[4] * 256u + ip[5] == length - s->network - 40);
        MUST(!cut || ip[6] == 6);
    }
    /* The sum that the sender left, less the length of the whole, more this one's. */
    sum = pair(s, s->transport + (s->tcp ? 16 : 6));
    sum = plus(sum, 65535 - plus(0, s->tcp ? s->length - s->transport : pair(s, s->transport + 4)));
    if (s->flags % 2 == 0 || sound) {
        sum = s->version == 4 ? slow_sum(0, ip, 12, 20) : slow_sum(0, ip, 8, 40);
        sum = plus(sum, s->tcp ? 6 : 17);
    }
    sum = plus(plus(sum, length - l4), slow_sum(slow_sum(0, out, l4, place), out, place + 2, length));
    sum = 65535 - sum;
    MUST(out[place] * 256u + out[place + 1] == (sum || s->tcp ? sum : 0xFFFF));
    if (s->tcp) {
        uint32_t last = at + size == s->length - s->payload;
        uint32_t number = ((uint32_t)in[4] << 24 | in[5] << 16 | in[6] << 8 | in[7]) + at;
        uint8_t flags = in[13];

        if (k)
            flags &= 0x7F;
        if (!last)
            flags &= 0xF6;
        MUST(out[l4 + 13] == flags);
        for (int i = 0; i < 4; i++)
            MUST(out[l4 + 4 + i] == (uint8_t)(number >> (24 - 8 * i)));
    } else {
        MUST(out[l4 + 4] * 256u + out[l4 + 5] == length - l4);
    }
}

struct framing {
    uint32_t packet_info, vnet, link_header, swapped;
};

static uint16_t number_at(const uint8_t *at, uint32_t swapped)
{
    uint16_t number;

    memcpy(&number, at, 2);
    return swapped ? (uint16_t)(number << 8 | number >> 8) : number;
}

/* Frame k of a row is what it must be. 1 when the row has no further one. */
static int check(const struct row *r, const struct framing *f, uint32_t k, const uint8_t *out, uint32_t length,
                 uint32_t wire, uint32_t flags)
{
    uint32_t prefix = f->packet_info + f->vnet;
    const uint8_t *vnet = r->data + f->packet_info;
    struct seen s = {r->data + prefix, r->length - prefix, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    int cut = r->flags % 2, asks, split;

    if (r->length <= prefix) {
        MUST(length == r->length && wire == r->wire && flags == r->flags);
        MUST(!length || !memcmp(out, r->data, length));
        return 1;
    }
    if (f->packet_info && number_at(r->data, 0) % 2)
        cut = 1;
    if (r->wire > r->length)
        cut = 1;
    s.flags = vnet[0];
    s.kind = vnet[1];
    s.size = number_at(vnet + 4, f->swapped);
    s.csum_start = number_at(vnet + 6, f->swapped);
    s.csum_offset = number_at(vnet + 8, f->swapped);
    asks = s.flags % 2 && !cut;
    split = s.kind && !cut && splits(&s, f->link_header);
    MUST(!r->sound || split || !s.kind);
    if (s.kind ? !split : asks && s.csum_start + s.csum_offset + 2 > s.length) {
        MUST(!length && !wire && flags == (r->flags | LRX_MALFORMED | (uint32_t)cut));
        return 1;
    }
    MUST(length > prefix && (!f->packet_info || !memcmp(out, r->data, 4)));
    if (split && s.length - s.payload > s.size) {
        MUST(!wire && flags == (r->flags & ~(uint32_t)LRX_CHECKSUM_UNFINISHED));
        for (uint32_t i = f->packet_info; i < prefix; i++)
            MUST(!out[i]);
        check_segment(&s, k, out + prefix, length - prefix, r->sound);
        return (uint64_t)s.size * (k + 1) >= s.length - s.payload;
    }
    MUST(length == r->length && wire == r->wire);
    for (uint32_t i = f->packet_info; i < prefix; i++)
        MUST(out[i] == ((asks || s.kind) && i < f->packet_info + 10 ? 0 : r->data[i]));
    MUST(flags == (asks ? r->flags & ~(uint32_t)LRX_CHECKSUM_UNFINISHED : r->flags));
    for (uint32_t i = 0; i < s.length; i++)
        MUST((asks && i - s.csum_start - s.csum_offset < 2) || out[prefix + i] == s.frame[i]);
    if (asks) {
        uint32_t place = s.csum_start + s.csum_offset, sum = 65535 - slow_sum(0, s.frame, s.csum_start, s.length);

        MUST(out[prefix + place] * 256u + out[prefix + place + 1] == (sum ? sum : 0xFFFF));
    }
    return 1;
}

static void put16(uint8_t *at, uint32_t number)
{
    at[0] = (uint8_t)(number >> 8);
    at[1] = (uint8_t)number;
}

/* Headers by the rules, of a frame of `length` bytes; how long they are. With a length of 0 only that is found. */
static uint32_t write_headers(struct input *in, uint8_t *h, uint32_t length, uint32_t link_header, uint8_t *vnet)
{
    uint32_t at = 0, tcp = take(in, 1), four = take(in, 1), tags = take(in, 2), extra = take(in, 3);
    uint32_t network, l4, sum;
    uint8_t protocol = tcp ? 6 : 17, *next;
    int ecn = tcp && take(in, 1);

    if (link_header) {
        at = 12;
        for (uint32_t k = 0; k < tags; k++, at += 4)
            put16(h + at, k ? 0x8100 : 0x88A8);
        put16(h + at, four ? 0x0800 : 0x86DD);
        at += 2;
    }
    network = at;
    if (four) {
        h[at] = (uint8_t)(0x45 + extra);
        put16(h + at + 6, 0x4000);
        put16(h + at + 4, 65535 - take(in, 3));
        next = h + at + 9;
        at += 20 + 4 * extra;
    } else {
        h[at] = 0x60;
        next = h + at + 6;
        at += 40;
        for (uint32_t k = 0; k < extra; k++) {
            *next = k ? 60 : 0;
            next = h + at;
            h[at + 1] = (uint8_t)(k % 2);
            at += 8 + 8 * (k % 2);
        }
        if (extra == 1 && take(in, 1))
            h[at - 6] = 194;
    }
    *next = protocol;
    l4 = at;
    at += 8;
    if (tcp) {
        uint32_t options = take(in, 10);

        h[l4 + 12] = (uint8_t)(0x50 + 16 * options);
        h[l4 + 13] = (uint8_t)take(in, 255);
        h[l4 + 4] = h[l4 + 5] = h[l4 + 6] = (uint8_t)(0 - take(in, 1));
        at += 12 + 4 * options;
    } else if (length >= at) {
        put16(h + l4 + 4, length - l4);
    }
    if (length < at)
        return at;
    sum = four ? slow_sum(0, h + network, 12, 20) : slow_sum(0, h + network, 8, 40);
    sum = plus(plus(sum, protocol), tcp ? length - l4 : (length - l4) % 65536);
    put16(h + l4 + (tcp ? 16 : 6), sum);
    vnet[0] = 1;
    vnet[1] = (uint8_t)((tcp ? four ? 1 : 4 : 5) + (ecn ? 0x80 : 0));
    put16(vnet + 6, l4);
    put16(vnet + 8, tcp ? 16 : 6);
    return at;
}

static void make_row(struct input *in, struct row *r, const struct framing *f, uint32_t number)
{
    uint8_t front[4096 + 4] = {0}, head[512] = {0}, *vnet = front + f->packet_info;
    uint32_t prefix = f->packet_info + f->vnet, kind = take(in, 15);
    uint32_t payload = take(in, 1) ? take(in, 40) : take(in, 3000);
    uint32_t headers, length, size = take(in, 1) ? take(in, 40) : take(in, 2000);

    if (kind == 15) { /* a large one */
        payload = 60000 + take(in, 10000);
        size += 500;
    }
    if (size && payload / size > 40)
        payload = 40 * size + 1; /* more of them show nothing new, and take long */
    for (uint32_t k = 0; k < sizeof head; k++)
        head[k] = (uint8_t)(k * 7 + number);
    memset(vnet, 0, 10);
    struct input again = *in;
    headers = write_headers(in, head, 0, f->link_header, vnet);
    length = headers + payload;
    /* Once more, now that the length is known. */
    write_headers(&again, head, length, f->link_header, vnet);
    *in = again;
    put16(vnet + 2, take(in, 0xFFFF));
    put16(vnet + 4, size);
    r->sound = size && size < 60000 && length < 65000;
    r->flags = take(in, 1) ? take(in, 31) : 0;
    if (f->packet_info)
        front[1] = 0;
    if (kind == 14) { /* to be finished only */
        vnet[1] = 0;
        if (take(in, 1)) { /* about the end */
            uint32_t start = take(in, length - 1);

            put16(vnet + 6, start);
            put16(vnet + 8, length - start - 4 + take(in, 4));
            r->sound = 0;
        }
    } else if (kind == 13) { /* nothing asked */
        memset(vnet, 0, 10);
        r->sound = 0;
    }
    for (uint32_t lies = kind < 8 ? 0 : take(in, 3); lies; lies--) {
        uint32_t where = take(in, 2);

        r->sound = 0;
        if (where == 0)
            vnet[take(in, 9)] = (uint8_t)take(in, 255);
        else if (where == 1)
            head[take(in, headers - 1)] = (uint8_t)take(in, 255);
        else if (f->packet_info)
            front[take(in, 3)] = (uint8_t)take(in, 255);
    }
    if (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? !f->swapped : f->swapped)
        for (uint32_t k = 2; k < 10; k += 2) {
            uint8_t first = vnet[k];
            vnet[k] = vnet[k + 1];
            vnet[k + 1] = first;
        }
    r->length = prefix + length;
    if (kind == 12) { /* cut somewhere */
        r->length = take(in, r->length);
        r->sound = 0;
    }
    r->wire = take(in, 7) ? 0 : r->length - 1 + take(in, 2);
    if (r->flags % 2 || r->wire > r->length)
        r->sound = 0;
    r->data = exactly(r->length);
    for (uint32_t i = 0; i < r->length; i++)
        r->data[i] = i < prefix ? front[i] : i - prefix < headers ? head[i - prefix] : content(number, i);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint32_t vnet_header_sizes[] = {10, 11, 12, 24};
    struct input in = {data, size};
    struct framing f = {take(&in, 1) * 4, vnet_header_sizes[take(&in, 3)], take(&in, 1) * 14, take(&in, 1)};
    uint32_t count = take(&in, ROWS_MOST), rows = count + 1, given_rows = 1 + take(&in, GIVEN_MOST - 1);
    struct row row[ROWS_MOST];
    uint8_t *taken = exactly(sizeof(struct lrx_report) + ROW_BYTES * rows);
    uint8_t *given = exactly(sizeof(struct lrx_report) + ROW_BYTES * given_rows);
    uint8_t *in_table = taken + sizeof(struct lrx_report), *out_table = given + sizeof(struct lrx_report);
    struct lrx_report made = {.count = count, .receives = count + 5, .error = take(&in, 200), .classified = 6, .rows = 7}, *report = &made;
    struct lrx_report shown, *header = &shown;
    static uint8_t untouched[80000];
    uint32_t largest = 8, receives = 0, now = 0, k = 0;

    for (uint32_t n = 0; n < count; n++) {
        make_row(&in, &row[n], &f, n);
        largest = row[n].length + 8 > largest ? row[n].length + 8 : largest;
        put(in_table, rows, n, LENGTH, row[n].length);
        put(in_table, rows, n, WIRE_LENGTH, row[n].wire);
        put(in_table, rows, n, FLAGS, row[n].flags);
        put(in_table, rows, n, TIMESTAMP, (uint64_t)n << 60 | 5);
        put(in_table, rows, n, VLAN_TCI, n + 77);
        put(in_table, rows, n, VLAN_TPID, n + 99);
    }
    memset(untouched, 0xA5, largest + 2000);
    memcpy(taken, report, sizeof *report);
    memset(given, 0, sizeof(struct lrx_report));
    struct lrx_segmenter s = {.taken = (uintptr_t)taken,
                              .taken_rows = rows,
                              .packet_info = f.packet_info,
                              .vnet = f.vnet,
                              .swapped = f.swapped,
                              .link_header = f.link_header,
                              .given = (uintptr_t)given,
                              .given_rows = given_rows};

    for (uint32_t calls = 0;; calls++) {
        uint32_t room = take(&in, 3) || !in.left ? largest + take(&in, 2000) : take(&in, largest), end = 0;
        uint32_t later = s.next < count ? s.next + 1 : count;
        uint8_t *region = exactly(room);
        int n;

        /* One row at a time is shown, in memory of exactly its size. */
        memcpy(header, taken, sizeof *header);
        header->count = later;
        header->error = later == count ? report->error : 0;
        memcpy(taken, header, sizeof *header);
        if (s.next < count)
            put(in_table, rows, s.next, START, 0);
        n = lrx_segment(&s, s.next < count ? (uintptr_t)row[s.next].data : 0, (uintptr_t)region, room);
        MUST(n >= 0 && (uint32_t)n <= given_rows);
        memcpy(header, given, sizeof *header);
        MUST(header->count == (uint32_t)n && header->end <= room);
        receives += header->receives;
        for (int i = 0; i < n; i++) {
            uint32_t start = (uint32_t)get(out_table, given_rows, (size_t)i, START);
            uint32_t length = (uint32_t)get(out_table, given_rows, (size_t)i, LENGTH);
            uint32_t wire = (uint32_t)get(out_table, given_rows, (size_t)i, WIRE_LENGTH);
            uint32_t flags = (uint32_t)get(out_table, given_rows, (size_t)i, FLAGS);

            MUST(start == end && length <= room - start);
            MUST(get(out_table, given_rows, (size_t)i, TIMESTAMP) == ((uint64_t)now << 60 | 5));
            MUST(get(out_table, given_rows, (size_t)i, VLAN_TCI) == now + 77);
            MUST(get(out_table, given_rows, (size_t)i, VLAN_TPID) == now + 99);
            int over = check(&row[now], &f, k++, region + start, length, wire, flags);
            for (end = start + length; end % 8; end++)
                MUST(end < room && region[end] == 0xA5);
            if (over) {
                now++;
                k = 0;
            }
        }
        MUST(end == header->end);
        MUST(end == room || !memcmp(region + end, untouched, room - end));
        free(region);
        memcpy(header, taken, sizeof *header);
        MUST(!header->receives);
        if (!header->count) { /* all that was shown is used up */
            MUST(s.next == 0 && s.done == 0 && now == later && k == 0);
            s.next = now;
        } else {
            MUST(header->count == later && s.next == now && s.done == k);
            MUST(n > 0 || room < largest);
        }
        if (now == count && !header->count)
            break;
        MUST(calls < CALLS_MOST);
    }
    memcpy(header, given, sizeof *header);
    MUST(receives == report->receives && header->error == report->error);
    for (uint32_t n = 0; n < count; n++)
        free(row[n].data);
    free(taken);
    free(given);
    return 0;
}
