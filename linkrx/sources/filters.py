"""Which packets are wanted: what the caller gives as `filter`, as a program, and who runs it."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from linkrx.errors import UnsupportedOption
from linkrx.kernel import bpf
from linkrx.kernel.bpf import Instruction
from linkrx.memory.framing import FILE_LINK_TYPE, FILE_SWAPPED, OF_FILE
from linkrx.sources import libpcap
from linkrx.sources.capabilities import Capabilities

# An expression in tcpdump's language, or instructions: (code, jump if true, jump if false, operand).
FilterLike = str | Sequence[tuple[int, int, int, int]]

_FIELDS = (("code", 2**16), ("jt", 2**8), ("jf", 2**8), ("k", 2**32))

# A verdict beyond this keeps every frame whole: far more than any that Linux makes.
_WHOLE = 2**24
_ACCEPT = 0xFFFFFFFF

# Of which the answer is another for a packet that has been received: the kernel's own numbers; and the packet type, of which only
# some are told.
_KERNELS_OWN = {
    bpf.AD_MARK: "the mark",
    bpf.AD_QUEUE: "the queue",
    bpf.AD_RXHASH: "the receive hash",
    bpf.AD_CPU: "the processor",
    bpf.AD_RANDOM: "a random number",
    bpf.AD_PKTTYPE: "the packet type",
    bpf.AD_PAY_OFFSET: "the payload offset",
}

_TAGS = dict.fromkeys((bpf.AD_VLAN_TAG, bpf.AD_VLAN_TAG_PRESENT, bpf.AD_VLAN_TPID), "the VLAN tag")

# linux/if_packet.h struct sockaddr_ll as libpcap lays it out (DLT_LINUX_SLL): the packet type, then what no load finds in the
# kernel, the protocol, and behind 16 bytes the network header.
_COOKED_TYPE, _COOKED_PROTOCOL, _COOKED_HEADER = 0, 14, 16

_HALF = 0x08

# LINKTYPE_* that have words of their own in tcpdump's language: Ethernet, IEEE 802.11, Linux cooked, the packet filter's log, ATM, SS7.
_SOME_LINK_TYPES = (1, 105, 113, 117, 123, 140)


@dataclass(frozen=True)
class Program:
    """What a filter does. `text` is what the caller gave, for messages. `tags`: it reads frames with their VLAN tag."""

    instructions: tuple[Instruction, ...]
    text: str
    tags: bool = False
    of_file: FilterLike | None = (
        None  # what the caller gave, for a capture file: each link type has its program
    )

    @property
    def code(self) -> bytes:
        """As struct sock_filter."""
        return packed(self.instructions)

    @property
    def cuts(self) -> bool:
        """Whether it may keep a part of a frame."""
        return any(
            code == bpf.RET | bpf.RET_A or (code == bpf.RET and 0 < k < _WHOLE)
            for code, _, _, k in self.instructions
        )

    def uncut(self) -> bytes | None:
        """The same verdicts without cutting; None where they are computed, and nobody knows."""
        if any(code == bpf.RET | bpf.RET_A for code, _, _, _ in self.instructions):
            return None
        return packed(
            [(code, jt, jf, _ACCEPT if code == bpf.RET and k else k) for code, jt, jf, k in self.instructions]
        )

    def kernels_own(self, *, metadata: bool) -> str | None:
        """What it asks for that only the kernel can answer, and only when the packet comes. `metadata`: tags are reported beside the packet."""
        own = _KERNELS_OWN if metadata else _KERNELS_OWN | _TAGS
        asked = (k for code, _, _, k in self.instructions if bpf.is_absolute(code))
        return next((own[k] for k in asked if k in own), None)


@dataclass(frozen=True)
class Plan:
    """Who runs a filter. `kernel`: the program for the socket, None to leave it without. `own`: whether linkrx runs the filter
    on what it receives; `until_empty`: only until the queue was empty once.
    """

    program: Program
    kernel: bytes | None
    own: bool
    until_empty: bool
    explanation: str


def packed(instructions: Sequence[Instruction]) -> bytes:
    """As struct sock_filter."""
    return b"".join(struct.pack("=HBBI", *one) for one in instructions)


def parse_ddd(text: str) -> list[tuple[int, int, int, int]]:
    """The instructions that `tcpdump -ddd EXPRESSION` prints, for `filter=`: a count, then four numbers a line.

    tcpdump compiles for the interface that it would capture on: `-y EN10MB` makes that Ethernet. Raises ValueError for text of
    another form.
    """
    lines = [line.split() for line in text.splitlines() if line.strip()]
    instructions = []
    for number, line in enumerate(lines):
        try:
            values = [int(word) for word in line]
        except ValueError:
            values = []
        if len(values) != (4 if number else 1):
            wanted = "four numbers, as in `40 0 0 12`" if number else "the number of instructions"
            raise ValueError(
                f"line {number + 1} is {' '.join(line)!r}, and `tcpdump -ddd` prints {wanted} there"
            )
        if number:
            code, jt, jf, k = values
            instructions.append((code, jt, jf, k))
    if not lines or int(lines[0][0]) != len(instructions):
        announced = lines[0][0] if lines else "nothing"
        raise ValueError(
            f"the first line says {announced}, and {len(instructions)} instructions follow: give all that `tcpdump -ddd` prints"
        )
    return instructions


def checked(given: object) -> None:
    """Raise TypeError or ValueError for what no source could take as `filter`."""
    if isinstance(given, str):
        if "\0" in given or not given.isprintable():
            raise ValueError(f"filter={given!r}: an expression has printable characters only")
    else:
        _instructions(given)


def _instructions(given: object) -> tuple[Instruction, ...]:
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray | memoryview):
        raise TypeError(
            f"filter={given!r}: give an expression as in 'udp port 53', or a sequence of instructions (code, jt, jf, k)"
        )
    made: list[Instruction] = []
    for index, one in enumerate(given):
        if not isinstance(one, tuple | list) or len(one) != 4 or any(type(value) is not int for value in one):
            raise TypeError(
                f"instruction {index} of the filter is {one!r}: give four ints, (code, jump if true, jump if false, operand)"
            )
        for (name, limit), value in zip(_FIELDS, one, strict=True):
            if not 0 <= value < limit:
                raise ValueError(
                    f"instruction {index} of the filter is {one!r}: {name} is from 0 to {limit - 1}"
                )
        code, jt, jf, k = one
        made.append((code, jt, jf, k))
    found = bpf.wrong(made)
    if found is not None:
        index, reason = found
        shown = f" {made[index]}" if index < len(made) else ""
        raise ValueError(f"instruction {index} of the filter{shown}: {reason}")
    return tuple(made)


def compiled(given: FilterLike, found: Capabilities, *, ethernet: bool) -> Program:
    """The program for frames of a source. Raises ValueError for a wrong filter, UnsupportedOption where it cannot be compiled."""
    if found.kind == "capture_file":
        return _for_some_file(given, found.file_type)
    if not isinstance(given, str):
        return Program(_instructions(given), f"{len(given)} instructions")
    cooked = is_cooked(found)
    link_type = libpcap.DLT_LINUX_SLL if cooked else libpcap.DLT_EN10MB if ethernet else libpcap.DLT_RAW
    made = libpcap.compiled(given, libpcap.Link(link_type))
    if cooked:
        made = [_relocated(one, given, found) for one in made]
    return Program(tuple(made), repr(given), tags=not cooked and re.search(r"\bvlan\b", given) is not None)


def for_file(given: FilterLike, file_type: int) -> Program:
    """The program for packets of a capture file: of one link type, as they tell it. It reads all that the file has of them. Raises as `compiled`."""
    if not isinstance(given, str):
        return Program(_instructions(given), f"{len(given)} instructions", of_file=given)
    link = libpcap.Link(file_type & FILE_LINK_TYPE, of_file=True, swapped=file_type & FILE_SWAPPED != 0)
    return Program(tuple(libpcap.compiled(given, link)), repr(given), of_file=given)


def _for_some_file(given: FilterLike, file_type: int | None) -> Program:
    """Where the link type is not known yet, one that the expression suits: what suits none is wrong."""
    if file_type is not None:
        return for_file(given, file_type)
    first: ValueError | None = None
    for link_type in _SOME_LINK_TYPES:
        try:
            return for_file(given, OF_FILE | link_type)
        except ValueError as error:
            first = first or error
    assert first is not None
    raise first


def is_cooked(found: Capabilities) -> bool:
    """Whether frames of several kinds of device come, or none with its link header."""
    return found.kind == "packet_cooked" or (found.kind == "packet" and found.ifindex is None)


def _relocated(one: Instruction, expression: str, found: Capabilities) -> Instruction:
    """A load at an offset of Linux cooked as one that the kernel answers for any device: from the network header on, and the
    protocol and packet type, which are ancillary loads.

    An index that the packet computes is added to the operand, which names the network header from below zero: 1 MiB and more
    would count from the frame's start, which no packet reaches.
    """
    code, jt, jf, k = one
    if code & 0x07 not in (bpf.LD, bpf.LDX) or code & 0xE0 not in (bpf.ABS, bpf.IND, bpf.MSH):
        return one
    if k >= 2**31:
        return one  # counts from a header already, or is an ancillary load
    if k >= _COOKED_HEADER:
        return code, jt, jf, (bpf.NET_OFF + k - _COOKED_HEADER) % 2**32
    size = code & 0x18
    if code == bpf.LD | bpf.ABS | _HALF and size == _HALF:
        if k == _COOKED_TYPE:
            return code, jt, jf, bpf.AD_PKTTYPE
        if k == _COOKED_PROTOCOL:
            return code, jt, jf, bpf.AD_PROTOCOL
    raise UnsupportedOption(
        f"filter={expression!r} on {found.a_title}: it looks at the link header (offset {k} of Linux cooked), and frames of "
        "different devices have different ones. Give the name of one interface, or instructions"
    )


def planned(program: Program, found: Capabilities, *, fresh: bool, segment: bool, metadata: bool) -> Plan:
    """Who runs it. `fresh`: nothing is queued, for the socket is linkrx's own and not bound yet. `segment`: super-packets will be
    split, which must be whole. `metadata`: the backend reads PACKET_AUXDATA: the VLAN tag, and the true length of a cut packet.
    Raises UnsupportedOption.
    """
    if found.kind not in ("packet", "packet_cooked"):
        why = f"the kernel filters for packet sockets only, not for {found.a_title}"
        return Plan(program, None, True, False, f"linkrx: {why}")
    kernel: bytes | None = program.code
    if program.tags:
        if not metadata:
            raise UnsupportedOption(
                f"filter={program.text} on the {found.title}: the kernel takes VLAN tags out of frames, and they are not told "
                "here: with protocol= it forgets them, and not every backend reads them. Leave out protocol=, or name another backend"
            )
        why = "it speaks of VLAN tags, and the kernel takes them out of frames before it filters"
        return Plan(program, None, True, False, f"linkrx: {why}")
    if program.cuts and (segment or not metadata or not fresh):
        kernel = program.uncut()
        who = "the kernel rejects; linkrx cuts, and rejects what was queued before" if kernel else "linkrx"
        plan = Plan(program, kernel, True, False, who)
    elif fresh:
        return Plan(program, kernel, False, False, "the kernel: attached before the socket was bound")
    else:
        who = "the kernel; linkrx filters what was queued before it was attached"
        plan = Plan(program, kernel, True, True, who)
    asked = program.kernels_own(metadata=metadata)
    if asked is not None:
        raise UnsupportedOption(
            f"filter of {program.text} on the {found.title}: it asks for {asked}, which linkrx cannot tell of packets that are "
            "queued or must be cut. Give it to linkrx.open with the name of an interface, and let it take packets whole"
        )
    return plan
