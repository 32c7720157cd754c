"""Filters: parses and compiles the `filter` option, and decides who runs the program."""

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

# A return value of at least this keeps every frame whole. It is longer than any frame of Linux.
_WHOLE = 2**24
_ACCEPT = 0xFFFFFFFF

# Ancillary loads whose result linkrx cannot reproduce for a received packet.
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

# Offsets in the header of DLT_LINUX_SLL. The kernel has loads for the packet type and the protocol, not for what lies between.
# The network header follows after 16 bytes.
_COOKED_TYPE, _COOKED_PROTOCOL, _COOKED_HEADER = 0, 14, 16

_HALF = 0x08

# LINKTYPE_* with keywords of their own in tcpdump's language: Ethernet, IEEE 802.11, Linux cooked, pflog, ATM, SS7.
_SOME_LINK_TYPES = (1, 105, 113, 117, 123, 140)


@dataclass(frozen=True)
class Program:
    """A compiled filter. `text` describes it in messages. `tags`: it must run on frames with their VLAN tag."""

    instructions: tuple[Instruction, ...]
    text: str
    tags: bool = False
    of_file: FilterLike | None = None  # for a capture file, the option: each link type has its program

    @property
    def code(self) -> bytes:
        """The program as an array of struct sock_filter."""
        return packed(self.instructions)

    @property
    def cuts(self) -> bool:
        """Whether the program may cut frames."""
        return any(
            code == bpf.RET | bpf.RET_A or (code == bpf.RET and 0 < k < _WHOLE)
            for code, _, _, k in self.instructions
        )

    def uncut(self) -> bytes | None:
        """The same program without cutting. None if it computes its return value, so that this is not possible."""
        if any(code == bpf.RET | bpf.RET_A for code, _, _, _ in self.instructions):
            return None
        return packed(
            [(code, jt, jf, _ACCEPT if code == bpf.RET and k else k) for code, jt, jf, k in self.instructions]
        )

    def kernels_own(self, *, metadata: bool) -> str | None:
        """The first load that only the kernel can answer, or None. `metadata`: VLAN tags are reported beside the packet."""
        own = _KERNELS_OWN if metadata else _KERNELS_OWN | _TAGS
        asked = (k for code, _, _, k in self.instructions if bpf.is_absolute(code))
        return next((own[k] for k in asked if k in own), None)


@dataclass(frozen=True)
class Plan:
    """Who runs a filter. `kernel`: the program to attach to the socket, None for none. `own`: linkrx runs the filter on received
    packets. `until_empty`: only until the queue was empty once.
    """

    program: Program
    kernel: bytes | None
    own: bool
    until_empty: bool
    explanation: str


def packed(instructions: Sequence[Instruction]) -> bytes:
    """The program as an array of struct sock_filter."""
    return b"".join(struct.pack("=HBBI", *one) for one in instructions)


def parse_ddd(text: str) -> list[tuple[int, int, int, int]]:
    """Parse the output of `tcpdump -ddd EXPRESSION` for `filter=`: a count, then four numbers on each line.

    tcpdump compiles for its default interface. `-y EN10MB` makes it compile for Ethernet. Raises ValueError for other text.
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
                f"line {number + 1} is {' '.join(line)!r}, but `tcpdump -ddd` prints {wanted} there"
            )
        if number:
            code, jt, jf, k = values
            instructions.append((code, jt, jf, k))
    if not lines or int(lines[0][0]) != len(instructions):
        announced = lines[0][0] if lines else "nothing"
        raise ValueError(
            f"the first line says {announced}, but {len(instructions)} instructions follow: give all of the output of "
            "`tcpdump -ddd`"
        )
    return instructions


def checked(given: object) -> None:
    """Raise TypeError or ValueError for a `filter` that is invalid for every source."""
    if isinstance(given, str):
        if "\0" in given or not given.isprintable():
            raise ValueError(f"filter={given!r}: an expression has printable characters only")
    else:
        _instructions(given)


def _instructions(given: object) -> tuple[Instruction, ...]:
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray | memoryview):
        raise TypeError(
            f"filter={given!r}: give an expression such as 'udp port 53', or a sequence of instructions (code, jt, jf, k)"
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
    """The program for frames of a source. Raises ValueError for an invalid filter, and UnsupportedOption if it cannot be compiled."""
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
    """The program for packets of a capture file with this link type. It reads them with all headers in the file. Raises as `compiled`."""
    if not isinstance(given, str):
        return Program(_instructions(given), f"{len(given)} instructions", of_file=given)
    link = libpcap.Link(file_type & FILE_LINK_TYPE, of_file=True, swapped=file_type & FILE_SWAPPED != 0)
    return Program(tuple(libpcap.compiled(given, link)), repr(given), of_file=given)


def _for_some_file(given: FilterLike, file_type: int | None) -> Program:
    """A program for any link type that the expression suits, if that of the file is not known. Raises ValueError if it suits none."""
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
    """Whether frames come without link header, or from devices with different link headers."""
    return found.kind == "packet_cooked" or (found.kind == "packet" and found.ifindex is None)


def _relocated(one: Instruction, expression: str, found: Capabilities) -> Instruction:
    """Translate a load at an offset of Linux cooked to one that the kernel answers for any device. Loads of the protocol and the
    packet type become ancillary loads. Others become loads relative to the network header (SKF_NET_OFF).

    SKF_NET_OFF is -1 MiB. An indirect load adds X to it, so an X of 1 MiB or more would reach the start of the frame. No packet
    is that long.
    """
    code, jt, jf, k = one
    if code & 0x07 not in (bpf.LD, bpf.LDX) or code & 0xE0 not in (bpf.ABS, bpf.IND, bpf.MSH):
        return one
    if k >= 2**31:
        return one  # relative to a header already, or an ancillary load
    if k >= _COOKED_HEADER:
        return code, jt, jf, (bpf.NET_OFF + k - _COOKED_HEADER) % 2**32
    size = code & 0x18
    if code == bpf.LD | bpf.ABS | _HALF and size == _HALF:
        if k == _COOKED_TYPE:
            return code, jt, jf, bpf.AD_PKTTYPE
        if k == _COOKED_PROTOCOL:
            return code, jt, jf, bpf.AD_PROTOCOL
    raise UnsupportedOption(
        f"filter={expression!r} on {found.a_title}: the filter reads the link header (offset {k} of Linux cooked), but link "
        "headers differ between devices. Give the name of one interface, or instructions"
    )


def planned(program: Program, found: Capabilities, *, fresh: bool, segment: bool, metadata: bool) -> Plan:
    """Decide who runs a program. `fresh`: the socket is not bound yet, so no packet is queued. `segment`: super-packets must come
    whole, because linkrx splits them. `metadata`: the backend reads PACKET_AUXDATA, with the VLAN tag and the length before cutting.
    Raises UnsupportedOption.
    """
    if found.kind not in ("packet", "packet_cooked"):
        why = f"the kernel filters for packet sockets only, not for {found.a_title}"
        return Plan(program, None, True, False, f"linkrx: {why}")
    kernel: bytes | None = program.code
    if program.tags:
        if not metadata:
            raise UnsupportedOption(
                f"filter={program.text} on the {found.title}: the kernel takes VLAN tags out of frames, and linkrx does not get "
                "them here: with protocol= the kernel drops them, and not every backend reads them. Leave out protocol=, or name "
                "another backend"
            )
        why = "the filter is about VLAN tags, which the kernel takes out of frames before it filters"
        return Plan(program, None, True, False, f"linkrx: {why}")
    if program.cuts and (segment or not metadata or not fresh):
        kernel = program.uncut()
        who = (
            "the kernel rejects; linkrx cuts, and rejects packets that were queued before"
            if kernel
            else "linkrx"
        )
        plan = Plan(program, kernel, True, False, who)
    elif fresh:
        return Plan(program, kernel, False, False, "the kernel: attached before the socket was bound")
    else:
        who = "the kernel; linkrx filters packets that were queued before"
        plan = Plan(program, kernel, True, True, who)
    asked = program.kernels_own(metadata=metadata)
    if asked is not None:
        raise UnsupportedOption(
            f"filter of {program.text} on the {found.title}: the filter loads {asked}, which linkrx does not know for packets "
            "that are queued or must be cut. Give the filter to linkrx.open with the name of an interface, and do not let it "
            "cut packets"
        )
    return plan
