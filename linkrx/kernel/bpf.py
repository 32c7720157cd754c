"""Classic BPF, the language of socket filters: the checks of the kernel, and an interpreter.

`_core/bpf.c` is the same in C. Tests compare both with the kernel. Instructions are as `tcpdump -ddd` writes them:
code, jump if true, jump if false, operand.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from linkrx.kernel.uapi import ETH_HEADER_BYTES, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, NLA_TYPE_MASK

Instruction = tuple[int, int, int, int]

INSTRUCTIONS_MOST = 4096  # linux/bpf_common.h: BPF_MAXINSNS
SCRATCH_WORDS = 16  # linux/filter.h: BPF_MEMWORDS

# linux/bpf_common.h: the class of an instruction, the size and place of a load, an operation, and its operand.
LD, LDX, ST, STX, ALU, JMP, RET, MISC = range(8)
SIZES = {0x00: 4, 0x08: 2, 0x10: 1}
IMM, ABS, IND, MEM, LEN, MSH = 0x00, 0x20, 0x40, 0x60, 0x80, 0xA0
ADD, SUB, MUL, DIV, OR, AND, LSH, RSH, NEG, MOD, XOR = range(0x00, 0xB0, 0x10)
JA, JEQ, JGT, JGE, JSET = range(0x00, 0x50, 0x10)
X = 0x08
RET_A = 0x10
TAX, TXA = 0x00, 0x80

# linux/filter.h: operands that name no place in the frame.
AD_OFF = 0xFFFFF000  # SKF_AD_OFF, as 32 bits
NET_OFF = -0x100000
LL_OFF = -0x200000
(
    AD_PROTOCOL,
    AD_PKTTYPE,
    AD_IFINDEX,
    AD_NLATTR,
    AD_NLATTR_NEST,
    AD_MARK,
    AD_QUEUE,
    AD_HATYPE,
    AD_RXHASH,
    AD_CPU,
    AD_XOR_X,
    AD_VLAN_TAG,
    AD_VLAN_TAG_PRESENT,
    AD_PAY_OFFSET,
    AD_RANDOM,
    AD_VLAN_TPID,
) = range(AD_OFF, AD_OFF + 64, 4)

TAG_AT, TAG_BYTES = 12, 4

_LOADS = {
    *(LD | size | where for size in SIZES for where in (ABS, IND)),
    LD | LEN,
    LD | IMM,
    LD | MEM,
    LDX | LEN,
    LDX | IMM,
    LDX | MEM,
    LDX | 0x10 | MSH,
}
CODES = frozenset(
    _LOADS
    | {ST, STX, MISC | TAX, MISC | TXA, RET, RET | RET_A, JMP | JA, ALU | NEG}
    | {
        ALU | operation | source
        for operation in range(0, 0xB0, 0x10)
        if operation != NEG
        for source in (0, X)
    }
    | {JMP | test | source for test in (JEQ, JGT, JGE, JSET) for source in (0, X)}
)

_WORD = 0xFFFFFFFF


def is_absolute(code: int) -> bool:
    """Whether it loads from a place that its operand names."""
    return code & 0x07 == LD and code & 0xE0 == ABS


def wrong(program: Sequence[Instruction], most: int = INSTRUCTIONS_MOST) -> tuple[int, str] | None:
    """The first instruction that the kernel would refuse, and why; None for a program that it takes: bpf_check_classic()."""
    if not program:
        return 0, "there is no instruction; one that takes every packet is (6, 0, 0, 0xFFFFFFFF)"
    if len(program) > most:
        return most, f"the kernel takes {most} instructions at most"
    for index, instruction in enumerate(program):
        reason = _illegal(instruction, len(program) - 1 - index)
        if reason:
            return index, reason
    if program[-1][0] & 0x07 != RET:
        return len(program) - 1, "the last instruction is no return (code 6 or 22)"
    return _unwritten(program)


def _illegal(instruction: Instruction, left: int) -> str | None:
    code, jt, jf, k = instruction
    if code not in CODES:
        return f"there is no code {code:#x}"
    if code in (ALU | DIV, ALU | MOD) and k == 0:
        return "it divides by zero"
    if code in (ALU | LSH, ALU | RSH) and k >= 32:
        return f"it shifts 32 bits by {k}"
    if code in (LD | MEM, LDX | MEM, ST, STX) and k >= SCRATCH_WORDS:
        return f"there is no scratch word {k}: there are {SCRATCH_WORDS}, from 0 on"
    if code == JMP | JA and k >= left:
        backwards = f", or backwards by {2**32 - k}, which no program may" if k >= 2**31 else ""
        return f"it jumps {k} instructions on, and {left} follow{backwards}"
    if code & 0x07 == JMP and code != JMP | JA and max(jt, jf) >= left:
        return f"it jumps {max(jt, jf)} instructions on, and {left} follow"
    if is_absolute(code) and k >= AD_OFF and not (k < AD_OFF + 64 and k % 4 == 0):
        return f"there is no ancillary load {k:#x}: linux/filter.h has SKF_AD_*"
    return None


def _unwritten(program: Sequence[Instruction]) -> tuple[int, str] | None:
    """check_load_and_stores(): the scratch words that are written on every path to an instruction."""
    every = (1 << SCRATCH_WORDS) - 1
    written, now = [every] * len(program), 0
    for index, (code, jt, jf, k) in enumerate(program):
        now &= written[index]
        if code in (ST, STX):
            now |= 1 << k
        elif code in (LD | MEM, LDX | MEM) and not now >> k & 1:
            return index, f"it reads scratch word {k}, which nothing has written on some way there"
        elif code & 0x07 == JMP:
            for jump in (k,) if code == JMP | JA else (jt, jf):
                written[index + 1 + jump] &= now
            now = every
    return None


@dataclass(frozen=True)
class Filtered:
    """One frame and the metadata that a program can read. `interface` 0: not known."""

    frame: bytes | memoryview
    wire_length: int
    link_header: int = ETH_HEADER_BYTES
    interface: int = 0
    link_type: int = 0
    outgoing: bool = False
    vlan: tuple[int, int] | None = None  # TPID and TCI of the tag that the kernel took out
    protocol: int = 0  # as the kernel reports it; 0: as in the frame


class _Rejected(Exception):
    """A load passes the end, or a division is by zero."""


def kept(program: Sequence[Instruction], packet: Filtered, *, tags: bool = False) -> int:
    """Run a program that was checked: how many bytes of the frame are kept; 0 rejects the packet.

    `tags`: it reads the frame with the tag put back.
    """
    frame, length = packet.frame, len(packet.frame)
    back = tags and packet.vlan is not None and length >= TAG_AT
    wire_length = packet.wire_length
    if back and packet.vlan is not None:
        frame = b"".join((frame[:TAG_AT], struct.pack("!HH", *packet.vlan), frame[TAG_AT:]))
        wire_length += TAG_BYTES
    try:
        verdict = _run(program, _Loads(frame, packet), wire_length)
    except _Rejected:
        return 0
    if back and verdict > TAG_AT:
        verdict = max(verdict - TAG_BYTES, TAG_AT)
    return min(verdict, length)


def _run(program: Sequence[Instruction], loads: _Loads, wire_length: int) -> int:
    scratch = [0] * SCRATCH_WORDS
    at = a = x = 0
    while True:
        code, jt, jf, k = program[at]
        at += 1
        kind, mode, operation = code & 0x07, code & 0xE0, code & 0xF0
        operand = x if code & X else k
        if kind == RET:
            return a if code & RET_A else k
        if kind in (LD, LDX):
            value = 0
            if mode == ABS:
                if k in (AD_IFINDEX, AD_HATYPE) and not loads.has_device:
                    return a  # as the kernel does
                value = loads.ancillary(k, a, x) if k >= AD_OFF else loads.at(k, SIZES[code & 0x18])
            elif mode == IND:
                value = loads.at(x + k & _WORD, SIZES[code & 0x18])
            elif mode == MSH:
                value = (loads.at(k, 1) & 15) << 2
            elif mode == LEN:
                value = wire_length
            else:
                value = scratch[k] if mode == MEM else k
            if kind == LD:
                a = value
            else:
                x = value
        elif kind in (ST, STX):
            scratch[k] = a if kind == ST else x
        elif kind == MISC:
            if code & 0xF8 == TXA:
                a = x
            else:
                x = a
        elif kind == JMP:
            at += k if operation == JA else jt if _holds(operation, a, operand) else jf
        else:
            a = _computed(operation, a, operand) & _WORD


def _holds(test: int, a: int, operand: int) -> bool:
    if test == JEQ:
        return a == operand
    if test == JGT:
        return a > operand
    return a >= operand if test == JGE else bool(a & operand)


def _computed(operation: int, a: int, operand: int) -> int:
    if operation in (DIV, MOD):
        if operand == 0:
            raise _Rejected
        return a // operand if operation == DIV else a % operand
    if operation == ADD:
        return a + operand
    if operation == SUB:
        return a - operand
    if operation == MUL:
        return a * operand
    if operation == AND:
        return a & operand
    if operation == OR:
        return a | operand
    if operation == XOR:
        return a ^ operand
    if operation == LSH:
        return a << (operand & 31)
    return -a if operation == NEG else a >> (operand & 31)


class _Loads:
    """The loads of a program from one packet."""

    def __init__(self, frame: bytes | memoryview, packet: Filtered) -> None:
        self._frame = frame
        self._packet = packet
        self.has_device = packet.interface != 0

    def at(self, k: int, size: int) -> int:
        """`size` bytes, big-endian, at an operand of 32 bits."""
        if k >= 2**31:  # it counts from a header
            k -= 2**32
            if k < LL_OFF:
                raise _Rejected
            k = k - NET_OFF + self._packet.link_header if k >= NET_OFF else k - LL_OFF
        if k + size > len(self._frame):
            raise _Rejected
        return int.from_bytes(self._frame[k : k + size], "big")

    def ancillary(self, k: int, a: int, x: int) -> int:
        """The value of an SKF_AD_* operand. Mark, queue and receive hash are known to the kernel only."""
        packet = self._packet
        tpid, tci = packet.vlan or (0, 0)
        if k in (AD_NLATTR, AD_NLATTR_NEST):
            return self._attribute(a, x, nested=k == AD_NLATTR_NEST)
        if k == AD_PROTOCOL:
            return self._protocol()
        if k == AD_PKTTYPE:
            return self._packet_type()
        if k == AD_PAY_OFFSET:
            return self._payload()
        return {
            AD_IFINDEX: packet.interface,
            AD_HATYPE: packet.link_type,
            AD_CPU: 0,
            AD_XOR_X: a ^ x,
            AD_VLAN_TAG: tci,
            AD_VLAN_TAG_PRESENT: int(packet.vlan is not None),
            AD_VLAN_TPID: tpid,
            AD_RANDOM: int.from_bytes(os.urandom(4), "big"),
        }.get(k, 0)

    def _protocol(self) -> int:
        """eth_type_trans(): the EtherType, or ETH_P_802_3 or ETH_P_802_2 for a length."""
        frame = self._packet.frame
        if self._packet.protocol:
            return self._packet.protocol
        if not self._packet.link_header:
            version = frame[0] >> 4 if frame else 0
            return {4: ETHERTYPE_IPV4, 6: ETHERTYPE_IPV6}.get(version, 0)
        if len(frame) < ETH_HEADER_BYTES:
            return 0
        kind = int.from_bytes(frame[12:14], "big")
        if kind >= 0x0600:  # ETH_P_802_3_MIN
            return kind
        return 1 if frame[14:16] == b"\xff\xff" else 4  # ETH_P_802_3, ETH_P_802_2

    def _packet_type(self) -> int:
        """PACKET_HOST, _BROADCAST, _MULTICAST or _OUTGOING."""
        frame = self._packet.frame
        if self._packet.outgoing:
            return 4
        if not self._packet.link_header or len(frame) < 6 or not frame[0] & 1:
            return 0
        return 1 if frame[:6] == b"\xff" * 6 else 2

    def _payload(self) -> int:
        """The offset of the payload of the transport protocol. The kernel's skb_get_poff() knows more protocols, and tunnels."""
        kind, at, protocol = self._protocol(), self._packet.link_header, 0
        try:
            while kind in (0x8100, 0x88A8):
                kind = self.at(at + 2, 2)
                at += TAG_BYTES
            if kind == ETHERTYPE_IPV4:
                self.at(at + 16, 4)
                words = self.at(at, 1) & 15
                if words < 5:
                    return 0
                protocol, first = self.at(at + 9, 1), not self.at(at + 6, 2) & 0x1FFF
                at += 4 * words
            elif kind == ETHERTYPE_IPV6:
                self.at(at + 36, 4)
                protocol, first = self.at(at + 6, 1), True
                at += 40
                while protocol in (0, 43, 60):  # hop-by-hop, routing, destination options
                    option = self.at(at, 2)
                    protocol = option >> 8
                    at += 8 * ((option & 0xFF) + 1)
                if protocol == 44:
                    word = self.at(at, 4)
                    protocol, first = word >> 24, not word & 0xFFF8
                    at += 8
            elif kind == ETHERTYPE_ARP:
                first = False
            else:
                return 0
        except _Rejected:
            return 0
        at = min(at, len(self._frame))
        return at + self._transport(protocol, at) if first else at

    def _transport(self, protocol: int, at: int) -> int:
        if protocol == 6:
            try:
                return max(20, (self.at(at + 12, 1) & 0xF0) >> 2)
            except _Rejected:
                return 0
        # DCCP and SCTP; ICMP, IGMP, UDP, ICMPv6 and UDP-Lite
        return 12 if protocol in (33, 132) else 8 if protocol in (1, 2, 17, 58, 136) else 0

    def _attribute(self, at: int, wanted: int, *, nested: bool) -> int:
        """bpf_skb_get_nlattr(): the offset of the attribute among those from `at` on; nested: inside the one at `at`."""
        frame = self._packet.frame
        end = len(frame)
        if end < 4 or at > end - 4:
            return 0
        if nested:
            (size,) = struct.unpack_from("=H", frame, at)
            if not 4 <= size <= end - at:
                return 0
            at, end = at + 4, at + size
        while at + 4 <= end:
            size, kind = struct.unpack_from("=HH", frame, at)
            if not 4 <= size <= end - at:
                return 0
            if kind & NLA_TYPE_MASK == wanted:
                return at
            at += size + 3 & ~3
        return 0
