"""Valid and invalid programs of classic BPF, made by a seeded generator, and functions that run them in the kernel and in the core."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Sequence

from linkrx import _core
from linkrx.kernel import bpf
from linkrx.kernel.bpf import Instruction
from linkrx.sources.socket_filter import attach

# Loads whose value only the kernel knows, or that differ each time.
_UNPREDICTABLE = {bpf.AD_CPU, bpf.AD_RANDOM, bpf.AD_RXHASH, bpf.AD_QUEUE, bpf.AD_MARK}
ANYWHERE = tuple(k for k in range(bpf.AD_OFF, bpf.AD_OFF + 64, 4) if k not in _UNPREDICTABLE)

ACCEPT: Instruction = (bpf.RET, 0, 0, 0xFFFFFFFF)
LOADS = tuple(code for code in sorted(bpf.CODES) if code & 7 in (bpf.LD, bpf.LDX))
JUMPS = tuple(code for code in sorted(bpf.CODES) if code & 7 == bpf.JMP)
REST = tuple(code for code in sorted(bpf.CODES) if code & 7 not in (bpf.LD, bpf.LDX, bpf.JMP))


def packed(program: Sequence[Instruction]) -> bytes:
    """The program as an array of struct sock_filter."""
    return b"".join(struct.pack("=HBBI", *one) for one in program)


class Maker:
    """Makes programs that read frames of about `size` bytes. `ancillary`: the ancillary loads that they may use."""

    def __init__(
        self, seed: int, size: int, ancillary: Sequence[int], *, headers: Sequence[int] = ()
    ) -> None:
        self.random = random.Random(seed)
        self._size = size
        self._ancillary = ancillary
        self._headers = headers

    def program(self) -> list[Instruction]:
        """A program. Most of them are valid."""
        chosen = self.random
        length = chosen.choice((1, 2, 4, 8, 16, 40))
        made = [(bpf.LD | bpf.IMM, 0, 0, self._number()), (bpf.ST, 0, 0, 1), (bpf.STX, 0, 0, 2)]
        made += [self._instruction(length - at) for at in range(length)]
        made.append(chosen.choice(((bpf.RET | bpf.RET_A, 0, 0, 0), (bpf.RET, 0, 0, self._number()), ACCEPT)))
        return made

    def broken(self) -> list[Instruction]:
        """A program with one changed field, which is often invalid."""
        program, chosen = self.program(), self.random
        at = chosen.randrange(len(program))
        code, jt, jf, k = program[at]
        wrong = chosen.randrange(5)
        if wrong == 0:
            code = chosen.randrange(0x110)
        elif wrong == 1:
            jt, jf = chosen.randrange(256), chosen.randrange(256)
        elif wrong == 2:
            k = chosen.choice((0, 16, 32, 2**31, 2**32 - 1, 2**32 - 4096, 2**32 - 4000, len(program) - at))
        elif wrong == 3:
            return program[: at + 1]
        else:
            code = chosen.choice((bpf.LD | bpf.MEM, bpf.LDX | bpf.MEM, bpf.ALU | bpf.DIV, bpf.JMP | bpf.JA))
        program[at] = (code, jt, jf, k)
        return program

    def _number(self) -> int:
        chosen = self.random
        return chosen.choice(
            (
                0,
                1,
                chosen.randrange(self._size + 4),
                chosen.randrange(256),
                chosen.randrange(2**16),
                chosen.randrange(2**32),
                2**32 - 1 - chosen.randrange(8),
            )
        )

    def _instruction(self, left: int) -> Instruction:
        chosen = self.random
        code = chosen.choice(chosen.choice((LOADS, LOADS, JUMPS, REST)))
        jt, jf, k = 0, 0, self._number()
        if code & 7 == bpf.JMP:
            if code == bpf.JMP | bpf.JA:
                k = chosen.randrange(left)
            else:
                jt, jf = chosen.randrange(left), chosen.randrange(left)
                k = k if chosen.randrange(2) else chosen.randrange(256)
        elif code & 7 == bpf.RET and chosen.randrange(4):
            code = bpf.MISC | bpf.TAX  # else most programs are short
        elif code in (bpf.LD | bpf.MEM, bpf.LDX | bpf.MEM):
            k = chosen.choice((1, 2))
        elif code in (bpf.ST, bpf.STX):
            k = chosen.randrange(bpf.SCRATCH_WORDS)
        elif code in (bpf.ALU | bpf.LSH, bpf.ALU | bpf.RSH):
            k = chosen.randrange(32)
        elif code in (bpf.ALU | bpf.DIV, bpf.ALU | bpf.MOD):
            k = k or 3
        elif code & 7 in (bpf.LD, bpf.LDX) and code & 0xE0 in (bpf.ABS, bpf.IND, bpf.MSH):
            # Most loads are within the frame.
            places = [chosen.randrange(self._size), chosen.randrange(self._size + 8)] * 2
            places += [header % 2**32 + chosen.randrange(self._size) for header in self._headers]
            k = chosen.choice(places)
            if bpf.is_absolute(code) and self._ancillary and not chosen.randrange(4):
                k = chosen.choice(self._ancillary)
        return code, jt, jf, k


def in_core(program: Sequence[Instruction], packet: bpf.Filtered, *, tags: bool = False) -> int:
    """The number of bytes that lrx_filter_run() keeps."""
    memory = bytearray(packed(program))
    described = _core.new(
        "struct lrx_filter *",
        program=_core.at("struct lrx_instruction *", _core.address(memory)),
        tags=tags,
    )
    frame = bytearray(packet.frame) or bytearray(1)
    tpid, tci = packet.vlan or (0, 0)
    asked = _core.new(
        "struct lrx_filtered *",
        frame=_core.at("uint8_t *", _core.address(frame)),
        length=len(packet.frame),
        wire_length=packet.wire_length,
        link_header=packet.link_header,
        link_type=packet.link_type,
        protocol=packet.protocol,
        interface=packet.interface,
        outgoing=packet.outgoing,
        tagged=packet.vlan is not None,
        vlan_tci=tci,
        vlan_tpid=tpid,
    )
    kept: int = _core.lib.lrx_filter_run(described, asked)
    return kept


def wrong_in_core(program: Sequence[Instruction]) -> int | None:
    """The index of the invalid instruction that lrx_filter_check() reports, or None."""
    memory = bytearray(packed(program)) or bytearray(8)
    place: int = _core.lib.lrx_filter_check(
        _core.at("struct lrx_instruction *", _core.address(memory)), len(program)
    )
    return place - 1 if place else None


def kernel_takes(sock: socket.socket, program: Sequence[Instruction]) -> bool:
    """Whether the kernel attaches the program."""
    if not program:
        return False  # SO_ATTACH_FILTER with a length of 0 is EINVAL; attach() takes the filter off
    try:
        attach(sock.fileno(), packed(program))
    except OSError:
        return False
    return True
