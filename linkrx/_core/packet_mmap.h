/* A ring that the kernel fills and this process empties: TPACKET_V3. */
struct lrx_packet_mmap;

/* Put a ring of `blocks` blocks of `block_size` bytes on an AF_PACKET socket; the kernel hands a block over
 * when it is full, or when `retire_ms` milliseconds are up and something is in it. `vnet` is the size of the
 * virtio-net header that the socket puts in front of frames, `capacity` what is kept of a packet, that header
 * included, `wanted` the LRX_TIMESTAMP and LRX_OUTGOING that are asked for, and `lends` whether blocks are to be lent
 * rather than copied from. NULL and errno, and the socket
 * as it was, when the kernel refuses. */
struct lrx_packet_mmap *lrx_packet_mmap_open(int fd, uint32_t block_size, uint32_t blocks, uint32_t retire_ms,
                                             uint32_t vnet, uint32_t capacity, uint32_t wanted,
                                             uint32_t lends);

/* Leave the kernel no room in a ring that is new, and give it room: a member of a fanout group that has none
 * passes packets on, and one that is not yet a member drops what the group receives too. */
void lrx_packet_mmap_shut(struct lrx_packet_mmap *s);
void lrx_packet_mmap_start(struct lrx_packet_mmap *s);

/* Take the ring off the socket, which gets back the PACKET_VERSION it had. */
void lrx_packet_mmap_close(struct lrx_packet_mmap *s);

/* In a forked child: the ring is the parent's. */
void lrx_packet_mmap_abandon(struct lrx_packet_mmap *s);

/* Copy at most `rows` packets into `size` bytes at `region`, and give each block back to the kernel with its last
 * packet. What does not fit stays in its block for the next call. Returns the number copied, or -errno, which
 * the header keeps too: the socket's error, told only when everything that came before it has been copied. */
int lrx_packet_mmap_fill(void *state, uintptr_t descriptors, uint32_t rows, uintptr_t region,
                         uint32_t size);

/* Of a ring that lends: the block that the last fill was about, where its packets' starts count from. It is the
 * caller's until it is returned, in whatever thread. A fill is about one block, whose last packets may take another. */
uintptr_t lrx_packet_mmap_block(const struct lrx_packet_mmap *s);
void lrx_packet_mmap_return(void *block);

/* Whether any block is lent. Then poll() on the socket tells nothing: it looks at the newest closed block alone. */
int lrx_packet_mmap_lent(const struct lrx_packet_mmap *s);

/* Such a ring stays mapped when it is closed, until its user unmaps it. */
uintptr_t lrx_packet_mmap_ring(const struct lrx_packet_mmap *s);
void lrx_packet_mmap_unmap(uintptr_t ring, size_t size);

/* Packets in the block that was begun and not yet given back. */
uint32_t lrx_packet_mmap_held(const struct lrx_packet_mmap *s);

/* Since the ring was made: packets that found no room in it, and how often it was found full. */
uint64_t lrx_packet_mmap_drops(struct lrx_packet_mmap *s);
uint64_t lrx_packet_mmap_freezes(struct lrx_packet_mmap *s);
