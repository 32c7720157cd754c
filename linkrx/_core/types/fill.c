/* Filling an arena, checking what a mechanism in Python reports, and making a batch of the frames. */
#include "hold.h"

/* The arena to fill next. If no packet is held, one arena is enough and stays in the cache. While the last batch is held, as by
 * a loop variable, two arenas take turns. */
static Owner *arena_of(Receiver *r)
{
    Owner *o = r->arenas[r->current];

    if (r->filling)
        return o;
    lrx_reset_packets(r);
    if (!o || !lrx_owner_is_free(o)) {
        const unsigned other = o ? !r->current : r->current;

        o = r->arenas[other];
        if (o) {
            const enum taken taken = lrx_owner_take_back(o);

            if (taken == TAKEN_NOT)
                return NULL;
            if (taken == GIVEN_AWAY)
                Py_CLEAR(r->arenas[other]);
        }
        if (!r->arenas[other])
            r->arenas[other] = lrx_owner_new(r->state, r->arena_size);
        o = r->arenas[other];
        if (!o)
            return NULL;
        r->current = other;
    }
    r->filling = true;
    return o;
}

static int take_back(Receiver *r, uint32_t slot)
{
    if (lrx_owner_take_back(r->slots[slot]) == TAKEN_NOT)
        return -1;
    r->mechanism->release(r->mechanism->state, slot);
    return 0;
}

int lrx_copy_slots(Receiver *r)
{
    for (int slot = 0; slot < 2; slot++)
        if (r->slots[slot] && lrx_owner_take_back(r->slots[slot]) == TAKEN_NOT)
            return -1;
    return 0;
}

/* Learn how many packets to read at once for a caller that takes them one by one, because a read that finds nothing costs as much as
 * one that finds a packet. If a fill got as many as it asked for, the next may ask for twice as many. If it got fewer, the next
 * asks for that number. Each failed attempt doubles the number of fills until the next attempt. So a packet that comes alone
 * costs one read, and a queue that fills up is noticed within 31 packets. */
static void learn(Receiver *r, uint32_t asked, uint32_t got)
{
    if (got < asked) {
        r->most = got;
        r->grow_hold = r->grow_hold * 2 + 1 < MOST_HOLD ? r->grow_hold * 2 + 1 : MOST_HOLD;
        r->grow_wait = r->grow_hold;
    } else if (r->grow_wait) {
        r->grow_wait--;
    } else {
        if (asked > 1)
            r->grow_hold = 0;
        r->most = asked < r->rows / 2 ? 2 * asked : r->rows;
    }
}

static void release_gil(void *thread)
{
    PyThreadState **saved = thread;

    if (!*saved)
        *saved = PyEval_SaveThread();
}

/* The offset of the next frame from the first one: those that are held back come before it. */
static uint32_t offset_of(const Receiver *r)
{
    return r->collected ? r->collected->end : 0;
}

static int call_fill_function(Receiver *r, const Owner *arena, uint32_t asked, uint32_t offset)
{
    struct lrx_mechanism *m = r->mechanism;
    const uintptr_t descriptors = (uintptr_t)r->descriptors.buf;
    PyThreadState *saved = NULL;
    struct lrx_report *report = report_of(r);
    int count;

    report->most = asked;
    report->release_gil = release_gil;
    report->release_gil_argument = &saved;
    count = m->fill(m->state, descriptors, r->rows, (uintptr_t)arena->memory + ARENA_START + offset, r->room - offset);
    report->release_gil = NULL;
    report->release_gil_argument = NULL;
    if (saved)
        PyEval_RestoreThread(saved);
    return count < 0 ? 0 : count; /* the report has the errno */
}

/* At most two batches are in the mechanism's memory. A fill takes the older one back first. If it then finds nothing, the caller
 * is about to wait, and both are taken back: poll(2) on a packet socket looks at the newest closed block of a ring only, and
 * reports it as readable until that block is released. */
static int fill_in_place(Receiver *r, const Owner *arena)
{
    const struct lrx_slots *slots = r->mechanism->slots;
    const uint32_t last = slots->turn ^ 1;
    int count;

    if (take_back(r, slots->turn) < 0 || (lrx_owner_is_free(r->slots[last]) && take_back(r, last) < 0))
        return -1;
    count = call_fill_function(r, arena, r->rows, 0); /* makes no system call */
    if (!count && slots->unreleased[last] && take_back(r, last) < 0)
        return -1;
    return count;
}

static int call_fill_method(Receiver *r, Owner *arena, uint32_t asked, uint32_t offset)
{
    PyObject *answer;
    long count;

    report_of(r)->most = asked;
    arena->cursor = ARENA_START + offset;
    answer = PyObject_CallMethod((PyObject *)r, "_fill", "OI", arena, r->room - offset);
    count = answer ? PyLong_AsLong(answer) : -1;
    Py_XDECREF(answer);
    if (!PyErr_Occurred() && (count < 0 || count > (long)r->rows)) {
        PyErr_Format(PyExc_ValueError, "the backend reports %ld packets, and has %u descriptors", count, r->rows);
        return -1;
    }
    return (int)count;
}

/* Fill once, without waiting. Returns the number of frames, or -1 with an exception. */
static int fill(Receiver *r, bool all)
{
    const uint32_t held_back = lrx_held_back(r), offset = offset_of(r);
    Owner *arena = arena_of(r);
    uint32_t asked;
    int count;

    /* Packets that the mechanism holds cost no system call. And the empty records at the end of a stream are recognised only when
     * all of them are there. */
    all = all || report_of(r)->held || held_back;
    asked = all ? r->rows - held_back : r->most;
    if (!arena)
        return -1;
    if (r->mechanism && r->mechanism->slots)
        return fill_in_place(r, arena);
    count = r->mechanism ? call_fill_function(r, arena, asked, offset) : call_fill_method(r, arena, asked, offset);
    if (!all && count > 0)
        learn(r, asked, (uint32_t)count);
    return count;
}

static int without_hangup(Receiver *r, int count)
{
    const struct lrx_columns columns = lrx_descriptors_at((uintptr_t)r->descriptors.buf, r->rows);
    PyObject *answer;
    long left;

    if (!r->may_hang_up || columns.lengths[count - 1])
        return count;
    answer = PyObject_CallMethod((PyObject *)r, "_without_hangup", "i", count);
    left = answer ? PyLong_AsLong(answer) : -1;
    Py_XDECREF(answer);
    if ((left < 0 || left > count) && !PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "_without_hangup() gives %ld of %d packets", left, count);
    return PyErr_Occurred() ? -1 : (int)left;
}

/* Check the report of a mechanism in Python before the frames are read. */
static int check_reported(const Receiver *r, uint32_t count)
{
    const struct lrx_columns columns = lrx_descriptors_at((uintptr_t)r->descriptors.buf, r->rows);
    const uint32_t end = report_of(r)->end, room = r->room - offset_of(r);

    if (end > room || end % 8) {
        PyErr_Format(PyExc_ValueError, "the backend reports %u packets that end at byte %u, and was given %u", count, end, room);
        return -1;
    }
    for (uint32_t k = 0; k < count; k++) {
        const uint32_t start = columns.starts[k], length = columns.lengths[k];

        if (length && !(columns.flags[k] & LRX_MALFORMED) && (length > end || start > end - length)) {
            PyErr_Format(PyExc_ValueError, "the backend reports packet %u at %u, %u bytes long, in %u bytes of memory", k, start,
                         length, end);
            return -1;
        }
    }
    return 0;
}

/* Have a table for the packets of the next fill, or of frames that wait here. */
static int prepare_table(Receiver *r)
{
    if (!r->spare)
        r->spare = lrx_batch_new(r->state, r->table_rows, r->framing);
    if (!r->spare)
        return -1;
    report_of(r)->table = lrx_table_memory(r->spare->table);
    return 0;
}

int lrx_obtain(Receiver *r, bool all)
{
    const struct lrx_report *report = report_of(r);
    const bool enough = lrx_held_back(r) && lrx_holds_full(r);
    int count;

    if (report->count > r->rows) {
        PyErr_Format(PyExc_ValueError, "the backend reports %u packets, and has %u descriptors", report->count, r->rows);
        return -1;
    }
    if (prepare_table(r) < 0)
        return -1;
    count = (int)report->count;
    if (!count && !report->classified && !enough && (!report->error || report->held)) {
        const bool ends = r->filter_until && lrx_now() >= r->filter_until;

        count = fill(r, all);
        if (ends && !count && !report->classified && !report->error && !report->held && !lrx_held_back(r))
            lrx_end_filter(r);
    }
    /* Without arena: a handler has forked, and this is the child, which has closed it. */
    if (count <= 0 || report->classified || !r->arenas[r->current])
        return count;
    count = without_hangup(r, count);
    return count > 0 && r->arenas[r->current] && check_reported(r, (uint32_t)count) < 0 ? -1 : count;
}

bool lrx_was_full(const Receiver *r)
{
    return report_of(r)->rows >= r->rows || report_of(r)->end > r->hold_most;
}

/* Make a batch of the classified frames. */
enum outcome lrx_take_in(Receiver *r)
{
    struct lrx_report *report = report_of(r);
    Owner *owner = r->arenas[r->current];
    const uint32_t count = report->classified - 1, end = report->end, rows = report->rows;

    if (!owner || !r->spare || count > rows || rows > r->table_rows || ARENA_START + (uint64_t)end > r->arena_size) {
        PyErr_Format(PyExc_ValueError, "the backend reports %u packets that end at byte %u, and has room for %u in %u bytes", rows, end,
                     r->table_rows, r->room);
        return FAILED;
    }
    if (count) {
        const uint8_t *base = owner->memory + ARENA_START;
        uint32_t size = end;

        if (r->mechanism && r->mechanism->slots) {
            const uint32_t slot = r->mechanism->slots->turn ^ 1;

            owner = r->slots[slot];
            base = (const uint8_t *)r->mechanism->slots->frames[slot];
            size = UINT32_MAX;
        }
        if (lrx_batch_begin(r->spare, owner, base, size, rows, count) < 0)
            return FAILED;
        r->pending = r->spare;
        r->spare = NULL;
    }
    r->next = 0;
    r->batches++;
    r->receives += report->receives;
    r->filling = false;
    report->classified = 0;
    return count ? READY : NOTHING;
}
