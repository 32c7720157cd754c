/* Sending: from any thread, from `deliver`, and while another thread receives. It changes only a counter of the receiver.
 *
 * Sending never waits, so it holds the GIL. Then close() cannot run between the check and the system call, frames that are read
 * in place stay valid, and the thread does not have to get the GIL back from a busy one, which takes 5 ms. A batch is sent AT_ONCE
 * frames at a time. Between these, other threads and signal handlers may run.
 *
 * Errors are raised in Python, in linkrx/receiving/reception.py: _refuse_send(code, length). `code` is an errno, 0 for a closed
 * dispatcher or a source that cannot send, or one of `enum unsendable`. */
#define _GNU_SOURCE
#include "send.h"
#include "../forbidden.inc"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* musl before 1.2.5 lacks both. The two halves of the offset are -1: the current position. */
#ifndef RWF_NOWAIT
#include <sys/syscall.h>
#define RWF_NOWAIT 0x00000008 /* linux/fs.h, since Linux 4.14 */
#define pwritev2(fd, iov, count, offset, flags) \
    syscall(SYS_pwritev2, fd, iov, (long)(count), (long)(offset), (long)(offset), flags)
#endif

#define AT_ONCE 64

/* Send one message. Returns 0 or an errno. */
static int put(Receiver *r, const Message *m)
{
    struct msghdr message = {.msg_iov = (struct iovec *)m->pieces, .msg_iovlen = m->count};
    struct pollfd room = {.fd = r->source, .events = POLLOUT};
    ssize_t done = -1;

    for (;;) {
        switch (r->sends) {
        case LRX_SENDS_MESSAGES:
            done = m->count == 1
                       ? send(r->source, m->pieces[0].iov_base, m->pieces[0].iov_len, MSG_DONTWAIT | MSG_NOSIGNAL)
                       : sendmsg(r->source, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
            return done < 0 ? errno : 0;
        case LRX_SENDS_WRITES: /* RWF_NOWAIT instead of O_NONBLOCK: see readv.c */
            done = pwritev2(r->source, m->pieces, (int)m->count, -1, RWF_NOWAIT);
            if (done >= 0 || (errno != EOPNOTSUPP && !is_forbidden(errno)))
                break;
            r->sends = LRX_SENDS_POLLED;
            continue;
        default:
            done = poll(&room, 1, 0);
            if (done == 0)
                return EAGAIN;
            if (done > 0)
                done = writev(r->source, m->pieces, (int)m->count);
        }
        if (done >= 0)
            return done ? 0 : EINVAL; /* write(2) of 0 bytes sends nothing */
        if (errno != EINTR)
            return errno;
    }
}

/* Send `count` messages in order. Returns how many were sent; `error` has the errno of the next. */
static unsigned put_all(Receiver *r, const Message *messages, unsigned count, int *error)
{
    struct mmsghdr headers[AT_ONCE];
    unsigned done = 0;

    if (count > 1 && r->sends == LRX_SENDS_MESSAGES && !r->sends_singly) {
        int taken;

        memset(headers, 0, count * sizeof headers[0]);
        for (unsigned k = 0; k < count; k++) {
            headers[k].msg_hdr.msg_iov = (struct iovec *)messages[k].pieces;
            headers[k].msg_hdr.msg_iovlen = messages[k].count;
        }
        taken = sendmmsg(r->source, headers, count, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (taken >= 0) {
            /* sendmmsg() does not return the error of the next message. The next call gets it. */
            *error = 0;
            return (unsigned)taken;
        }
        *error = errno;
        if (!is_forbidden(*error) && *error != EINTR)
            return 0;
        r->sends_singly = *error != EINTR; /* a seccomp filter refuses sendmmsg() */
    }
    *error = 0;
    while (done < count && !(*error = put(r, &messages[done])))
        done++;
    return done;
}

/* A packet socket whose link went down keeps ENETDOWN for its next call, which may be a send after the link is up again. Then send
 * again, and leave the news to the receiver. */
static unsigned transmit(Receiver *r, const Message *messages, unsigned count, int *error)
{
    unsigned done = put_all(r, messages, count, error);

    if (done || *error != ENETDOWN || r->sends != LRX_SENDS_MESSAGES)
        return done;
    done = put_all(r, messages, count, error);
    if (done || *error != ENETDOWN) {
        r->was_down = true;
        lrx_set_readable(r);
    }
    return done;
}

/* Raise the exception for an error. */
static PyObject *refuse(Receiver *r, int code, size_t length)
{
    PyObject *answer;

    if (PyErr_Occurred())
        return NULL;
    if (!lrx_check_prepared(r))
        return NULL;
    answer = PyObject_CallMethod((PyObject *)r, "_refuse_send", "in", code, (Py_ssize_t)length);
    Py_XDECREF(answer);
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_RuntimeError, "_refuse_send() has not raised");
    return NULL;
}

static bool may_send(const Receiver *r)
{
    return r->prepared && !r->closed && r->sends && (!r->state->process || *r->state->process == r->process);
}

/* The frames of send_batch(). */
typedef struct {
    PyObject *tuple; /* of packets and bytes-like objects; NULL for a batch */
    const Batch *batch;
    Py_buffer views[AT_ONCE]; /* the buffers of frames that are neither bytes nor packets */
    unsigned viewed;
} Frames;

static bool has_its_bytes(const Receiver *r, PyObject *frame)
{
    return PyBytes_CheckExact(frame) || Py_TYPE(frame) == r->state->packet_type;
}

/* Clear the exception of a frame that follows sent ones: the next call raises it. KeyboardInterrupt stays. */
static bool leave_to_next_call(void)
{
    if (!PyErr_Occurred() || !PyErr_ExceptionMatches(PyExc_Exception))
        return false;
    PyErr_Clear();
    return true;
}

/* Get the buffers of frames that are neither bytes nor packets. This may run Python code; later steps do not. Returns the number of
 * frames whose bytes are available, or 0 with an exception. */
static unsigned acquire(const Receiver *r, Frames *frames, Py_ssize_t first, unsigned count)
{
    frames->viewed = 0;
    for (unsigned k = 0; frames->tuple && k < count; k++) {
        PyObject *frame = PyTuple_GetItem(frames->tuple, first + k);

        if (has_its_bytes(r, frame))
            continue;
        if (PyObject_GetBuffer(frame, &frames->views[frames->viewed], PyBUF_SIMPLE) < 0)
            return k && leave_to_next_call() ? k : 0;
        frames->viewed++;
    }
    return count;
}

static void release(Frames *frames)
{
    while (frames->viewed)
        PyBuffer_Release(&frames->views[--frames->viewed]);
}

static int packet_frame(const Packet *p, Frame *f)
{
    if (!lrx_packet_is_readable(p))
        return -1;
    *f = (Frame){
        .bytes = p->frame,
        .length = p->length,
        .vnet = p->has_vnet ? p->vnet : NULL,
        .big_endian = p->has_vnet == 2,
        .protocol = p->protocol,
        .flags = p->link_header ? p->flags : (uint16_t)(p->flags & ~LRX_VLAN), /* without link header there is no tag */
        .vlan_tci = p->vlan_tci,
        .vlan_tpid = p->vlan_tpid,
    };
    return 0;
}

static void batch_frame(const Batch *b, Py_ssize_t row, Frame *f)
{
    const Table *t = b->table;
    const uint8_t link_header = b->framing.per_packet ? t->columns.link_headers[row] : b->framing.link_header;

    *f = (Frame){
        .bytes = b->base + t->offsets[row],
        .length = t->columns.lengths[row],
        .big_endian = b->framing.big_endian,
        .protocol = t->columns.protocols[row],
        .flags = link_header ? t->columns.flags[row] : (uint16_t)(t->columns.flags[row] & ~LRX_VLAN),
        .vlan_tci = t->columns.vlan_tcis[row],
        .vlan_tpid = t->columns.vlan_tpids[row],
    };
    if (b->framing.vnet)
        f->vnet = f->bytes - b->framing.vnet;
}

static int frame_of(const Receiver *r, const Frames *frames, Py_ssize_t index, unsigned *view, Frame *f)
{
    PyObject *frame;

    if (frames->batch) {
        batch_frame(frames->batch, index, f);
        return 0;
    }
    frame = PyTuple_GetItem(frames->tuple, index);
    if (Py_TYPE(frame) == r->state->packet_type)
        return packet_frame((Packet *)frame, f);
    *f = (Frame){0};
    if (PyBytes_CheckExact(frame)) {
        f->bytes = (const uint8_t *)PyBytes_AsString(frame);
        f->length = (size_t)PyBytes_Size(frame);
    } else {
        f->bytes = frames->views[*view].buf;
        f->length = (size_t)frames->views[(*view)++].len;
    }
    return 0;
}

/* Send up to `count` frames. Returns how many were sent. `error` is that of the next frame, of `length` bytes; or there is an
 * exception. */
static unsigned send_some(Receiver *r, Frames *frames, Py_ssize_t first, unsigned count, int *error, size_t *length)
{
    Message messages[AT_ONCE];
    unsigned described = 0, view = 0, done = 0;
    int unsendable = 0;
    Frame f = {0};

    *error = 0;
    count = acquire(r, frames, first, count);
    if (count && may_send(r)) {
        for (; described < count; described++) {
            if (frame_of(r, frames, first + described, &view, &f) < 0)
                break;
            unsendable = lrx_describe(r, &messages[described], &f);
            if (unsendable)
                break;
            if (!described)
                *length = f.length;
        }
        if (described)
            done = transmit(r, messages, described, error);
        if (done == described && unsendable) {
            *error = unsendable;
            *length = f.length;
        }
        r->sent += done;
    }
    release(frames);
    return done;
}

PyObject *lrx_receiver_send(PyObject *self, PyObject *frame)
{
    Receiver *r = (Receiver *)self;
    Py_buffer view = {0};
    Message message;
    Frame f = {0};
    unsigned done = 0;
    int error = 0;

    if (PyBytes_CheckExact(frame)) {
        f.bytes = (const uint8_t *)PyBytes_AsString(frame);
        f.length = (size_t)PyBytes_Size(frame);
    } else if (r->state && Py_TYPE(frame) == r->state->packet_type) {
        if (packet_frame((Packet *)frame, &f) < 0)
            return NULL;
    } else {
        if (PyObject_GetBuffer(frame, &view, PyBUF_SIMPLE) < 0)
            return NULL;
        f.bytes = view.buf;
        f.length = (size_t)view.len;
    }
    if (may_send(r)) {
        error = lrx_describe(r, &message, &f);
        if (!error)
            done = transmit(r, &message, 1, &error);
        r->sent += done;
    }
    if (view.obj)
        PyBuffer_Release(&view);
    if (!done)
        return refuse(r, error, f.length);
    Py_RETURN_NONE;
}

PyObject *lrx_receiver_send_batch(PyObject *self, PyObject *given)
{
    Receiver *r = (Receiver *)self;
    Frames frames = {0};
    Py_ssize_t count, sent = 0;
    size_t length = 0;
    int error = 0;
    bool interrupted = false;

    if (!may_send(r))
        return refuse(r, 0, 0);
    if (Py_TYPE(given) == r->state->batch_type) {
        frames.batch = (Batch *)given;
        count = frames.batch->table->count;
        if (!lrx_batch_is_readable(frames.batch))
            return NULL;
    } else {
        frames.tuple = PySequence_Tuple(given);
        if (!frames.tuple)
            return NULL;
        count = PyTuple_Size(frames.tuple);
    }
    while (sent < count && !interrupted) {
        const unsigned some = count - sent < AT_ONCE ? (unsigned)(count - sent) : AT_ONCE;
        const unsigned done = send_some(r, &frames, sent, some, &error, &length);

        sent += done;
        if (done < some)
            break;
        lrx_let_others_run(r);
        interrupted = sent < count && PyErr_CheckSignals() < 0;
    }
    Py_XDECREF(frames.tuple);
    if (interrupted) /* an exception of a signal handler; `sent` is counted */
        return NULL;
    if (sent)
        leave_to_next_call();
    if (sent || !count || (error && (error == EAGAIN || error == ENOBUFS)))
        return PyErr_Occurred() ? NULL : PyLong_FromSsize_t(sent);
    return refuse(r, error, length);
}
