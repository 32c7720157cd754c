/* The kernel's checks of a program: bpf_check_classic() of net/core/filter.c. */
#include <linux/filter.h>
#include <stdbool.h>
#include <string.h>

#include "bpf.h"
#include "bpf_view.inc"

static bool is_ancillary(uint32_t k)
{
    return k >= AD(0) && k < AD(SKF_AD_MAX) && k % 4 == 0;
}

/* Whether an instruction is valid, with `left` instructions after it. */
static bool is_legal(const struct lrx_instruction *i, uint32_t left)
{
    switch (i->code) {
    case BPF_ALU | BPF_DIV | BPF_K:
    case BPF_ALU | BPF_MOD | BPF_K:
        return i->k != 0;
    case BPF_ALU | BPF_LSH | BPF_K:
    case BPF_ALU | BPF_RSH | BPF_K:
        return i->k < 32;
    case BPF_LD | BPF_MEM:
    case BPF_LDX | BPF_MEM:
    case BPF_ST:
    case BPF_STX:
        return i->k < SCRATCH;
    case BPF_JMP | BPF_JA:
        return i->k < left;
    case BPF_JMP | BPF_JEQ | BPF_K:
    case BPF_JMP | BPF_JEQ | BPF_X:
    case BPF_JMP | BPF_JGE | BPF_K:
    case BPF_JMP | BPF_JGE | BPF_X:
    case BPF_JMP | BPF_JGT | BPF_K:
    case BPF_JMP | BPF_JGT | BPF_X:
    case BPF_JMP | BPF_JSET | BPF_K:
    case BPF_JMP | BPF_JSET | BPF_X:
        return i->jt < left && i->jf < left;
    case BPF_LD | BPF_W | BPF_ABS:
    case BPF_LD | BPF_H | BPF_ABS:
    case BPF_LD | BPF_B | BPF_ABS:
        return i->k < AD(0) || is_ancillary(i->k);
    case BPF_ALU | BPF_ADD | BPF_K:
    case BPF_ALU | BPF_ADD | BPF_X:
    case BPF_ALU | BPF_SUB | BPF_K:
    case BPF_ALU | BPF_SUB | BPF_X:
    case BPF_ALU | BPF_MUL | BPF_K:
    case BPF_ALU | BPF_MUL | BPF_X:
    case BPF_ALU | BPF_DIV | BPF_X:
    case BPF_ALU | BPF_MOD | BPF_X:
    case BPF_ALU | BPF_AND | BPF_K:
    case BPF_ALU | BPF_AND | BPF_X:
    case BPF_ALU | BPF_OR | BPF_K:
    case BPF_ALU | BPF_OR | BPF_X:
    case BPF_ALU | BPF_XOR | BPF_K:
    case BPF_ALU | BPF_XOR | BPF_X:
    case BPF_ALU | BPF_LSH | BPF_X:
    case BPF_ALU | BPF_RSH | BPF_X:
    case BPF_ALU | BPF_NEG:
    case BPF_LD | BPF_W | BPF_LEN:
    case BPF_LD | BPF_W | BPF_IND:
    case BPF_LD | BPF_H | BPF_IND:
    case BPF_LD | BPF_B | BPF_IND:
    case BPF_LD | BPF_IMM:
    case BPF_LDX | BPF_W | BPF_LEN:
    case BPF_LDX | BPF_B | BPF_MSH:
    case BPF_LDX | BPF_IMM:
    case BPF_MISC | BPF_TAX:
    case BPF_MISC | BPF_TXA:
    case BPF_RET | BPF_K:
    case BPF_RET | BPF_A:
        return true;
    }
    return false;
}

/* Check that a scratch word is written on every path before it is read: check_load_and_stores(). */
static uint32_t check_scratch(const struct lrx_instruction *program, uint32_t count)
{
    uint16_t written[LRX_FILTER_MOST], now = 0;

    memset(written, 0xFF, count * sizeof *written);
    for (uint32_t at = 0; at < count; at++) {
        const struct lrx_instruction *i = &program[at];

        now &= written[at];
        switch (i->code) {
        case BPF_ST:
        case BPF_STX:
            now |= (uint16_t)(1u << i->k);
            break;
        case BPF_LD | BPF_MEM:
        case BPF_LDX | BPF_MEM:
            if (!(now & 1u << i->k))
                return at + 1;
            break;
        case BPF_JMP | BPF_JA:
            written[at + 1 + i->k] &= now;
            now = 0xFFFF;
            break;
        default:
            if (BPF_CLASS(i->code) == BPF_JMP) {
                written[at + 1 + i->jt] &= now;
                written[at + 1 + i->jf] &= now;
                now = 0xFFFF;
            }
        }
    }
    return 0;
}

uint32_t lrx_filter_check(const struct lrx_instruction *program, uint32_t count)
{
    if (count == 0)
        return 1;
    if (count > LRX_FILTER_MOST)
        return LRX_FILTER_MOST + 1;
    for (uint32_t at = 0; at < count; at++)
        if (!is_legal(&program[at], count - 1 - at))
            return at + 1;
    if (BPF_CLASS(program[count - 1].code) != BPF_RET)
        return count;
    return check_scratch(program, count);
}
