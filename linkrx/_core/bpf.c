/* Classic BPF: runs checked programs as net/core/filter.c does.
 *
 * A checked program has no jump backwards and ends with a return, so it terminates. It reads no scratch word before it has
 * written it. Loads are checked at run time: a load beyond the end of the frame rejects the packet. */
#include <linux/filter.h>
#include <stdbool.h>

#include "bpf.h"
#include "bpf_view.inc"
#include "file_type.inc"

/* The next 1, 2 or 4 bytes, big-endian. */
static inline uint32_t number(const uint8_t *from, uint32_t size)
{
    switch (size) {
    case 1:
        return from[0];
    case 2:
        return (uint32_t)(from[0] << 8 | from[1]);
    default:
        return (uint32_t)from[0] << 24 | (uint32_t)from[1] << 16 | (uint32_t)from[2] << 8 | from[3];
    }
}

/* Load into `to`. lrx_load() handles offsets relative to a header, and frames with a VLAN tag. */
#define LOAD(to, at, size)                                \
    do {                                                  \
        const uint32_t offset = at;                       \
                                                          \
        if (offset <= simple && simple - offset >= size)  \
            to = number(frame + offset, size);            \
        else if (!lrx_load(v, (int32_t)offset, size, &to)) \
            return 0;                                     \
    } while (0)

/* Every operation and comparison of A with an operand: K or X. */
#define PLACES(with, name)                                                                             \
    [BPF_ALU | BPF_ADD | with] = &&add_##name, [BPF_ALU | BPF_SUB | with] = &&sub_##name,              \
    [BPF_ALU | BPF_MUL | with] = &&mul_##name, [BPF_ALU | BPF_DIV | with] = &&div_##name,              \
    [BPF_ALU | BPF_MOD | with] = &&mod_##name, [BPF_ALU | BPF_AND | with] = &&and_##name,              \
    [BPF_ALU | BPF_OR | with] = &&or_##name, [BPF_ALU | BPF_XOR | with] = &&xor_##name,                \
    [BPF_ALU | BPF_LSH | with] = &&lsh_##name, [BPF_ALU | BPF_RSH | with] = &&rsh_##name,              \
    [BPF_JMP | BPF_JEQ | with] = &&jeq_##name, [BPF_JMP | BPF_JGT | with] = &&jgt_##name,              \
    [BPF_JMP | BPF_JGE | with] = &&jge_##name, [BPF_JMP | BPF_JSET | with] = &&jset_##name

#define OPERATIONS(name, operand)               \
    add_##name : a += operand;                  \
    NEXT;                                       \
    sub_##name : a -= operand;                  \
    NEXT;                                       \
    mul_##name : a *= operand;                  \
    NEXT;                                       \
    div_##name : if (!operand) return 0;        \
    a /= operand;                               \
    NEXT;                                       \
    mod_##name : if (!operand) return 0;        \
    a %= operand;                               \
    NEXT;                                       \
    and_##name : a &= operand;                  \
    NEXT;                                       \
    or_##name : a |= operand;                   \
    NEXT;                                       \
    xor_##name : a ^= operand;                  \
    NEXT;                                       \
    lsh_##name : a <<= operand & 31;            \
    NEXT;                                       \
    rsh_##name : a >>= operand & 31;            \
    NEXT;                                       \
    jeq_##name : i += a == operand ? i->jt : i->jf; \
    NEXT;                                       \
    jgt_##name : i += a > operand ? i->jt : i->jf;  \
    NEXT;                                       \
    jge_##name : i += a >= operand ? i->jt : i->jf; \
    NEXT;                                       \
    jset_##name : i += a & operand ? i->jt : i->jf; \
    NEXT

/* As in the kernel, A and X start at zero, a division by zero rejects, and shifts count modulo 32. Each instruction jumps to the
 * next. The processor predicts that better than one switch for all: `udp port 53` takes 15 ns instead of 29. */
#define NEXT goto *places[(++i)->code]

static uint32_t run(const struct lrx_instruction *i, const struct view *v)
{
    static const void *const places[] = {
        [BPF_LD | BPF_W | BPF_ABS] = &&ld_word,
        [BPF_LD | BPF_H | BPF_ABS] = &&ld_half,
        [BPF_LD | BPF_B | BPF_ABS] = &&ld_byte,
        [BPF_LD | BPF_W | BPF_IND] = &&ld_word_x,
        [BPF_LD | BPF_H | BPF_IND] = &&ld_half_x,
        [BPF_LD | BPF_B | BPF_IND] = &&ld_byte_x,
        [BPF_LDX | BPF_B | BPF_MSH] = &&ldx_header,
        [BPF_LD | BPF_W | BPF_LEN] = &&ld_length,
        [BPF_LDX | BPF_W | BPF_LEN] = &&ldx_length,
        [BPF_LD | BPF_IMM] = &&ld_k,
        [BPF_LDX | BPF_IMM] = &&ldx_k,
        [BPF_LD | BPF_MEM] = &&ld_scratch,
        [BPF_LDX | BPF_MEM] = &&ldx_scratch,
        [BPF_ST] = &&st,
        [BPF_STX] = &&stx,
        [BPF_MISC | BPF_TAX] = &&tax,
        [BPF_MISC | BPF_TXA] = &&txa,
        [BPF_JMP | BPF_JA] = &&ja,
        [BPF_ALU | BPF_NEG] = &&neg,
        [BPF_RET | BPF_K] = &&ret_k,
        [BPF_RET | BPF_A] = &&ret_a,
        PLACES(BPF_K, k),
        PLACES(BPF_X, x),
    };
    const uint8_t *frame = v->packet->frame;
    const uint32_t simple = v->tag ? 0 : v->length; /* bytes at the offset that the program uses */
    uint32_t scratch[SCRATCH], a = 0, x = 0, value = 0;

    goto *places[i->code];
ld_word:
    if (i->k >= AD(0))
        goto ancillary;
    LOAD(a, i->k, 4);
    NEXT;
ld_half:
    if (i->k >= AD(0))
        goto ancillary;
    LOAD(a, i->k, 2);
    NEXT;
ld_byte:
    if (i->k >= AD(0))
        goto ancillary;
    LOAD(a, i->k, 1);
    NEXT;
ancillary:
    if (!lrx_load_ancillary(v, i->k, x, &a))
        return a;
    NEXT;
ld_word_x:
    LOAD(a, x + i->k, 4);
    NEXT;
ld_half_x:
    LOAD(a, x + i->k, 2);
    NEXT;
ld_byte_x:
    LOAD(a, x + i->k, 1);
    NEXT;
ldx_header:
    LOAD(value, i->k, 1);
    x = (value & 15) << 2;
    NEXT;
ld_length:
    a = v->packet->wire_length + (v->tag ? TAG : 0);
    NEXT;
ldx_length:
    x = v->packet->wire_length + (v->tag ? TAG : 0);
    NEXT;
ld_k:
    a = i->k;
    NEXT;
ldx_k:
    x = i->k;
    NEXT;
ld_scratch:
    a = scratch[i->k];
    NEXT;
ldx_scratch:
    x = scratch[i->k];
    NEXT;
st:
    scratch[i->k] = a;
    NEXT;
stx:
    scratch[i->k] = x;
    NEXT;
tax:
    x = a;
    NEXT;
txa:
    a = x;
    NEXT;
ja:
    i += i->k;
    NEXT;
neg:
    a = 0 - a;
    NEXT;
ret_k:
    return i->k;
ret_a:
    return a;
    OPERATIONS(k, i->k);
    OPERATIONS(x, x);
}

/* Run the program of a link type on a packet with its pseudo-header. */
static uint32_t run_on_record(const struct lrx_file_programs *files, const struct lrx_filtered *packet)
{
    const struct lrx_instruction *program = lrx_file_program(files, packet->file_type);
    const uint32_t head = lrx_file_head(packet->file_type);
    struct lrx_filtered record = *packet;
    const struct view v = {&record, false, packet->length + head};
    uint32_t kept;

    if (!program)
        return 0;
    record.frame -= head;
    record.length += head;
    record.wire_length += head;
    record.link_header += head;
    kept = run(program, &v);
    if (kept <= head)
        return 0;
    return kept - head < packet->length ? kept - head : packet->length;
}

uint32_t lrx_filter_run(const struct lrx_filter *filter, const struct lrx_filtered *packet)
{
    const bool tag = filter->tags && packet->tagged && packet->length >= TAG_AT;
    const struct view v = {packet, tag, packet->length + (tag ? TAG : 0)};
    uint32_t kept;

    if (filter->files)
        return run_on_record(filter->files, packet);
    kept = run(filter->program, &v);
    if (tag && kept > TAG_AT) /* without the tag, which is not in the frame */
        kept = kept > TAG_AT + TAG ? kept - TAG : TAG_AT;
    return kept < packet->length ? kept : packet->length;
}
