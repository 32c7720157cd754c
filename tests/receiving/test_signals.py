"""Signal handlers that raise while packets are iterated over, and while only runts come."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import islice

import pytest
from support.pairs import BACKENDS, frame, number_of, pair

import linkrx
from linkrx.testing.stops import alarmed

# UDP_SEGMENT: one call sends 64 datagrams of one byte, faster than a reader receives them.
FLOOD = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
    flood.connect(("127.0.0.1", int(sys.argv[1])))
    flood.setsockopt(socket.IPPROTO_UDP, 103, 1)
    print("ready", flush=True)
    while True:
        flood.send(bytes(64))
"""


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "os_readv"])
@pytest.mark.parametrize("polled", [False, True])
def test_iteration_gives_each_packet_once(backend: str, polled: bool) -> None:
    """If handlers raise during iteration over packets, each packet is returned once, also after fileno() was called."""

    class Interrupt(Exception):
        pass

    armed = False

    def interrupt(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Interrupt

    got: list[linkrx.Packet] = []
    sent = raised = 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pair(socket.SOCK_SEQPACKET) as (receiver, sender), linkrx.open(receiver, backend=backend) as rx:
            if polled:
                rx.fileno()
            for _ in range(500):
                for _ in range(4):
                    sender.send(frame(sent))
                    sent += 1
                turns = 0
                while len(got) < sent and turns < 10_000:
                    turns += 1
                    try:
                        armed = True
                        # The delay grows, so that each step is interrupted, and none for ever.
                        signal.setitimer(signal.ITIMER_REAL, 0.000_005 * min(turns, 100))
                        # extend() is C: no signal handler runs between the receiver and the list.
                        got.extend(islice(rx, 1))
                        armed = False
                    except Interrupt:
                        raised += 1
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    if rx._left == 0 and len(got) < sent and not _is_readable(receiver):
                        break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [number_of(packet) for packet in got] == list(range(sent))
    assert raised


def _is_readable(receiver: socket.socket) -> bool:
    try:
        return bool(receiver.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "os_readv"])
@pytest.mark.parametrize("how", ["recv", "next", "run", "batches"])
def test_handlers_run_while_only_runts_come(backend: str, how: str) -> None:
    """An exception of a handler propagates out of a call that receives only runts, as fast as it reads them."""

    class Interrupt(Exception):
        pass

    interrupted: list[bool] = []

    def interrupt(_: object) -> None:
        if not interrupted and rx.stats().runts:  # not before the first came
            interrupted.append(True)
            raise Interrupt

    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        linkrx.open(receiver, print, backend=backend) as rx,
    ):
        receiver.bind(("127.0.0.1", 0))
        calls: dict[str, Callable[[], object]] = {
            "recv": rx.recv,
            "next": lambda: next(rx),
            "run": rx.run,
            "batches": lambda: next(iter(rx.batches())),
        }
        flood = subprocess.Popen(
            [sys.executable, "-c", FLOOD, str(receiver.getsockname()[1])], stdout=subprocess.PIPE
        )
        try:
            assert flood.stdout is not None
            flood.stdout.readline()
            with pytest.raises(Interrupt), alarmed(interrupt, first=0.2, interval=0.2):
                calls[how]()
        finally:
            flood.kill()
            flood.wait()
            assert flood.stdout is not None
            flood.stdout.close()
