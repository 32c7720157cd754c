/* Receiving: fill, classify, make a batch, and wait.
 *
 * The report, in front of the descriptors, says how far a receive has come, whatever interrupts it: `count` frames are not
 * classified yet, or `classified` is set and they are not in a batch yet, or `error` has an errno. Each step goes on where the
 * last one ended. Nothing is received before all of this is handled. With `latency`, `held_back` frames wait for more to come:
 * see hold.c.
 *
 * Rare work is in Python. The receiver calls these methods of its subclass, linkrx/receiving/reception.py:
 *   _fill(arena, room)   fill with a mechanism that is written in Python; returns the number of packets
 *   _without_hangup(n)   the last of n packets is empty, which may be the end; returns how many are packets
 *   _handle_error()      an errno waits in the header
 *   _over()              whether a stop, or an end that follows what was received, is due now
 *   _look_at_link()      the link was down when nothing was received
 *   _look_at_drops()     compare the kernel's counters; returns the seconds until the next look
 *   _look_at_owner()     nothing came for a second, or for the whole timeout
 *   _pause_source()      an event loop found the source readable many times in a row, and reads found nothing
 *   _resume_source()     the source was taken out of the poll set
 *   _disarm()            the caller that polls has seen the end
 *   _flush_limits()      stop(flush=True) was called; returns how many packets may wait in the source, and the seconds after
 *                        which the last of them can be read
 *   _sleep_until_flushed(seconds) an event loop polls while a flush waits; returns whether a timer makes the descriptor readable
 * and, from receiver.c:
 *   _refuse(same_thread) the receiver is claimed or closed: raises
 *   _last_left()         no call is inside any more
 *   _without_deliver()   there is no `deliver`: raises
 *   _raise_ended()       recv() after the end: raises
 *
 * Signals. A Python signal handler can run in PyErr_CheckSignals(), in `deliver`, and in Python code that an allocation or
 * Py_DECREF() starts; nowhere else. It can raise there, stop, close, or call the dispatcher again. So at each of these points:
 *
 * - The state is consistent. The result of a step is stored before its input is given up: the report before the batch, the
 *   position before the call of `deliver`. An exception then neither loses nor repeats a packet in dispatch(), run(), drain() and
 *   next(). recv() can lose the packet that CPython is returning.
 * - The claim is held. A nested dispatch() raises Busy, and a nested close() takes effect when the receiving call returns.
 * - A signal that comes between the last check and a wait does not interrupt the wait. So a wait is cut into slices of a second.
 *
 * A read never blocks. A fill holds the GIL for the first few packets, because a thread that releases it beside a busy thread
 * gets it back after 5 ms. A fill of many packets releases the GIL for the rest. */
#define _GNU_SOURCE
#include "hold.h"
#include "../forbidden.inc"

#include <errno.h>
#include <math.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>

/* Errors in a row after which the caller looks at the clock again. */
#define ERRORS_IN_A_ROW 8
/* Wakes in a row after which reads found nothing. From then on the source is read every PAUSE seconds only. */
#define IDLE_WAKES 8
#define PAUSE 0.01
/* Seconds until a signal is seen that came between the last check and the wait. */
#define SLICE 1.0
/* The longest wait while a link is down, so that a deletion is noticed even if the kernel refuses to set the timer. */
#define LOOK 0.04
#define SECOND 1000000000LL
/* CPython's switch interval in nanoseconds: sys.getswitchinterval(). */
#define TURN 5000000

double lrx_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int lrx_ask(Receiver *r, const char *word)
{
    PyObject *answer = PyObject_CallMethod((PyObject *)r, word, NULL);
    int truth = answer ? PyObject_IsTrue(answer) : -1;

    Py_XDECREF(answer);
    return truth;
}

int64_t lrx_coarse_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

void lrx_let_others_run(Receiver *r)
{
    const int64_t now = lrx_coarse_now();

    if (now - r->others_ran < TURN)
        return;
    r->others_ran = now;
    Py_BEGIN_ALLOW_THREADS
    Py_END_ALLOW_THREADS
}

/* Receive once, without waiting. READY: frames were received, even if none is a packet. */
static enum outcome receive(Receiver *r, bool all)
{
    struct lrx_report *report = report_of(r);

    for (int errors = 0; errors < ERRORS_IN_A_ROW; errors++) {
        const int count = lrx_obtain(r, all);

        if (count < 0)
            return FAILED;
        if (!r->arenas[r->current]) /* a handler has forked, and this is the child, which has closed it */
            return NOTHING;
        if (!report->classified && lrx_held_back(r)) {
            lrx_collect(r, (uint32_t)count);
            lrx_classify_collected(r);
        } else if (!report->classified && count) {
            const uintptr_t region = (uintptr_t)r->arenas[r->current]->memory + ARENA_START;

            lrx_classify(&r->classifier, region, (uint32_t)count, lrx_table_memory(r->spare->table));
        }
        if (report->classified)
            return lrx_take_in(r) == FAILED ? FAILED : READY;
        if (r->end_follows) /* nothing came before the end */
            return NOTHING;
        if (r->was_down && !report->error) {
            r->was_down = false;
            report->error = ENETDOWN;
        }
        if (!report->error)
            return NOTHING;
        if (lrx_ask(r, "_handle_error") < 0)
            return FAILED;
        if (r->ended || r->closed)
            return NOTHING;
    }
    return NOTHING;
}

static int look_at_drops(Receiver *r)
{
    const int64_t now = lrx_coarse_now();
    PyObject *answer;
    double seconds;

    if (now < r->drops_due)
        return 0;
    answer = PyObject_CallMethod((PyObject *)r, "_look_at_drops", NULL);
    seconds = answer ? PyFloat_AsDouble(answer) : -1;
    Py_XDECREF(answer);
    if (PyErr_Occurred())
        return -1;
    r->drops_due = now + (int64_t)(seconds * 1e9);
    return 0;
}

static void raise_refused(const char *call, int error)
{
    PyObject *what = PyUnicode_FromFormat("%s, on which linkrx sleeps: %s. A seccomp filter may refuse it: have it allow that",
                                          call, strerror(error));
    PyObject *arguments = what ? Py_BuildValue("iN", error, what) : NULL;

    if (arguments)
        PyErr_SetObject(PyExc_OSError, arguments);
    Py_XDECREF(arguments);
}

/* Wait until a descriptor is ready, for `seconds` at most. Returns how many are, or -1 with an exception of a signal handler. */
static int sleep_on(struct pollfd *fds, nfds_t count, double seconds)
{
    struct timespec t = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    int ready, error;

    Py_BEGIN_ALLOW_THREADS
    ready = ppoll(fds, count, &t, NULL);
    error = errno;
    Py_END_ALLOW_THREADS
    if (PyErr_CheckSignals() < 0)
        return -1;
    if (ready < 0 && error != EINTR) {
        raise_refused("ppoll(2)", error);
        return -1;
    }
    return ready < 0 ? 0 : ready;
}

int lrx_sleep_on_event(const Receiver *r, double seconds)
{
    struct pollfd event = {.fd = r->event, .events = POLLIN};

    return sleep_on(&event, 1, seconds);
}

int lrx_wait(Receiver *r, double seconds)
{
    struct epoll_event events[4];
    int count, error, readable = 0;
    const double most = r->link_down ? LOOK : SLICE;
    const int milliseconds = seconds < most ? (int)(seconds * 1000 + 0.999) : (int)(most * 1000);

    Py_BEGIN_ALLOW_THREADS
    count = epoll_wait(r->epoll, events, 4, milliseconds);
    error = errno;
    Py_END_ALLOW_THREADS
    if (count < 0 && PyErr_CheckSignals() < 0) /* else the caller does so next */
        return -1;
    if (count < 0 && is_forbidden(error)) { /* of a seccomp filter that came later */
        struct pollfd fds[] = {{.fd = r->source, .events = POLLIN}, {.fd = r->event, .events = POLLIN}};

        count = sleep_on(fds, 2, seconds < most ? seconds : most);
        return count <= 0 ? count : fds[0].revents ? 1 : 2;
    }
    if (count < 0 && error != EINTR) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    for (int k = 0; k < count; k++)
        readable |= events[k].data.fd == r->source;
    return readable ? 1 : count > 0 ? 2 : 0;
}

/* Learn whether to read before waiting: the more reads found nothing, the more calls wait at once. */
static bool read_first(Receiver *r, double timeout)
{
    const struct lrx_report *report = report_of(r);

    if (timeout == 0 || r->reads_memory || report->count || report->classified || report->error || report->held ||
        report->held_back || r->link_down)
        return true;
    if (!r->eager_wait)
        return true;
    r->eager_wait--;
    return false;
}

static void learn_to_wait(Receiver *r, bool in_vain)
{
    r->eager_hold = !in_vain ? 0 : r->eager_hold * 2 + 1 < MOST_HOLD ? r->eager_hold * 2 + 1 : MOST_HOLD;
    r->eager_wait = r->eager_hold;
}

/* The number of frames received so far, packets or not. */
static uint64_t received(const Receiver *r)
{
    const uint64_t *counters = r->counters.buf;

    return counters[LRX_PACKETS] + counters[LRX_RUNTS] + counters[LRX_EMPTY] + counters[LRX_UNKNOWN_PROTOCOL] +
           counters[LRX_COUNT_MALFORMED] + counters[LRX_FILTERED];
}

static int begin_flush(Receiver *r)
{
    PyObject *answer = PyObject_CallMethod((PyObject *)r, "_flush_limits", NULL);
    unsigned long long most;
    double seconds;

    if (!answer || !PyArg_ParseTuple(answer, "Kd", &most, &seconds)) {
        Py_XDECREF(answer);
        return -1;
    }
    Py_DECREF(answer);
    r->flush_received = received(r) + most;
    r->flush_until = lrx_now() + seconds;
    r->flush_begun = true;
    return 0;
}

/* Make a polled descriptor unreadable until the last packet of a flush can be read. */
static enum outcome sleep_until_flushed(Receiver *r, double seconds)
{
    PyObject *answer = PyObject_CallMethod((PyObject *)r, "_sleep_until_flushed", "d", seconds);
    const int sleeps = answer ? PyObject_IsTrue(answer) : -1;

    Py_XDECREF(answer);
    r->flush_waits = sleeps > 0;
    return sleeps < 0 ? FAILED : NOTHING;
}

/* During a flush the event is set, so only the source is polled. A stop() that does not flush ends this. */
static int wait_for_source(Receiver *r, double seconds)
{
    struct pollfd source = {.fd = r->source, .events = POLLIN};

    return sleep_on(&source, 1, seconds < PAUSE ? seconds : PAUSE);
}

/* With a timeout of 0 it receives again if all frames were skipped, up to as many frames as a batch has rows. */
enum outcome lrx_await(Receiver *r, double timeout, bool all)
{
    const double deadline = timeout > 0 ? lrx_now() + timeout : 0;
    const uint64_t before = timeout == 0 ? received(r) : 0;
    bool reads = r->pending || read_first(r, timeout), first = true, resumed = false, held_back = false;
    unsigned idle = 0;

    r->flush_waits = false;
    for (;;) {
        double left = SLICE, looked = 0;
        int happened;

        if (r->source_paused && lrx_ask(r, "_resume_source") < 0)
            return FAILED;
        if (PyErr_CheckSignals() < 0) /* under load there is no wait, and `deliver` may be written in C */
            return FAILED;
        if (r->ended)
            return OVER;
        if (r->stopping || r->end_follows) {
            const int over = lrx_ask(r, "_over");

            if (over)
                return over < 0 ? FAILED : OVER;
        }
        if (r->exchanging && lrx_exchange_filter(r) < 0)
            return FAILED;
        if (r->pending)
            return READY;
        if (r->flushing) {
            if (!r->flush_begun && begin_flush(r) < 0)
                return FAILED;
            if (received(r) >= r->flush_received) {
                r->stopping = true;
                continue;
            }
            reads = all = true;
            looked = lrx_now();
        }
        if (reads) {
            const bool known_down = r->link_down && !report_of(r)->error;

            switch (receive(r, all || held_back)) { /* all that came during the latency */
            case FAILED:
                return FAILED;
            case READY:
                r->spurious = 0;
                if (first || (held_back && lrx_was_full(r))) /* what is left in the queue was held back too */
                    learn_to_wait(r, false);
                if (report_of(r)->rows > 1 && look_at_drops(r) < 0) /* a packet that came alone had room */
                    return FAILED;
                if (r->pending || (timeout == 0 && received(r) - before < r->rows))
                    continue; /* a packet may follow the skipped frames */
                return NOTHING;
            default:
                break;
            }
            if (known_down && lrx_ask(r, "_look_at_link") < 0) /* only if it was down before: ENETDOWN comes before queued packets */
                return FAILED;
            if (looked && looked >= r->flush_until) /* it was empty once */
                r->stopping = true;
            if (r->ended || r->stopping || r->end_follows)
                continue;
            if (timeout == 0) {
                if (looked && (r->polled || r->looped))
                    return sleep_until_flushed(r, r->flush_until - looked);
                if ((r->polled || r->looped) && ++r->spurious > IDLE_WAKES && lrx_ask(r, "_pause_source") < 0)
                    return FAILED;
                return NOTHING;
            }
            if (first)
                learn_to_wait(r, true);
        }
        if (timeout > 0) {
            left = deadline - lrx_now();
            if (left <= 0) {
                if (reads)
                    return NOTHING;
                reads = true; /* the time was up before the first read */
                continue;
            }
        }
        if (look_at_drops(r) < 0)
            return FAILED;
        first = false;
        if (r->readable) /* nothing waits here now: the event must not end this wait at once */
            lrx_set_readable(r);
        r->waits += !resumed; /* after a signal, or a slice, it is the same wait */
        if (looked)
            happened = wait_for_source(r, left < r->flush_until - looked ? left : r->flush_until - looked) < 0 ? -1 : 0;
        else if (idle < IDLE_WAKES)
            happened = lrx_wait(r, left);
        else
            happened = lrx_sleep_on_event(r, left < PAUSE ? left : PAUSE) < 0 ? -1 : 0;
        held_back = happened == 1 && r->latency > 0;
        if (held_back && lrx_hold_back(r, timeout > 0 ? deadline : INFINITY) < 0)
            happened = -1;
        if (happened < 0 || (happened == 0 && !looked && idle < IDLE_WAKES && lrx_ask(r, "_look_at_owner") < 0))
            return FAILED;
        idle += happened == 1;
        resumed = happened == 0 && idle < IDLE_WAKES;
        reads = true;
    }
}
