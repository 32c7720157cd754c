/* Holding packets back for `latency`, so that several are delivered together.
 *
 * They are not left in the queue, which could overflow. Once the source is readable, the receiver sleeps for HOLD, reads what has
 * come, and so on, until the latency is over or the batch is full. It reads until it finds nothing, because one fill may leave
 * packets in the queue: recvmmsg needs memory for 64 of the largest. A sleep is on the event alone, so a busy source causes one
 * wake-up per HOLD. If a read finds nothing, the receiver waits on the source too, so a quiet source causes none. The last HOLD of
 * the latency is one sleep, and the caller reads afterwards. So a latency of HOLD or less costs one sleep and one read.
 *
 * A mechanism does not know about this. It fills the memory behind the frames that are held back, and describes its frames in the
 * same table as always, whose rows it may rely on. The rows are collected in `collected`, a table with a report of its own:
 * `count` frames, which use `end` bytes of the region and took `receives` system calls. The report of the mechanism says how many
 * frames these are, in `held_back`. They are classified when they are handed over, so a filter that is set meanwhile applies: with
 * `latency`, no fill classifies.
 *
 * An exception of a signal handler leaves them there, and the next call delivers them at once. If it interrupts a fill in Python,
 * the mechanism may hold packets that it has read: the next fill is at the same place, and comes before they are handed over. */
#include "hold.h"

#include <string.h>

/* Seconds between two reads. The queue of a TAP device has 1000 frames by default: so many come in this time at a million
 * packets per second. */
#define HOLD 0.001

/* A mechanism that ignores `most` may report as many frames as the table has rows, behind others. */
static uint32_t rows_of(const Receiver *r)
{
    return 2 * r->rows;
}

int lrx_prepare_holding(Receiver *r)
{
    r->table_rows = rows_of(r);
    r->collected = PyMem_Calloc(1, sizeof(struct lrx_report) + (size_t)rows_of(r) * LRX_ROW_BYTES);
    if (!r->collected)
        PyErr_NoMemory();
    return r->collected ? 0 : -1;
}

bool lrx_holds_full(const Receiver *r)
{
    return r->collected->count >= r->rows || r->collected->end > r->hold_most;
}

#define COPY(column) memcpy(to.column + at, from.column, count * sizeof *to.column)

void lrx_collect(Receiver *r, uint32_t count)
{
    const struct lrx_columns from = lrx_descriptors_at((uintptr_t)r->descriptors.buf, r->rows);
    const struct lrx_columns to = lrx_descriptors_at((uintptr_t)r->collected, rows_of(r));
    const uint32_t at = r->collected->count;
    struct lrx_report *report = report_of(r);

    if (!count)
        return;
    COPY(timestamps);
    COPY(addresses);
    COPY(lengths);
    COPY(wire_lengths);
    COPY(interfaces);
    COPY(file_types);
    COPY(protocols);
    COPY(flags);
    COPY(vlan_tcis);
    COPY(vlan_tpids);
    COPY(link_types);
    COPY(address_lengths);
    COPY(link_headers);
    for (uint32_t k = 0; k < count; k++)
        to.starts[at + k] = from.starts[k] + r->collected->end;
    r->collected->count += count;
    r->collected->end += report->end;
    r->collected->receives += report->receives;
    report->held_back = r->collected->count;
    report->count = 0;
}

void lrx_classify_collected(Receiver *r)
{
    const uintptr_t region = (uintptr_t)r->arenas[r->current]->memory + ARENA_START;
    struct lrx_classifier classifier = r->classifier;
    struct lrx_report *report = report_of(r), *collected = r->collected;

    classifier.descriptors = (uintptr_t)collected;
    classifier.rows = rows_of(r);
    lrx_classify(&classifier, region, collected->count, lrx_table_memory(r->spare->table));
    report->classified = collected->classified;
    report->rows = collected->rows;
    report->end = collected->end;
    report->receives = collected->receives;
    report->held_back = 0;
    memset(collected, 0, sizeof *collected);
}

/* Whether the caller is to end. */
static bool is_to_end(const Receiver *r)
{
    return r->stopping || r->flushing || r->ended || r->closed || r->end_follows;
}

enum outcome lrx_hold_more(Receiver *r)
{
    const struct lrx_report *report = report_of(r);
    const uint32_t before = lrx_held_back(r);
    int count;

    do {
        if (is_to_end(r) || r->latency == 0 || r->pending || report->classified)
            return OVER;
        count = lrx_obtain(r, true);
        if (count < 0)
            return FAILED;
        lrx_collect(r, (uint32_t)count);
        if (!lrx_held_back(r) || lrx_holds_full(r) || report->error || report->held || is_to_end(r))
            return OVER;
    } while (count);
    return lrx_held_back(r) > before ? READY : NOTHING;
}

int lrx_hold_back(Receiver *r, double deadline)
{
    const double later = lrx_now() + r->latency, until = later < deadline ? later : deadline;
    enum outcome outcome;

    while (!is_to_end(r)) {
        double left = until - lrx_now();
        int happened = left > 0 ? lrx_sleep_on_event(r, left < HOLD ? left : HOLD) : 1;

        if (happened)
            return happened < 0 ? -1 : 0;
        if (left <= HOLD)
            continue; /* a signal may have ended the sleep */
        outcome = lrx_hold_more(r);
        if (outcome == FAILED || outcome == OVER)
            return outcome == FAILED ? -1 : 0;
        left = until - lrx_now() - HOLD;
        if (outcome == NOTHING && left > 0) {
            happened = lrx_wait(r, left);
            if (happened < 0 || (happened == 0 && lrx_ask(r, "_look_at_owner") < 0))
                return -1;
            if (happened == 2)
                return 0;
        }
    }
    return 0;
}
