/* Shared by the types that Python uses once per packet. memory.c describes the rule of memory. */
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>

#include "../classify.h"
#include "../mechanism.h"
#include "../report.h"
#include "../columns.inc"

/* A core that is compiled with the headers of one CPython must run on all since 3.11. So formats have no "#": CPython 3.11 needs
 * PY_SSIZE_T_CLEAN for it, and 3.13 has dropped that macro. Since CPython 3.12 None is immortal, and these macros take no reference.
 * On CPython 3.11 such a core would free None. */
#undef Py_RETURN_NONE
#undef Py_RETURN_TRUE
#undef Py_RETURN_FALSE
#undef Py_RETURN_NOTIMPLEMENTED
#define Py_RETURN_NONE return Py_NewRef(Py_None)
#define Py_RETURN_TRUE return Py_NewRef(Py_True)
#define Py_RETURN_FALSE return Py_NewRef(Py_False)
#define Py_RETURN_NOTIMPLEMENTED return Py_NewRef(Py_NotImplemented)

/* Errors, and calls of methods in Python, are rare here. So the compiler places these branches apart from the rest of the code. */
__attribute__((cold)) PyObject *PyErr_Format(PyObject *, const char *, ...);
__attribute__((cold)) void PyErr_SetString(PyObject *, const char *);
__attribute__((cold)) PyObject *PyObject_CallMethod(PyObject *, const char *, const char *, ...);

#define ETHER_ADDRESS 6
#define ETHER_HEADER 14
#define LRX_VNET_MOST 4096 /* bytes of a virtio-net header: as in linkrx/sources/options.py */
#define LINK_ADDRESS 8 /* linux/if_packet.h: sll_addr */
#define VNET_HEADER 10 /* linux/virtio_net.h: struct virtio_net_hdr */

/* The offset of the first frame of an arena: see memory.c. */
#define ARENA_START 64

typedef struct State State;
typedef struct Owner Owner;
typedef struct Table Table;
typedef struct Batch Batch;
typedef struct Packet Packet;

/* The state of the module. There are no globals. */
struct State {
    PyTypeObject *owner_type;
    PyTypeObject *table_type;
    PyTypeObject *batch_type;
    PyTypeObject *batch_iterator_type;
    PyTypeObject *packet_type;
    PyTypeObject *receiver_type;
    PyTypeObject *waiter_type;
    PyTypeObject *async_packets_type;
    PyTypeObject *bytes_method_type;
    PyObject *spare_method; /* the memory of the last BytesMethod, for the next; or NULL */
    /* The module linkrx.packets.headers, once it is imported: methods that are rarely called are in Python. */
    PyObject *headers;
    /* A page that is wiped in a forked child (MADV_WIPEONFORK): 0 there until something is opened. NULL before Linux 4.14. */
    volatile int64_t *process;
    /* PyObject_Vectorcall() is not in the limited API of CPython 3.11. NULL if it cannot be found. */
    PyObject *(*vectorcall)(PyObject *, PyObject *const *, size_t, PyObject *);
};

/* The owner of memory with frames: an arena of a receiver, or blocks of a ring. */
struct Owner {
    PyObject_HEAD
    uint8_t *memory;
    size_t mapped;                  /* bytes of an arena; 0 for the memory of a ring */
    uint32_t cursor;                /* the offset at which a mechanism written in Python fills */
    const volatile uint32_t *guard; /* for a ring: 0 in a child that was forked without Python's hooks */
    Packet *packets;                /* the packets that read in place, or did so until their frame was copied */
    Batch *batch;                   /* the batch that reads in place; its deallocation clears this */
    bool exporting_view;            /* while a writable view is made, for mechanisms written in Python */
    bool copied;                    /* a frame was copied since the last packet was made */
};

enum column {
    COLUMN_TIMESTAMPS,
    COLUMN_STARTS,
    COLUMN_LENGTHS,
    COLUMN_WIRE_LENGTHS,
    COLUMN_INTERFACES,
    COLUMN_PROTOCOLS,
    COLUMN_FLAGS,
    COLUMN_VLAN_TCIS,
    COLUMN_VLAN_TPIDS,
    COLUMN_LINK_TYPES,
};

/* The columns of one batch. A table refers to nothing, so a view of a column keeps no frame alive. */
struct Table {
    PyObject_VAR_HEAD
    Py_ssize_t count; /* rows; the shape of every column */
    uint32_t room;    /* rows that the memory has room for */
    uint32_t laid_out; /* rows for which columns are laid out there; 0: none */
    enum column column; /* the column of the next view */
    struct lrx_columns columns; /* `starts` count in the `memory` of the batch; those of the link layer only with Framing.per_packet */
    uint32_t *offsets; /* the offset of each frame from the base of the batch, not public; the starts, unless these are in a copy */
};

/* The headers in front of a packet's data, for one source. If `per_packet` is set they differ from packet to packet, and the
 * table has the link type, link header and link address of each. */
typedef struct {
    uint8_t link_header; /* 14 or 0 */
    uint8_t per_packet;  /* LRX_PER_PACKET_* or 0 */
    uint16_t link_type;  /* ARPHRD_* */
    uint8_t big_endian;  /* the byte order of the virtio-net header */
    uint32_t vnet;       /* bytes of the virtio-net header in front of each frame; 0, or 10 and more */
} Framing;

struct Batch {
    PyObject_HEAD
    State *state;
    Owner *owner;        /* the owner of the memory at `base`; NULL if the frames are in `own` */
    const uint8_t *base; /* frame i is at base + table->offsets[i] */
    PyObject *own;       /* bytes: a copy of the frames, or NULL */
    Table *table;
    Py_ssize_t exports;  /* views of `memory` that exist, while `memory` is the arena */
    uint32_t size;       /* bytes of `memory` */
    Framing framing;
    bool settled;        /* the receiver does not reuse the memory: packets are copied as they are made */
    bool apart;          /* `memory` is to be a copy: the frames lie in a ring, or far from each other */
    bool tidy;           /* the gaps between frames are zeroed */
    unsigned viewing;    /* calls of `memory` that are making a view: a batch is no buffer otherwise */
};

struct Packet {
    PyObject_HEAD
    Owner *owner;        /* the owner of the memory that the packet was read from; NULL after it left the owner's list */
    Packet *next;        /* in the owner's list */
    Packet **link;       /* the pointer to this packet in that list */
    const uint8_t *frame;
    PyObject *own;       /* bytes: a copy of the frame, or NULL */
    int64_t timestamp;
    uint32_t length;
    uint32_t wire_length;
    uint32_t interface;
    uint32_t file_type; /* for a packet of a capture file: report.h */
    uint16_t protocol;
    uint16_t flags;
    uint16_t vlan_tci;
    uint16_t vlan_tpid;
    uint16_t link_type;
    uint8_t link_header;
    uint8_t address_length; /* without link header: bytes of the sender's link address that the kernel reported */
    uint8_t address[LINK_ADDRESS];
    uint8_t has_vnet : 2; /* 0: none; 1: little-endian; 2: big-endian */
    uint8_t viewing : 2;  /* the part of the frame that the next view shows */
    uint8_t vnet[VNET_HEADER];
};

/* memory.c */
enum taken { TAKEN_NOT = -1, TAKEN_BACK, GIVEN_AWAY };
extern PyType_Spec lrx_owner_spec;
Owner *lrx_owner_new(State *state, size_t size);
bool lrx_owner_is_free(const Owner *o);
/* Give each packet that reads in place its own copy. */
int lrx_owner_copy_packets(Owner *o);
/* Copy packets and batches that read in place. GIVEN_AWAY: there is a view of the arena, which keeps it from now on. TAKEN_NOT
 * with MemoryError: nothing is lost, and the memory must not be used again yet. */
enum taken lrx_owner_take_back(Owner *o);

/* packet_type.c */
extern PyType_Spec lrx_packet_spec;
PyObject *lrx_packet_tobytes(PyObject *self, PyObject *unused);

/* bytes_method.c */
extern PyType_Spec lrx_bytes_method_spec;
/* The method `__bytes__` of a packet. */
PyObject *lrx_bytes_method(PyObject *packet, void *unused);

/* packet.c */
void lrx_packet_dealloc(PyObject *self);
PyObject *lrx_packet_reduce(PyObject *self, PyObject *unused);
Packet *lrx_packet_new(State *state);
/* Make it packet `index` of a batch. Only the receiver may refer to it. */
int lrx_packet_set(Packet *p, const Batch *batch, uint32_t index);
/* False with RuntimeError in a child that was forked without Python's hooks, where the ring is not mapped. */
bool lrx_packet_is_readable(const Packet *p);
/* Copy the frame into the packet, unless that was done. The packet stays in its owner's list, because it will likely be used again. */
int lrx_packet_copy_frame(Packet *p);
/* The same, for a packet that is kept: it leaves the list. */
int lrx_packet_own(Packet *p);
/* The sender's link address of a packet without link header, or None. */
PyObject *lrx_packet_link_address(const Packet *p);
/* Empty it. Only the receiver may refer to it. */
void lrx_packet_reset(Packet *p);
PyObject *lrx_packet_restore(PyObject *module, PyObject *args);
/* The packet in `slot` if only the receiver refers to it, else a new one in its place. The old one gets its own copy. */
Packet *lrx_packet_in(State *state, Packet **slot);

/* table.c */
extern PyType_Spec lrx_table_spec;
Table *lrx_table_new(State *state, uint32_t count);
/* The address of its rows, for which it has room. */
static inline uintptr_t lrx_table_memory(const Table *t)
{
    return (uintptr_t)(t + 1);
}
/* Lay it out for that many rows, for which it must have room. The offsets are the starts. Returns memory for other starts. */
uint32_t *lrx_table_lay_out(Table *t, uint32_t rows);
/* Remove the first `n` rows. */
void lrx_table_skip(Table *t, uint32_t n);
/* Copy all columns; those of the link layer only if `per_packet`. */
void lrx_table_copy(Table *t, const struct lrx_columns *from, bool per_packet);

/* batch_iterator.c */
extern PyType_Spec lrx_batch_iterator_spec;
PyObject *lrx_batch_iterate(PyObject *batch);

/* batch.c */
extern PyType_Spec lrx_batch_spec;
/* A batch without packets, with room for `rows` of them: see lrx_table_memory(). */
Batch *lrx_batch_new(State *state, uint32_t rows, Framing framing);
/* Make it the batch of the first `count` packets of the `rows` rows that were written to the memory of its table. The frames lie in
 * `size` bytes at `base`, in memory of `owner`, without other batches. Returns -1 with ValueError for frames outside. */
int lrx_batch_begin(Batch *b, Owner *owner, const uint8_t *base, uint32_t size, uint32_t rows, uint32_t count);
/* The same batch in a table of its size, so that it can be kept. The one with more room is given up. NULL with MemoryError: nothing
 * has changed. */
Batch *lrx_batch_of_its_size(Batch *b, Batch **spare);
/* Give up a batch. If nothing else refers to it or its columns, it goes into `spare` for the next one. */
void lrx_batch_give_up(Batch *b, Batch **spare);
/* Remove the first `n` packets of a batch that was not handed over yet. */
void lrx_batch_skip(Batch *b, uint32_t n);
int lrx_batch_own(Batch *b);
/* The same for a batch. */
bool lrx_batch_is_readable(const Batch *b);

/* The arguments of `deliver` beside the packet, made once per neighbour and protocol. */
typedef struct {
    uint64_t first, second; /* the first and last eight bytes of the link header; or the reported address */
    uint32_t kind;          /* the protocol, and the lengths of link header and reported address */
    PyObject *remote;
    PyObject *local;
    PyObject *protocol; /* NULL: this element is free */
} Neighbour;

#define NEIGHBOURS 16

/* The part of a dispatcher that runs once per packet or once per wake-up. Rare work is in Python, in methods of a subclass that
 * receive.c lists. */
typedef struct {
    PyObject_HEAD
    State *state;
    PyObject *deliver; /* NULL: none */
    bool prepared;     /* _prepare() was called; before that every call is refused */
    int64_t process;   /* the process that opened it; calls in others are refused */
    Framing framing;

    /* The claim: receiver.c. */
    bool claimed;
    bool delivering;
    bool closed;     /* close() was called: calls are refused */
    bool leaving;    /* call _last_left() when no call is inside */
    unsigned long thread; /* the thread that has the claim */

    /* Filling: fill.c. */
    Py_buffer descriptors;
    uint32_t rows;
    struct lrx_classifier classifier;
    Py_buffer counters;
    struct lrx_mechanism *mechanism; /* NULL: it is written in Python */
    Owner *slots[2];                 /* the slots of a mechanism that describes packets in place */
    size_t arena_size;
    uint32_t table_rows;             /* the rows of a batch's table */
    uint32_t room;                   /* bytes of an arena for frames */
    Owner *arenas[2];                /* made when first needed */
    unsigned current;                /* the index of the arena that was filled last */
    bool filling;                    /* that arena is being filled, or has frames that are in no batch yet */
    bool may_hang_up;                /* an empty packet may be the end */
    bool reads_memory;               /* a fill makes no system call, so it is always tried first */

    /* The filter that linkrx runs: filter.c. */
    PyObject *filter;    /* the object that holds the program, or NULL */
    double filter_until; /* it ends after a fill that began after this time and found nothing; 0: it stays */
    bool exchanging;     /* replace it by `next_filter` before the next packet is delivered */
    struct {
        PyObject *program;
        struct lrx_filter filter;
        double until;
    } next_filter;

    /* The number of packets to receive, and reads before waits: fill.c and receive.c. */
    uint32_t most, grow_wait, grow_hold;
    uint32_t eager_wait, eager_hold;

    /* Waiting: receive.c. */
    int source, event, epoll;
    double latency;                  /* seconds that packets are held back; 0: they are not */
    struct lrx_report *collected;    /* the frames that are held back: hold.c. NULL if latency is 0 */
    uint32_t hold_most;              /* bytes of an arena that they may use, and another fill still has room */
    bool link_down, source_paused, polled, looped, readable;
    unsigned spurious;               /* successive drains of an event loop that found nothing */
    int64_t others_ran;              /* the time at which lrx_let_others_run() last released the GIL, in nanoseconds */
    int64_t drops_due;               /* the time of the next look at the kernel's counters, in nanoseconds */

    /* Pending packets, and the end: deliver.c. */
    Batch *pending;
    Batch *spare;     /* the batch whose table the packets of the next fill are written to */
    uint32_t next;
    volatile bool stopping;
    volatile bool flushing; /* stop after the packets that had come are delivered: receive.c */
    bool flush_begun;
    bool flush_waits; /* a timer makes the descriptor readable again */
    uint64_t flush_received; /* the flush ends when this number of frames was received */
    double flush_until;      /* the time at which the last of them can be read */
    bool end_follows; /* the end follows the received packets */
    bool ended;
    bool quiet; /* the caller that polls has seen the end: fileno() stays unreadable */
    Packet *delivered;
    Packet *turns[2];
    unsigned turn;
    Neighbour neighbours[NEIGHBOURS];

    /* Sending: send.c. */
    int sends;             /* enum lrx_sends */
    bool sends_singly;     /* sendmmsg() is refused */
    volatile bool was_down; /* a send got ENETDOWN for a link that went down; the receiver must handle it */
    uint64_t sent;

    uint64_t batches, receives, waits, undelivered, undelivered_bytes;
} Receiver;

/* The system call that sends. linkrx/receiving/sending.py has the same numbers. */
enum lrx_sends { LRX_SENDS_NOTHING, LRX_SENDS_WRITES, LRX_SENDS_MESSAGES, LRX_SENDS_POLLED };

/* The result of a step. */
enum outcome {
    FAILED = -1, /* with an exception */
    NOTHING,     /* no packet, or not in time */
    READY,
    OVER,        /* the end of reception */
};

static inline struct lrx_report *report_of(const Receiver *r)
{
    return lrx_report_at((uintptr_t)r->descriptors.buf);
}

/* After an attempt that found nothing, the next ones are skipped: 1, 3, 7 and so on, up to this number. */
#define MOST_HOLD 31

/* fill.c */
/* Fill once, without waiting, unless received frames wait here already. Returns how many frames are neither classified nor held
 * back, or -1 with an exception. `all`: receive up to a whole batch. */
int lrx_obtain(Receiver *r, bool all);
/* Whether the last fill may have ended because the batch was full, by rows or by bytes. */
bool lrx_was_full(const Receiver *r);
enum outcome lrx_take_in(Receiver *r);
/* Copy packets and batches out of the mechanism's memory. */
int lrx_copy_slots(Receiver *r);

/* receive.c */
/* Wait until packets are pending, for `timeout` seconds at most; 0 does not wait, less than 0 is no limit. `all`: receive up to
 * a whole batch. */
enum outcome lrx_await(Receiver *r, double timeout, bool all);
/* Make fileno() readable while packets, an error or the end wait here. */
void lrx_set_readable(Receiver *r);
double lrx_now(void);
/* Wait for `seconds` at most. 0: nothing has happened; 1: the source is readable; 2: another descriptor is; -1: an exception. */
int lrx_wait(Receiver *r, double seconds);
/* Sleep for `seconds` at most, on the event alone. 1: it is set, for a stop or another filter; -1: an exception. */
int lrx_sleep_on_event(const Receiver *r, double seconds);
/* CLOCK_MONOTONIC_COARSE: cheap, and up to a timer tick late. */
int64_t lrx_coarse_now(void);
/* Call a method without arguments. Returns whether its result is true, or -1 with an exception. */
int lrx_ask(Receiver *r, const char *word);
/* Release the GIL if it was held for a switch interval. For loops without Python code: all frames are skipped, or `deliver` is in C. */
void lrx_let_others_run(Receiver *r);

/* deliver.c */
/* Deliver up to `most` packets, until a deadline in nanoseconds of lrx_coarse_now(). Returns how many, or -1. */
Py_ssize_t lrx_deliver(Receiver *r, Py_ssize_t most, int64_t deadline);
Packet *lrx_next_packet(Receiver *r);
Batch *lrx_take_batch(Receiver *r);
void lrx_drop(Receiver *r);
void lrx_forget_pending(Receiver *r);
void lrx_reset_packets(Receiver *r);

/* receiver.c: see the docstrings in receiver_type.c */
/* False with ValueError for a dispatcher that was never opened. */
bool lrx_check_prepared(const Receiver *r);
/* Whether packets, an error or the end wait here. */
bool lrx_has_something(const Receiver *r);
PyObject *lrx_leave(Receiver *r, PyObject *result);
PyObject *lrx_receiver_dispatch(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names);
PyObject *lrx_receiver_run(PyObject *self, PyObject *args, PyObject *names);
PyObject *lrx_receiver_drain(PyObject *self, PyObject *unused);
PyObject *lrx_receiver_recv(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names);
PyObject *lrx_receiver_next(PyObject *self);
PyObject *lrx_receiver_next_batch(PyObject *self, PyObject *args);
PyObject *lrx_receiver_poll(PyObject *self, PyObject *unused);
PyObject *lrx_receiver_take(PyObject *self, PyObject *unused);
PyObject *lrx_receiver_iterate(PyObject *self);

/* send.c */
PyObject *lrx_receiver_send(PyObject *self, PyObject *frame);
PyObject *lrx_receiver_send_batch(PyObject *self, PyObject *given);
/* record.c */
/* record(packets, first, keys, out, at, pcapng, clock): write the packets of a batch, beginning with number `first`, or one packet,
 * as records of a capture file into the buffer `out` at offset `at`. `keys` has the key of each interface of the file, 64 bits each:
 * see key_of(). `clock` is the time in nanoseconds for packets without a timestamp. Returns the number of the next packet, the
 * offset after the last record, and 0 or a key. A key: the next packet needs a new interface with this key, or the file cannot have
 * its link type or time. 0 before the last packet: there is no room for the next. */
PyObject *lrx_record(PyObject *module, PyObject *args);
/* filter.c */
int lrx_exchange_filter(Receiver *r);
void lrx_end_filter(Receiver *r);
PyObject *lrx_receiver_set_filter(PyObject *self, PyObject *args);
PyObject *lrx_receiver_exchange_filter(PyObject *self, PyObject *unused);

/* receiver_type.c */
extern PyType_Spec lrx_receiver_spec;
bool lrx_is_receiver(PyObject *o);

/* The future that a task of an event loop awaits. */
typedef struct {
    PyObject_HEAD
    Receiver *receiver;
    PyObject *loop;
    PyObject *call;    /* the callback that wakes the task; NULL after it was called */
    PyObject *context; /* and its context */
    PyObject *failure; /* the exception of result(), or NULL */
    PyObject *woken;   /* a future of the loop that is done; see settle() */
    PyObject *get_loop; /* the method, bound to the loop: asyncio.Task takes it from the waiter each time */
    PyObject *run, *context_name; /* the strings "run" and "context" */
    unsigned long waking; /* the thread in which the loop is waking the task now; 0: none */
    char blocking;     /* _asyncio_future_blocking: a task yields this future, and the loop has not seen it yet */
    char armed;        /* the reader is registered, and will settle this waiter */
    bool done;         /* no task waits, or the task was or will be woken */
    bool scheduled;    /* the loop will wake the task in its next turn */
    bool found;        /* the value of result(): whether packets came */
} Waiter;

/* waiter.c */
extern PyType_Spec lrx_waiter_spec;

/* async_packets.c */
extern PyType_Spec lrx_async_packets_spec;

static inline void lrx_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}
