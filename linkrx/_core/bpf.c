/* Classic BPF: a program that was checked runs as net/core/filter.c runs it.
 *
 * It has no jump backwards and ends in a return, so it ends, and it reads no scratch word that it has not written. What it
 * loads of a frame is looked at as it runs: a load that passes the end rejects the packet. */
#include <linux/filter.h>
#include <stdbool.h>

#include "bpf.h"
#include "bpf_view.inc"

/* A and X start at zero; a division by zero rejects, and a shift counts modulo 32, as the kernel's do. */
static uint32_t run(const struct view *v)
{
    const struct lrx_instruction *i = v->filter->program;
    uint32_t scratch[SCRATCH], a = 0, x = 0, value = 0;

    for (;; i++) {
        const uint32_t k = i->k;

        switch (i->code) {
        case BPF_RET | BPF_K:
            return k;
        case BPF_RET | BPF_A:
            return a;
        case BPF_LD | BPF_W | BPF_ABS:
        case BPF_LD | BPF_H | BPF_ABS:
        case BPF_LD | BPF_B | BPF_ABS:
            if (k >= AD(0)) {
                if (!lrx_load_ancillary(v, k, x, &a))
                    return a;
                break;
            }
            if (!load(v, (int32_t)k, i->code == (BPF_LD | BPF_W | BPF_ABS) ? 4 : i->code == (BPF_LD | BPF_H | BPF_ABS) ? 2 : 1, &a))
                return 0;
            break;
        case BPF_LD | BPF_W | BPF_IND:
            if (!load(v, (int32_t)(x + k), 4, &a))
                return 0;
            break;
        case BPF_LD | BPF_H | BPF_IND:
            if (!load(v, (int32_t)(x + k), 2, &a))
                return 0;
            break;
        case BPF_LD | BPF_B | BPF_IND:
            if (!load(v, (int32_t)(x + k), 1, &a))
                return 0;
            break;
        case BPF_LDX | BPF_B | BPF_MSH:
            if (!load(v, (int32_t)k, 1, &value))
                return 0;
            x = (value & 15) << 2;
            break;
        case BPF_LD | BPF_W | BPF_LEN:
            a = v->packet->wire_length + (v->tag ? TAG : 0);
            break;
        case BPF_LDX | BPF_W | BPF_LEN:
            x = v->packet->wire_length + (v->tag ? TAG : 0);
            break;
        case BPF_LD | BPF_IMM:
            a = k;
            break;
        case BPF_LDX | BPF_IMM:
            x = k;
            break;
        case BPF_LD | BPF_MEM:
            a = scratch[k];
            break;
        case BPF_LDX | BPF_MEM:
            x = scratch[k];
            break;
        case BPF_ST:
            scratch[k] = a;
            break;
        case BPF_STX:
            scratch[k] = x;
            break;
        case BPF_MISC | BPF_TAX:
            x = a;
            break;
        case BPF_MISC | BPF_TXA:
            a = x;
            break;
        case BPF_JMP | BPF_JA:
            i += k;
            break;
        case BPF_JMP | BPF_JEQ | BPF_K:
            i += a == k ? i->jt : i->jf;
            break;
        case BPF_JMP | BPF_JEQ | BPF_X:
            i += a == x ? i->jt : i->jf;
            break;
        case BPF_JMP | BPF_JGT | BPF_K:
            i += a > k ? i->jt : i->jf;
            break;
        case BPF_JMP | BPF_JGT | BPF_X:
            i += a > x ? i->jt : i->jf;
            break;
        case BPF_JMP | BPF_JGE | BPF_K:
            i += a >= k ? i->jt : i->jf;
            break;
        case BPF_JMP | BPF_JGE | BPF_X:
            i += a >= x ? i->jt : i->jf;
            break;
        case BPF_JMP | BPF_JSET | BPF_K:
            i += a & k ? i->jt : i->jf;
            break;
        case BPF_JMP | BPF_JSET | BPF_X:
            i += a & x ? i->jt : i->jf;
            break;
        case BPF_ALU | BPF_NEG:
            a = 0 - a;
            break;
        default: {
            const uint32_t operand = BPF_SRC(i->code) == BPF_X ? x : k;

            switch (BPF_OP(i->code)) {
            case BPF_ADD:
                a += operand;
                break;
            case BPF_SUB:
                a -= operand;
                break;
            case BPF_MUL:
                a *= operand;
                break;
            case BPF_DIV:
                if (!operand)
                    return 0;
                a /= operand;
                break;
            case BPF_MOD:
                if (!operand)
                    return 0;
                a %= operand;
                break;
            case BPF_AND:
                a &= operand;
                break;
            case BPF_OR:
                a |= operand;
                break;
            case BPF_XOR:
                a ^= operand;
                break;
            case BPF_LSH:
                a <<= operand & 31;
                break;
            case BPF_RSH:
                a >>= operand & 31;
                break;
            }
        }
        }
    }
}

uint32_t lrx_filter_run(const struct lrx_filter *filter, const struct lrx_filtered *packet)
{
    const bool tag = filter->tags && packet->tagged && packet->length >= TAG_AT;
    const struct view v = {packet, filter, tag, packet->length + (tag ? TAG : 0)};
    uint32_t kept = run(&v);

    if (tag && kept > TAG_AT) /* of the frame that has no tag */
        kept = kept > TAG_AT + TAG ? kept - TAG : TAG_AT;
    return kept < packet->length ? kept : packet->length;
}
