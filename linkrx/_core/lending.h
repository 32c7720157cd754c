/* Blocks of a ring that are lent rather than copied from. A batch is made of up to `most` blocks that follow each
 * other, and nobody copies anything, as long as the blocks can be given back two receives later. If somebody keeps
 * a packet until then, what is lent is copied, and takes the place of the ring in the memory of this process; the
 * ring is mapped anew elsewhere. From then on all is copied, until nothing was kept for `pause` receives. */
struct lrx_loans {
    uintptr_t ring;      /* where the ring is mapped now */
    uint32_t most;       /* blocks in a loan, at most; with 0 nothing is lent */
    uint32_t pause;
    uint32_t rest;       /* receives to come that copy, whether anything is offered or not */
    uint32_t offered;    /* batches can be made of the ring where it is mapped now */
    uint32_t turn;       /* which of two loans the next receive may make, if it is over */
    uint32_t over;       /* the loan whose turn is next is over: the next receive gives its blocks back */
    uint32_t lent;       /* the last receive made a loan, and not that whose turn is next */
    uint32_t first[2];   /* block */
    uint32_t blocks[2];  /* 0: it is over */
};

/* Memory that outlives a ring: what took its place, or the ring itself where it lends until it is returned. */
struct lrx_kept {
    uintptr_t memory;
    size_t size;
};

/* From the next fill on. Both must outlive the ring's fills. */
void lrx_ring_lend(struct lrx_ring *s, struct lrx_loans *loans);

/* Whoever sees anything lent sees the same bytes in memory of this process's own from here on, also in its children,
 * and `kept` tells which that is. The ring is mapped anew. Nothing is lent for a pause; and nothing else happens where
 * nothing is. 0 or -errno, with all as it was. */
int lrx_ring_hand_over(struct lrx_ring *s, struct lrx_kept *kept);

/* The same for a ring that is about to be closed: it is not mapped anew. Where there is no memory for a copy, the ring
 * itself is what is kept. */
void lrx_ring_leave(struct lrx_ring *s, struct lrx_kept *kept);

/* Whether children have the ring as well: while they do, it cannot be taken off its socket. */
void lrx_ring_inherit(struct lrx_ring *s, int whether);

/* Nobody looks at it any more. Idempotent. `ring` is for whoever calls this of a pointer to there. */
void lrx_kept_unmap(struct lrx_kept *kept, void *ring);

/* Of a ring that lends until it is returned: the block that the last fill was about, where its packets' starts count
 * from. It is the caller's until it is returned, in whatever thread. A fill is about one block, whose last packets may
 * take another. */
uintptr_t lrx_ring_block(const struct lrx_ring *s);
void lrx_ring_return(void *block);

/* Whether any block is lent until it is returned. Then poll() on the socket tells nothing: it looks at the newest
 * closed block alone. */
int lrx_ring_lent(const struct lrx_ring *s);
