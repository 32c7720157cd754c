/* The methods of the receiver: the claim, and the calls that receive. */
#include "hold.h"

#include <math.h>
#include <string.h>
#include <unistd.h>

/* The claim: one call at a time is inside. It is a flag that is set and cleared while the GIL is held. */

bool lrx_check_prepared(const Receiver *r)
{
    if (!r->prepared)
        PyErr_SetString(PyExc_ValueError, "this dispatcher was never opened: linkrx.open makes one");
    return r->prepared;
}

static bool enter(Receiver *r)
{
    if (r->prepared && !r->claimed && !r->closed && (!r->state->process || *r->state->process == r->process)) {
        r->claimed = true;
        r->thread = PyThread_get_thread_ident();
        if (!r->exchanging || lrx_exchange_filter(r) == 0)
            return true;
        r->claimed = false;
        return false;
    }
    if (lrx_check_prepared(r)) {
        PyObject *answer = PyObject_CallMethod((PyObject *)r, "_refuse", "O", r->thread == PyThread_get_thread_ident() ? Py_True : Py_False);

        Py_XDECREF(answer);
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_RuntimeError, "_refuse() has not raised");
    }
    return false;
}

/* Whether packets, an error or the end wait here, so that the source need not be readable. */
bool lrx_has_something(const Receiver *r)
{
    const struct lrx_report *report = report_of(r);

    if (!r->prepared)
        return false;
    return r->pending || r->ended || r->end_follows || r->stopping || (r->flushing && !r->flush_waits) || r->was_down || report->count ||
           report->classified || report->error || report->held || report->held_back;
}

/* In C, because an exception of a signal handler here would lose the packet that is being returned. stop() sets the event too. */
void lrx_set_readable(Receiver *r)
{
    uint64_t count = 1;
    ssize_t done;

    if (r->closed) /* in a child that was forked inside, the descriptor of the event may belong to another file now */
        return;
    r->readable = lrx_has_something(r);
    done = r->readable ? write(r->event, &count, sizeof count) : read(r->event, &count, sizeof count);
    (void)done; /* never waits; reading a clear event fails, which is harmless */
}

/* Call a method. A pending exception stays; then an exception of the method goes to sys.unraisablehook. Else that one replaces
 * `result`. */
static void call(Receiver *r, const char *method, PyObject **result)
{
    PyObject *type, *value, *trace, *answer;

    PyErr_Fetch(&type, &value, &trace);
    answer = PyObject_CallMethod((PyObject *)r, method, NULL);
    Py_XDECREF(answer);
    if (PyErr_Occurred() && type)
        PyErr_WriteUnraisable((PyObject *)r);
    else if (PyErr_Occurred())
        Py_CLEAR(*result);
    if (type)
        PyErr_Restore(type, value, trace);
}

/* Give up the claim. Returns `result`, unless this raises. */
PyObject *lrx_leave(Receiver *r, PyObject *result)
{
    if (r->polled && r->ended) {
        if (!r->quiet)
            call(r, "_disarm", &result);
    } else if (r->polled && lrx_has_something(r) != r->readable) {
        lrx_set_readable(r);
    }
    r->claimed = false;
    if (r->leaving || r->closed)
        call(r, "_last_left", &result);
    return result;
}

/* A timeout in seconds; negative for None, which is no limit. NAN with an exception for an invalid value. */
static double seconds_of(const char *name, PyObject *timeout)
{
    double seconds;

    if (!timeout || timeout == Py_None)
        return -1;
    if (!PyFloat_Check(timeout) && !PyLong_Check(timeout)) {
        PyErr_Format(PyExc_TypeError, "%s=%R: give seconds, or None for no limit", name, timeout);
        return NAN;
    }
    seconds = PyFloat_AsDouble(timeout);
    if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_OverflowError))
        PyErr_Clear();
    else if (seconds >= 0)
        return seconds < 1e9 ? seconds : 1e9;
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "%s=%R: give seconds, or None for no limit", name, timeout);
    return NAN;
}

/* The one argument of most methods: timeout=None. */
static double timeout_of(PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    const Py_ssize_t named = names ? PyTuple_Size(names) : 0;

    if (count + named > 1) {
        PyErr_Format(PyExc_TypeError, "one argument at most, timeout, and %zd were given", count + named);
        return NAN;
    }
    if (named && PyUnicode_CompareWithASCIIString(PyTuple_GetItem(names, 0), "timeout") != 0) {
        PyErr_Format(PyExc_TypeError, "there is no argument %R, only timeout", PyTuple_GetItem(names, 0));
        return NAN;
    }
    return seconds_of("timeout", count + named ? args[0] : NULL);
}

/* Receiving. */

/* The limits of one call. */
typedef struct {
    double timeout; /* as for lrx_await() */
    bool all;
    Py_ssize_t most;  /* packets */
    int64_t deadline; /* of lrx_coarse_now(); 0: none */
} Limits;

/* Returns the number of delivered packets, or -1. Sets `over`, unless NULL, to whether reception is over. */
static Py_ssize_t deliver_what_comes(PyObject *self, const Limits *limits, bool *over)
{
    Receiver *r = (Receiver *)self;
    PyObject *result = NULL;
    Py_ssize_t delivered = -1;

    if (!enter(r))
        return -1;
    if (!r->deliver) {
        Py_XDECREF(PyObject_CallMethod(self, "_without_deliver", NULL));
        lrx_leave(r, NULL);
        return -1;
    }
    switch (lrx_await(r, limits->timeout, limits->all)) {
    case FAILED:
        break;
    case READY:
        delivered = lrx_deliver(r, limits->most, limits->deadline);
        break;
    default:
        delivered = 0;
    }
    if (delivered >= 0 && over) {
        int ended = r->ended;

        /* Needs the claim, because it may drop pending packets. */
        if (!ended && (r->stopping || r->end_follows) && !r->closed)
            ended = lrx_ask(r, "_over");
        if (ended < 0)
            delivered = -1;
        *over = ended > 0;
    }
    /* lrx_leave() may raise. */
    result = lrx_leave(r, delivered < 0 ? NULL : Py_NewRef(Py_None));
    Py_XDECREF(result);
    return result ? delivered : -1;
}

PyObject *lrx_receiver_dispatch(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    const Limits limits = {.timeout = timeout_of(args, count, names), .most = PY_SSIZE_T_MAX};
    bool over = false;

    if (isnan(limits.timeout) || deliver_what_comes(self, &limits, &over) < 0)
        return NULL;
    return Py_NewRef(over || ((Receiver *)self)->closed ? Py_False : Py_True);
}

/* A number of packets; PY_SSIZE_T_MAX for None. -1 with an exception for an invalid value. */
static Py_ssize_t packets_of(PyObject *count)
{
    Py_ssize_t packets;

    if (!count || count == Py_None)
        return PY_SSIZE_T_MAX;
    if (!PyLong_Check(count)) {
        PyErr_Format(PyExc_TypeError, "count=%R: give a number of packets, or None for no limit", count);
        return -1;
    }
    packets = PyNumber_AsSsize_t(count, NULL); /* clips integers that are too large */
    if (packets > 0)
        return packets;
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "count=%R: give a number of packets above 0, or None for no limit", count);
    return -1;
}

PyObject *lrx_receiver_run(PyObject *self, PyObject *args, PyObject *names)
{
    static char *keywords[] = {"count", "duration", NULL};
    Receiver *r = (Receiver *)self;
    PyObject *count_given = NULL, *duration_given = NULL, *end;
    Limits limits = {.timeout = -1};
    double duration, until;
    bool over = false;

    if (!PyArg_ParseTupleAndKeywords(args, names, "|$OO:run", keywords, &count_given, &duration_given))
        return NULL;
    limits.most = packets_of(count_given);
    duration = seconds_of("duration", duration_given);
    if (limits.most < 0 || isnan(duration))
        return NULL;
    until = lrx_now() + duration;
    if (duration >= 0)
        limits.deadline = lrx_coarse_now() + (int64_t)(duration * 1e9);
    end = lrx_receiver_iterate(self); /* checks that the call is allowed, also if the duration is over at once */
    if (!end)
        return NULL;
    Py_DECREF(end);
    while (!over && limits.most && !r->closed) {
        const uint64_t waits = r->waits;
        Py_ssize_t delivered;

        if (duration >= 0) {
            limits.timeout = until - lrx_now();
            if (limits.timeout <= 0)
                break;
        }
        delivered = deliver_what_comes(self, &limits, &over);
        if (delivered < 0)
            return NULL;
        if (limits.most != PY_SSIZE_T_MAX)
            limits.most -= delivered;
        if (r->waits == waits) /* a wait releases the GIL */
            lrx_let_others_run(r);
    }
    return PyObject_GetAttrString(self, "end");
}

PyObject *lrx_receiver_drain(PyObject *self, PyObject *unused)
{
    /* fileno() stays readable while packets wait, so an event loop calls again. */
    const Limits limits = {.all = !((Receiver *)self)->polled, .most = PY_SSIZE_T_MAX};
    Py_ssize_t delivered;

    (void)unused;
    delivered = deliver_what_comes(self, &limits, NULL);
    return delivered < 0 ? NULL : PyLong_FromSsize_t(delivered);
}

/* After a receive without packets: whether to go on, for `left` seconds. */
static bool in_time(Receiver *r, double timeout, double deadline, double *left)
{
    if (timeout > 0)
        *left = deadline - lrx_now();
    if (timeout == 0 || (timeout > 0 && *left <= 0))
        return false;
    lrx_let_others_run(r);
    return true;
}

PyObject *lrx_receiver_recv(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    Receiver *r = (Receiver *)self;
    const double timeout = timeout_of(args, count, names), deadline = timeout > 0 ? lrx_now() + timeout : 0;
    double left = timeout;
    PyObject *result = NULL;

    if (isnan(timeout) || !enter(r))
        return NULL;
    for (;;) {
        switch (lrx_await(r, left, false)) {
        case FAILED:
            break;
        case READY:
            result = (PyObject *)lrx_next_packet(r);
            break;
        case OVER:
            result = PyObject_CallMethod(self, "_raise_ended", NULL);
            break;
        case NOTHING:
            if (in_time(r, timeout, deadline, &left))
                continue;
            PyErr_Format(PyExc_TimeoutError, "no packet within %R seconds", count ? args[0] : args[count]);
            break;
        }
        return lrx_leave(r, result);
    }
}

PyObject *lrx_receiver_next(PyObject *self)
{
    Receiver *r = (Receiver *)self;
    PyObject *result = NULL;

    if (!enter(r))
        return NULL;
    for (;;) {
        const enum outcome outcome = lrx_await(r, -1, false);

        if (outcome == NOTHING) {
            lrx_let_others_run(r);
            continue;
        }
        if (outcome == READY)
            result = (PyObject *)lrx_next_packet(r);
        return lrx_leave(r, result);
    }
}

/* next_batch(timeout, until): the next batch, or the rest of the current one; None at the end or after the timeout. `until` is
 * None or a time of time.monotonic(). After it, pending packets are kept for the next call. */
PyObject *lrx_receiver_next_batch(PyObject *self, PyObject *args)
{
    Receiver *r = (Receiver *)self;
    PyObject *timeout_given, *until_given, *result = NULL;
    double timeout, deadline, left;

    if (!PyArg_ParseTuple(args, "OO:_next_batch", &timeout_given, &until_given))
        return NULL;
    timeout = seconds_of("timeout", timeout_given);
    if (isnan(timeout))
        return NULL;
    if (until_given != Py_None) {
        left = PyFloat_AsDouble(until_given) - lrx_now();
        if (PyErr_Occurred())
            return NULL;
        if (left <= 0)
            Py_RETURN_NONE;
        if (timeout < 0 || left < timeout)
            timeout = left;
    }
    left = timeout;
    deadline = timeout > 0 ? lrx_now() + timeout : 0;
    if (!enter(r))
        return NULL;
    for (;;) {
        switch (lrx_await(r, left, true)) {
        case FAILED:
            break;
        case READY:
            result = (PyObject *)lrx_take_batch(r);
            break;
        case OVER:
            Py_INCREF(Py_None);
            result = Py_None;
            break;
        case NOTHING:
            if (in_time(r, timeout, deadline, &left))
                continue;
            Py_INCREF(Py_None);
            result = Py_None;
            break;
        }
        return lrx_leave(r, result);
    }
}

/* For event loops that read packet by packet: receive what is in the queue. True: packets are pending, or reception is over. */
PyObject *lrx_receiver_poll(PyObject *self, PyObject *unused)
{
    Receiver *r = (Receiver *)self;
    enum outcome outcome;

    (void)unused;
    if (!enter(r))
        return NULL;
    outcome = lrx_await(r, 0, r->latency > 0); /* the event loop calls again while there are more packets; `latency` applies to those too */
    return lrx_leave(r, outcome == FAILED ? NULL : PyBool_FromLong(outcome != NOTHING));
}

/* For event loops: receive what is in the queue, and hold it back. True: hand over what is held back now. */
PyObject *lrx_receiver_hold_back(PyObject *self, PyObject *unused)
{
    Receiver *r = (Receiver *)self;
    enum outcome outcome;

    (void)unused;
    if (!enter(r))
        return NULL;
    outcome = PyErr_CheckSignals() < 0 ? FAILED : lrx_hold_more(r);
    return lrx_leave(r, outcome == FAILED ? NULL : PyBool_FromLong(outcome == OVER));
}

/* A pending packet, or None. Receives nothing, and notices the end of reception. */
PyObject *lrx_receiver_take(PyObject *self, PyObject *unused)
{
    Receiver *r = (Receiver *)self;
    PyObject *result = NULL;

    (void)unused;
    if (!enter(r))
        return NULL;
    if (r->pending && !r->stopping) {
        result = (PyObject *)lrx_next_packet(r);
    } else if (!(r->stopping || r->end_follows) || lrx_ask(r, "_over") >= 0) {
        Py_INCREF(Py_None);
        result = Py_None;
    }
    return lrx_leave(r, result);
}

PyObject *lrx_receiver_iterate(PyObject *self)
{
    if (!enter((Receiver *)self))
        return NULL;
    Py_INCREF(self);
    return lrx_leave((Receiver *)self, self);
}
