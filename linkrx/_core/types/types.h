/* What the types that Python touches once per packet share. One rule of memory: docs in memory.c. */
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>

#include "../packet.h"
#include "../columns.inc"

#define ETHER_ADDRESS 6
#define ETHER_HEADER 14
#define VNET_HEADER 10 /* linux/virtio_net.h: struct virtio_net_hdr */

/* Where the frames of an arena start: see memory.c. */
#define ARENA_START 64

typedef struct State State;
typedef struct Owner Owner;
typedef struct Table Table;
typedef struct Batch Batch;
typedef struct Packet Packet;

/* What the module holds: there are no globals. */
struct State {
    PyTypeObject *owner_type;
    PyTypeObject *table_type;
    PyTypeObject *batch_type;
    PyTypeObject *batch_iterator_type;
    PyTypeObject *packet_type;
    PyTypeObject *receiver_type;
    PyObject *headers; /* the module linkrx.headers: what is asked for rarely is written there, in Python */
    /* PyObject_Vectorcall() is in CPython 3.11, but not in its limited API. NULL where it cannot be found. */
    PyObject *(*vectorcall)(PyObject *, PyObject *const *, size_t, PyObject *);
};

/* Memory that frames lie in: an arena of a receiver, or a few blocks of a ring. */
struct Owner {
    PyObject_HEAD
    uint8_t *memory;
    size_t mapped;                  /* bytes of an arena; 0 for memory that is a ring's */
    const volatile uint32_t *guard; /* of a ring: 0 in a child that was forked without Python's hooks */
    Packet *packets;                /* those that read in place here */
    Batch *batch;                   /* whose frames lie here; it takes itself out when it dies */
    bool exporting_view;            /* while a writable view is made, for mechanisms written in Python */
};

/* The columns of one batch. It refers to nothing, so a view of a column keeps the columns and no frame. */
struct Table {
    PyObject_VAR_HEAD
    Py_ssize_t count; /* of rows; the shape of every column */
    int column;       /* which one the next view is of */
    int64_t *timestamps;
    uint32_t *places; /* where each frame lies behind the batch's base; not shown */
    uint32_t *starts; /* where each frame starts in the batch's `memory` */
    uint32_t *lengths;
    uint32_t *wire_lengths;
    uint32_t *interfaces;
    uint16_t *protocols;
    uint16_t *flags;
    uint16_t *vlan_tcis;
    uint16_t *vlan_tpids;
};

/* What stands in front of a packet's data on one source. */
typedef struct {
    uint8_t link_header; /* 14 or 0 */
    uint8_t big_endian;  /* of the virtio-net header's numbers */
    uint32_t vnet;       /* bytes of the virtio-net header in front of each frame; 0, or 10 and more */
} Framing;

#define COLUMNS 10 /* that are shown */

struct Batch {
    PyObject_HEAD
    State *state;
    Owner *owner;        /* whose memory `base` is in; NULL once the frames are in `own` */
    const uint8_t *base; /* frame i is at base + table->places[i] */
    PyObject *own;       /* bytes: the frames, once they were copied */
    Table *table;
    Py_ssize_t exports;  /* views of `memory` that somebody has, while that is the arena */
    uint32_t size;       /* bytes of `memory` */
    Framing framing;
    bool settled;        /* the owner is this batch's alone, or nobody's: packets are copied as they are made */
    bool tidy;           /* between frames there are zeroes */
    PyObject *columns[COLUMNS];
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
    uint16_t protocol;
    uint16_t flags;
    uint16_t vlan_tci;
    uint16_t vlan_tpid;
    uint8_t link_header;
    uint8_t has_vnet : 2; /* 0, 1, or 2 where its numbers are big-endian */
    uint8_t viewing : 2;  /* which part the view that is being made is of */
    uint8_t vnet[VNET_HEADER];
};

/* memory.c */
enum taken { TAKEN_NOT = -1, TAKEN_BACK, GIVEN_AWAY };
extern PyType_Spec lrx_owner_spec;
Owner *lrx_owner_new(State *state, size_t size);
bool lrx_owner_is_free(const Owner *o);
/* Whatever still reads in place here is copied. GIVEN_AWAY: somebody looks at the arena itself, which is theirs from now
 * on. TAKEN_NOT and MemoryError: nothing is lost, and the memory must not be used again yet. */
enum taken lrx_owner_take_back(Owner *o);

/* packet.c */
extern PyType_Spec lrx_packet_spec;
Packet *lrx_packet_new(State *state);
/* Make it packet `index` of a batch. Nobody else may have it. */
int lrx_packet_set(Packet *p, const Batch *batch, uint32_t index);
/* The frame becomes the packet's own. */
int lrx_packet_own(Packet *p);
/* It shows nothing any more. Nobody else may have it. */
void lrx_packet_reset(Packet *p);
PyObject *lrx_packet_restore(PyObject *module, PyObject *args);
/* The one in `slot`, if nobody else has it, or a new one in its place. One that somebody has becomes its own. */
Packet *lrx_packet_in(State *state, Packet **slot);

/* batch.c */
extern PyType_Spec lrx_table_spec, lrx_batch_spec, lrx_batch_iterator_spec;
/* The first `count` rows of `columns`, whose frames lie in the first `size` bytes at `base`, in memory of `owner`, where no
 * other batch is. ValueError for frames that do not. */
Batch *lrx_batch_new(State *state, Owner *owner, const uint8_t *base, uint32_t size, const struct lrx_columns *columns,
                     uint32_t count, Framing framing);
/* Leave the first `n` packets out. Only for a batch that nobody has seen. */
void lrx_batch_skip(Batch *b, uint32_t n);
int lrx_batch_own(Batch *b);

/* receiver.c */
extern PyType_Spec lrx_receiver_spec;

static inline void lrx_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}
