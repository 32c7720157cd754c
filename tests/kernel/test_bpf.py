"""Classic BPF: the core, Python and the kernel accept the same programs, and keep the same bytes of the same frames."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.programs import (
    ACCEPT,
    ANYWHERE,
    Maker,
    in_core,
    kernel_takes,
    wrong_in_core,
)

from linkrx import _core
from linkrx.kernel import bpf
from linkrx.kernel.bpf import Filtered, Instruction
from linkrx.kernel.uapi import ARPHRD_ETHER
from linkrx.testing.devices import injector_on
from linkrx.testing.rigs import veth

needs_core = pytest.mark.skipif(_core.lib is None, reason=f"compares with the C core: {_core.reason}")

# The kernel has no protocol for a frame on an AF_UNIX socket.
_OF_A_DEVICE = {bpf.AD_PROTOCOL, bpf.AD_PAY_OFFSET}
ON_UNIX = [*(k for k in ANYWHERE if k not in _OF_A_DEVICE), bpf.AD_MARK, bpf.AD_QUEUE, bpf.AD_RXHASH]

REJECT: Instruction = (bpf.RET, 0, 0, 0)

WRONG: dict[str, tuple[list[Instruction], int, str]] = {
    "empty": ([], 0, "there is no instruction"),
    "no return": ([(bpf.LD | bpf.IMM, 0, 0, 0)], 0, "no return"),
    "too many": ([ACCEPT] * 5000, 4096, "4096"),
    "backwards": ([(bpf.JMP | bpf.JA, 0, 0, 2**32 - 1), ACCEPT], 0, "backwards by 1"),
    "behind the end": ([(bpf.JMP | bpf.JEQ, 1, 0, 0), ACCEPT], 0, "jumps 1 instructions on, and 1 follow"),
    "by zero": ([(bpf.ALU | bpf.DIV, 0, 0, 0), ACCEPT], 0, "divides by zero"),
    "remainder by zero": ([(bpf.ALU | bpf.MOD, 0, 0, 0), ACCEPT], 0, "divides by zero"),
    "far shift": ([(bpf.ALU | bpf.LSH, 0, 0, 32), ACCEPT], 0, "by 32"),
    "scratch 16": ([(bpf.ST, 0, 0, 16), ACCEPT], 0, "scratch word 16"),
    "unwritten": ([(bpf.LD | bpf.MEM, 0, 0, 3), ACCEPT], 0, "nothing has written"),
    "written on one way": (
        [(bpf.JMP | bpf.JEQ, 0, 1, 0), (bpf.ST, 0, 0, 3), (bpf.LD | bpf.MEM, 0, 0, 3), ACCEPT],
        2,
        "nothing has written",
    ),
    "code": ([ACCEPT, (0xFF, 0, 0, 0), ACCEPT], 1, "no code 0xff"),
    "ancillary": ([(0x20, 0, 0, bpf.AD_OFF + 2), ACCEPT], 0, "no ancillary load"),
    "ancillary behind the last": ([(0x20, 0, 0, bpf.AD_OFF + 64), ACCEPT], 0, "no ancillary load"),
}


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Receiver and sender."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.setblocking(False)
        yield receiver, sender


@pytest.mark.parametrize("name", WRONG)
def test_wrong_programs(name: str, pair: tuple[socket.socket, socket.socket]) -> None:
    """Python refuses each invalid program with position and reason, the core refuses it at the same position, and the kernel too."""
    program, place, reason = WRONG[name]
    found = bpf.wrong(program)
    assert found is not None
    assert found[0] == place
    assert reason in found[1]
    assert not kernel_takes(pair[0], program)
    if _core.lib is not None:
        assert wrong_in_core(program) == place


@needs_core
@pytest.mark.parametrize("seed", range(4))
def test_the_kernel_agrees_on_a_socket(seed: int, pair: tuple[socket.socket, socket.socket]) -> None:
    """For a thousand programs and four frames each, all three accept, cut and reject the same frames."""
    receiver, sender = pair
    maker = Maker(seed, 64, ON_UNIX, headers=(bpf.NET_OFF,))
    taken = kept = cut = 0
    for number in range(1000):
        program = maker.program() if number % 4 else maker.broken()
        right = kernel_takes(receiver, program)
        found = bpf.wrong(program)
        assert (found is None) == right, (found, program)
        assert wrong_in_core(program) == (None if found is None else found[0]), program
        taken += right
        for _ in range(4 if right else 0):
            frame = maker.random.randbytes(maker.random.choice((1, 14, 33, 60, 64)))
            if maker.random.randrange(2):
                frame = bytes(byte & 3 for byte in frame)
            sender.send(frame)
            try:
                length = len(receiver.recv(100))
            except BlockingIOError:
                length = 0
            packet = Filtered(frame, len(frame), 0)
            assert bpf.kept(program, packet) == length, (program, frame.hex())
            assert in_core(program, packet) == length, (program, frame.hex())
            kept += length > 0
            cut += 0 < length < len(frame)
    assert taken > 700
    assert kept > 500
    assert cut > 100


def random_frame(chosen: random.Random) -> bytes:
    """An Ethernet frame, often with valid headers."""
    kind = chosen.choice((0x0800, 0x0800, 0x86DD, 0x0806, 0x88B5, 40))
    local = chosen.choice((b"\xff" * 6, bytes.fromhex("333300000001")))
    head = local + bytes.fromhex("020000000002") + struct.pack("!H", kind)
    protocol = chosen.choice((1, 6, 17, 58, 99, 132))
    body = chosen.randbytes(chosen.randrange(20, 60))
    if kind == 0x0800:
        words = chosen.choice((5, 6))
        fragment = chosen.choice((0, 0, 0x2000, 0x2001))
        head += struct.pack(
            "!BBHHHBBH8s", 0x40 | words, 0, 20 + len(body), 1, fragment, 64, protocol, 0, bytes(8)
        )
        head += bytes(4 * words - 20)
    elif kind == 0x86DD:
        options = chosen.choice((b"", struct.pack("!BB6x", protocol, 0)))
        head += struct.pack("!IHBB32x", 6 << 28, len(body), 0 if options else protocol, 64) + options
    return head + body


@needs_core
@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("seed", range(2))
def test_the_kernel_agrees_on_a_device(seed: int) -> None:
    """On a veth all three also give the same values for ancillary loads: protocol, packet type, interface, tag, payload offset."""
    with veth() as (near, far), injector_on(far) as injector, _receiver(near) as receiver:
        index = socket.if_nametoindex(near)
        maker = Maker(seed, 70, ANYWHERE, headers=(bpf.NET_OFF, bpf.LL_OFF))
        kept = 0
        for number in range(600):
            program = maker.program()
            if number % 3 == 0:  # the value of such a load
                program = [(0x20, 0, 0, maker.random.choice(ANYWHERE)), (bpf.RET | bpf.RET_A, 0, 0, 0)]
            if not kernel_takes(receiver, program):
                continue
            for _ in range(4):
                frame = random_frame(maker.random)
                injector.send(frame)
                try:
                    length = receiver.recv_into(bytearray(200))
                except BlockingIOError:
                    length = 0
                packet = Filtered(frame, len(frame), 14, index, ARPHRD_ETHER)
                assert in_core(program, packet) == length, (program, frame.hex())
                assert bpf.kept(program, packet) == length, (program, frame.hex())
                kept += length > 0
    assert kept > 500


def _receiver(name: str) -> socket.socket:
    receiver = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    receiver.bind((name, 3))
    return receiver


instructions = st.integers(0, 2**32 - 1).map(lambda seed: Maker(seed, 90, (), headers=()).program())


@given(program=instructions, frame=st.binary(min_size=14, max_size=80), tci=st.integers(0, 2**16 - 1))
def test_the_tag_is_read_as_if_it_were_there(program: list[Instruction], frame: bytes, tci: int) -> None:
    """With `tags`, a frame whose tag was taken out gets the same result as the whole frame, and is cut at the same byte."""
    whole = frame[:12] + struct.pack("!HH", 0x8100, tci) + frame[12:]
    verdict = bpf.kept(program, Filtered(whole, len(whole)))
    expected = verdict if verdict <= 12 else max(12, verdict - 4)
    packet = Filtered(frame, len(frame), vlan=(0x8100, tci))
    assert bpf.kept(program, packet, tags=True) == expected
    if _core.lib is not None:
        assert in_core(program, packet, tags=True) == expected


@pytest.mark.parametrize("length", [13, 14])
def test_a_load_behind_the_end_rejects(length: int) -> None:
    """A load of two bytes at offset 12 rejects a frame of 13 bytes, and not one of 14."""
    program = [(0x28, 0, 0, 12), ACCEPT]
    packet = Filtered(bytes(length), 1500)
    assert bpf.kept(program, packet) == (14 if length == 14 else 0)
    if _core.lib is not None:
        assert in_core(program, packet) == bpf.kept(program, packet)


def test_the_length_is_that_of_the_wire() -> None:
    """A program gets the wire length of a cut frame as its length."""
    program = [(bpf.LD | bpf.LEN, 0, 0, 0), (bpf.JMP | bpf.JEQ, 0, 1, 1500), ACCEPT, REJECT]
    packet = Filtered(bytes(60), 1500)
    assert bpf.kept(program, packet) == 60
    if _core.lib is not None:
        assert in_core(program, packet) == 60
