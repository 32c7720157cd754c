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

/* What one CPython's headers compile must run on all since 3.11. So no "#" in a format: 3.13 has no PY_SSIZE_T_CLEAN any more,
 * without which 3.11 refuses it. And since CPython 3.12 None and its like are immortal, and its headers' macros take no reference. In the limited API of 3.11 that
 * would be an abi3 core that destroys them on CPython 3.11. */
#undef Py_RETURN_NONE
#undef Py_RETURN_TRUE
#undef Py_RETURN_FALSE
#undef Py_RETURN_NOTIMPLEMENTED
#define Py_RETURN_NONE return Py_NewRef(Py_None)
#define Py_RETURN_TRUE return Py_NewRef(Py_True)
#define Py_RETURN_FALSE return Py_NewRef(Py_False)
#define Py_RETURN_NOTIMPLEMENTED return Py_NewRef(Py_NotImplemented)

#define ETHER_ADDRESS 6
#define ETHER_HEADER 14
#define LRX_VNET_MOST 4096 /* bytes of a virtio-net header: as in linkrx/sources/options.py */
#define LINK_ADDRESS 8 /* linux/if_packet.h: sll_addr */
#define VNET_HEADER 10 /* linux/virtio_net.h: struct virtio_net_hdr */

/* Where the frames of an arena start: see memory.c. */
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
    size_t mapped;                  /* bytes of an arena; 0 for memory that is a ring's */
    const volatile uint32_t *guard; /* of a ring: 0 in a child that was forked without Python's hooks */
    Packet *packets;                /* those that read in place here */
    Batch *batch;                   /* whose frames lie here; it takes itself out when it dies */
    bool exporting_view;            /* while a writable view is made, for mechanisms written in Python */
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
    Py_ssize_t count; /* of rows; the shape of every column */
    uint32_t room;    /* rows that there is memory for */
    enum column column; /* which one the next view is of */
    int64_t *timestamps;
    uint32_t *offsets; /* of each frame from the batch's base; not public */
    uint32_t *starts; /* where each frame starts in the batch's `memory` */
    uint32_t *lengths;
    uint32_t *wire_lengths;
    uint32_t *interfaces;
    uint16_t *protocols;
    uint16_t *flags;
    uint16_t *vlan_tcis;
    uint16_t *vlan_tpids;
    /* Of packets that differ in these, see Framing. */
    uint32_t *file_types;
    uint16_t *link_types;
    uint64_t *addresses;
    uint8_t *address_lengths;
    uint8_t *link_headers;
};

/* The headers in front of a packet's data, for one source. If `per_packet` is set they differ from packet to packet, and the
 * table has the link type, link header and link address of each. */
typedef struct {
    uint8_t link_header; /* 14 or 0 */
    uint8_t per_packet;  /* LRX_PER_PACKET_* or 0 */
    uint16_t link_type;  /* ARPHRD_* */
    uint8_t big_endian;  /* of the virtio-net header's numbers */
    uint32_t vnet;       /* bytes of the virtio-net header in front of each frame; 0, or 10 and more */
} Framing;

struct Batch {
    PyObject_HEAD
    State *state;
    Owner *owner;        /* whose memory `base` is in; NULL once the frames are in `own` */
    const uint8_t *base; /* frame i is at base + table->offsets[i] */
    PyObject *own;       /* bytes: the frames, once they were copied */
    Table *table;
    Py_ssize_t exports;  /* views of `memory` that somebody has, while that is the arena */
    uint32_t size;       /* bytes of `memory` */
    Framing framing;
    bool settled;        /* the owner is this batch's alone, or nobody's: packets are copied as they are made */
    bool apart;          /* `memory` is to be a copy: the frames lie in a ring, or far from each other */
    bool tidy;           /* between frames there are zeroes */
};

struct Packet {
    PyObject_HEAD
    Owner *owner;        /* of the memory that `frame` is in; NULL once that is `own` */
    Packet *next;        /* in the owner's list */
    Packet **link;       /* what points here in that list */
    const uint8_t *frame;
    PyObject *own;       /* bytes: the frame, once it was asked for or had to be kept */
    int64_t timestamp;
    uint32_t length;
    uint32_t wire_length;
    uint32_t interface;
    uint32_t file_type; /* of a packet of a capture file: see report.h */
    uint16_t protocol;
    uint16_t flags;
    uint16_t vlan_tci;
    uint16_t vlan_tpid;
    uint16_t link_type;
    uint8_t link_header;
    uint8_t address_length; /* of a packet without link header: bytes of its sender's link address that the kernel told */
    uint8_t address[LINK_ADDRESS];
    uint8_t has_vnet : 2; /* 0, 1, or 2 where its numbers are big-endian */
    uint8_t viewing : 2;  /* which part the view that is being made is of */
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

/* packet.c */
void lrx_packet_dealloc(PyObject *self);
PyObject *lrx_packet_reduce(PyObject *self, PyObject *unused);
Packet *lrx_packet_new(State *state);
/* Make it packet `index` of a batch. Only the receiver may refer to it. */
int lrx_packet_set(Packet *p, const Batch *batch, uint32_t index);
/* False with RuntimeError in a child that was forked without Python's hooks, where the ring is not mapped. */
bool lrx_packet_is_readable(const Packet *p);
/* Copy the frame into the packet. */
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
/* Lay it out for `count` rows, for which it must have room. */
void lrx_table_lay_out(Table *t, uint32_t count);
/* Remove the first `n` rows. */
void lrx_table_skip(Table *t, uint32_t n);
/* All columns but the offsets; the columns of the link layer only if `per_packet`. */
void lrx_table_copy(Table *to, const struct lrx_columns *from, bool per_packet);

/* batch_iterator.c */
extern PyType_Spec lrx_batch_iterator_spec;
PyObject *lrx_batch_iterate(PyObject *batch);

/* batch.c */
extern PyType_Spec lrx_batch_spec;
/* A batch of the first `count` rows of `columns`. The frames lie in `size` bytes at `base`, in memory of `owner`, without other
 * batches; frames outside raise ValueError. `spare` may have a batch to use again. */
Batch *lrx_batch_new(State *state, Owner *owner, const uint8_t *base, uint32_t size, const struct lrx_columns *columns,
                     uint32_t count, Framing framing, Batch **spare);
/* Give up a batch. If nothing else refers to it or its columns, it goes into `spare` for the next one. */
void lrx_batch_give_up(Batch *b, Batch **spare);
/* Remove the first `n` packets of a batch that was not handed over yet. */
void lrx_batch_skip(Batch *b, uint32_t n);
int lrx_batch_own(Batch *b);
/* As for packets. */
bool lrx_batch_is_readable(const Batch *b);

/* The arguments of `deliver` beside the packet, made once per neighbour and protocol. */
typedef struct {
    uint64_t first, second; /* the link header: its first eight bytes and its last; or a told address */
    uint32_t kind;          /* the protocol, and the lengths of link header and told address */
    PyObject *remote;
    PyObject *local;
    PyObject *protocol; /* NULL: this place is free */
} Neighbour;

#define NEIGHBOURS 16

/* The part of a dispatcher that runs once per packet or once per wake-up. Rare work is in Python, in methods of a subclass that
 * receive.c lists. */
typedef struct {
    PyObject_HEAD
    State *state;
    PyObject *deliver; /* NULL: none */
    bool prepared;     /* until then every call is refused */
    int64_t process;   /* that has opened it: no other may come in */
    Framing framing;

    /* The claim: receiver.c. */
    bool claimed;
    bool delivering;
    bool closed;     /* close() was called: nobody comes in any more */
    bool leaving;    /* somebody wants to know when nobody is inside any more */
    unsigned long thread; /* that has claimed it */

    /* Filling: fill.c. */
    Py_buffer descriptors;
    uint32_t rows;
    struct lrx_classifier classifier;
    Py_buffer counters;
    struct lrx_mechanism *mechanism; /* NULL: it is written in Python */
    Owner *slots[2];                 /* of a mechanism that describes packets where they lie */
    size_t arena_size;
    uint32_t room;                   /* bytes of an arena that frames may take */
    Owner *arenas[2];                /* made when first needed */
    unsigned current;                /* which one was filled last */
    bool filling;                    /* that one is being filled, or describes what is not taken in yet */
    bool may_hang_up;                /* an empty packet may be the end */
    bool reads_memory;               /* a fill makes no system call, so it is always tried first */

    /* linkrx's own filter: filter.c. */
    PyObject *filter;    /* whose memory classification runs a program in, or NULL */
    double filter_until; /* it ends once a fill that began after this found nothing; 0: it stays */
    bool exchanging;     /* for `next_filter`, before anything more is handed over */
    struct {
        PyObject *program;
        struct lrx_filter filter;
        double until;
    } next_filter;

    /* How much to ask for: fill.c and receive.c. */
    uint32_t most, grow_wait, grow_hold;
    uint32_t eager_wait, eager_hold;

    /* Waiting: receive.c. */
    int source, event, epoll;
    double latency;
    bool link_down, source_paused, polled, looped, readable;
    unsigned spurious;               /* drains in a row that an event loop made for nothing */
    int64_t others_ran;              /* when lrx_let_others_run() gave up the interpreter's lock, in nanoseconds */
    int64_t drops_due;               /* when to look at the kernel's counters, in nanoseconds */

    /* Pending packets, and the end: deliver.c. */
    Batch *pending;
    Batch *spare;     /* nobody has it: for use again */
    uint32_t next;
    volatile bool stopping;
    volatile bool flushing; /* stop once what had come by then is handed over: receive.c */
    bool flush_begun;
    bool flush_waits; /* a timer says when to look again */
    uint64_t flush_received; /* how many may have been received by its end */
    double flush_until;      /* when the last of them can be read */
    bool end_follows; /* behind what was received */
    bool ended;
    bool quiet; /* who polls has seen the end, and is called no more */
    Packet *delivered;
    Packet *turns[2];
    unsigned turn;
    Neighbour neighbours[NEIGHBOURS];

    /* Sending: send.c. */
    int sends;             /* enum lrx_sends */
    bool sends_singly;     /* sendmmsg() is refused */
    volatile bool was_down; /* a send was told that the link went down, in place of the receiver */
    uint64_t sent;

    uint64_t batches, receives, waits, undelivered, undelivered_bytes;
} Receiver;

/* The system call that sends. linkrx/receiving/sending.py has the same numbers. */
enum lrx_sends { LRX_SENDS_NOTHING, LRX_SENDS_WRITES, LRX_SENDS_MESSAGES, LRX_SENDS_POLLED };

/* The result of a step. */
enum outcome {
    FAILED = -1, /* with an exception */
    NOTHING,     /* nothing to hand over, or not in time */
    READY,
    OVER,        /* nothing more will come */
};

static inline struct lrx_report *report_of(const Receiver *r)
{
    return lrx_report_at((uintptr_t)r->descriptors.buf);
}

/* After an attempt in vain the next ones are left out: twice as many each time, up to so many. */
#define MOST_HOLD 31

/* fill.c */
/* Fill once, without waiting. Returns the number of frames, or -1 with an exception. `all`: receive up to a whole batch. */
int lrx_fill(Receiver *r, bool all);
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
/* CLOCK_MONOTONIC_COARSE: cheap, and up to a timer tick late. */
int64_t lrx_coarse_now(void);
/* Call a method without arguments. Returns whether its result is true, or -1 with an exception. */
int lrx_ask(Receiver *r, const char *word);
/* Between two receives in which no Python code runs, because all frames are skipped or `deliver` is in C. */
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
/* record(packets, first, keys, out, at, pcapng, clock): packets of a batch, or one, from the first-th on, as records of a capture
 * file behind the first `at` bytes of a buffer. `keys` are those of the file's interfaces, 64 bits each, see key_of() there, and `clock`
 * is the time in nanoseconds of packets that have none. Returns the number of the packet that comes next, where the records end, and, if it
 * stopped for an interface that is not among the keys, its key, else 0: if more packets follow then, there was no room for the next. */
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
    PyObject *call;    /* how the task is woken, and in which context; NULL once it is */
    PyObject *context;
    PyObject *failure; /* what result() raises */
    PyObject *run;     /* the string */
    char blocking;     /* asyncio's word for: a task awaits this, and has not been told of it yet */
    char armed;        /* the reader is registered, and will settle this one */
    bool done;         /* nobody waits, or who waits was or will be woken */
    bool found;        /* what result() gives: whether packets came */
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
