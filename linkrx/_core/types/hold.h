/* Holding packets back for `latency`: hold.c. */
#pragma once
#include "types.h"

/* The number of frames that are held back. */
static inline uint32_t lrx_held_back(const Receiver *r)
{
    return r->collected ? r->collected->count : 0;
}
/* Allocate the memory for holding packets back. */
int lrx_prepare_holding(Receiver *r);
/* Whether so many frames are held back that there is no room for another fill. */
bool lrx_holds_full(const Receiver *r);
/* Hold back the `count` frames of the last fill. */
void lrx_collect(Receiver *r, uint32_t count);
/* Classify the frames that are held back. */
void lrx_classify_collected(Receiver *r);
/* Receive what is in the queue, and hold it back. READY: something came. NOTHING: nothing did. OVER: hand over what is held back now. */
enum outcome lrx_hold_more(Receiver *r);
/* Hold back what comes until `latency` is over, a batch is full, or something else is to be done. -1: with an exception. */
int lrx_hold_back(Receiver *r, double deadline);

/* receiver.c */
PyObject *lrx_receiver_hold_back(PyObject *self, PyObject *unused);
