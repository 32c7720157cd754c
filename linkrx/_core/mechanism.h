#pragma once
#include <stdint.h>

/* The functions of a mechanism in C, which the receiver calls: see linkrx/_core/types/receive.c. */
struct lrx_mechanism {
    int (*fill)(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region, uint32_t size);
    void *state;
    /* NULL, or the slots of a mechanism that describes packets in its own memory. */
    struct lrx_slots *slots;
    void (*release)(void *state, uint32_t slot);
};

/* Two slots take turns. A fill that received something has used slot `turn ^ 1`, and the next will use slot `turn`, which must
 * be released before. */
struct lrx_slots {
    uintptr_t frames[2];    /* the address from which the starts of the slot's packets count */
    uint32_t unreleased[2]; /* blocks of the slot, which its release gives back to the kernel */
    uint32_t turn;
    uint32_t unused;
    uintptr_t guard;     /* the address of a word that is 0 in a child process, where the memory is not mapped, and else 1 */
};
