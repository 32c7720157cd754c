"""Random sequences of calls are compared with a model that is a list, and account for every frame."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from support.framed import Setup
from support.machine import Machine
from support.run import thorough

import linkrx
from linkrx.testing import rigs

# None: the layout that linkrx chooses.
LADDERS: tuple[tuple[int, ...] | None, ...] = (
    None,
    None,
    None,
    (1,),
    (14,),
    (20, 5),
    (128, 256, 512),
    linkrx.BUFFER_SIZES,
)

SO_SNDBUFFORCE = 32  # asm-generic/socket.h

# Lengths around every header and every step of these ladders, and any length.
LENGTHS = st.one_of(
    st.integers(0, 13),
    st.sampled_from([10, 11, 12, 13, 14, 15, 23, 24, 25, 26, 27, 37, 38, 128, 384, 895, 896, 897, 906, 907]),
    st.integers(14, 3000),
    st.sampled_from([2047, 2048, 2049, 2058, 9000, 65_535, 65_664, 65_665, 70_000]),
)


class Datagrams(Machine):
    """An AF_UNIX datagram pair."""

    kind = socket.SOCK_DGRAM
    queue = 10  # net.unix.max_dgram_qlen
    lengths = LENGTHS

    def make(self, draw: st.DataObject) -> tuple[Any, Callable[[bytes], object]]:
        """Make a pair. The receiver blocks or not, which must not matter. The sender never blocks."""
        receiver, self.sender = socket.socketpair(socket.AF_UNIX, self.kind)
        self.stack.enter_context(receiver)
        self.stack.enter_context(self.sender)
        receiver.setblocking(draw.draw(st.booleans()))
        self.sender.setblocking(False)
        with suppress(PermissionError):  # then fewer long frames fit
            self.sender.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 16 * 1024 * 1024)
        return receiver, self.sender.send

    def setups(self, draw: st.DataObject) -> tuple[Setup, dict[str, Any]]:
        """Any framing, because a datagram does not report it."""
        ethernet = draw.draw(st.booleans())
        prefix = draw.draw(st.sampled_from([0, 0, 10, 12]))
        ladder = draw.draw(st.sampled_from(LADDERS))
        return Setup(ethernet, prefix, ladder, True), {"ethernet": ethernet, "vnet_header": prefix}

    def read_raw(self) -> bytes | None:
        """Read without linkrx."""
        with suppress(BlockingIOError):
            raw: bytes = self.source.recv(1 << 17, socket.MSG_DONTWAIT)
            return raw
        return None


class Records(Datagrams):
    """An AF_UNIX seqpacket pair whose peer can close."""

    kind = socket.SOCK_SEQPACKET
    queue = 80

    @rule()
    @precondition(lambda self: not self.hung_up and self.sent > 5)
    def hang_up(self) -> None:
        """Close the peer. Frames that were sent before stay queued."""
        self.sender.close()
        self.hung_up = True


class TapQueue(Machine):
    """A TAP queue, blocking or not, with or without a virtio-net header."""

    queue = 100
    lengths = st.one_of(
        st.integers(14, 60),
        st.integers(14, 3000),
        st.sampled_from([14, 15, 128, 895, 896, 897, 2047, 2048, 2049, 9000, 65_000]),
    )

    def make(self, draw: st.DataObject) -> tuple[Any, Callable[[bytes], object]]:
        """Make a device for each run of the machine."""
        make = draw.draw(st.sampled_from([rigs.tap, rigs.tap_blocking, rigs.tap_vnet]))
        rig = self.stack.enter_context(make())
        self.prefix = 10 if make is rigs.tap_vnet else 0
        return rig.source, rig.send

    def as_received(self, raw: bytes) -> bytes:
        """The frame behind a virtio-net header of zeroes, because it needs no offload."""
        return bytes(self.prefix) + raw

    def setups(self, draw: st.DataObject) -> tuple[Setup, dict[str, Any]]:
        """The probe detects all settings."""
        ladder = draw.draw(st.sampled_from(LADDERS))
        return Setup(True, self.prefix, ladder, False), {}

    def read_raw(self) -> bytes | None:
        """Read without linkrx."""
        if select.select([self.source], [], [], 0)[0]:
            return os.read(self.source.fileno(), 1 << 17)
        return None


def run(machine: type[Machine], examples: int) -> None:
    """Run that many examples with --all, else a third. LINKRX_EXAMPLES sets another number."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("LINKRX_EXAMPLES", examples if thorough() else examples // 3)),
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.samples
def test_datagrams() -> None:
    """On AF_UNIX datagrams every frame is delivered in order or counted, and kept packets do not change."""
    run(Datagrams, 120)


@pytest.mark.samples
def test_records() -> None:
    """On seqpacket records, where the peer may close at any time, every frame is delivered in order or counted."""
    run(Records, 120)


@pytest.mark.samples
@pytest.mark.usefixtures("devices")
def test_tap_queue() -> None:
    """On TAP queues, with frames from a real interface, every frame is delivered in order or counted."""
    run(TapQueue, 60)
