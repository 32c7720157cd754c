"""`linkrx demo`: the kernel pings, and each backend of this host receives."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from itertools import count
from selectors import EVENT_READ, DefaultSelector

import linkrx
from linkrx.backend import BackendInfo
from linkrx.choice import decide
from linkrx.cli.responder import ECHO_REQUEST, Echo, Responder
from linkrx.cli.terminal import Terminal, sentence
from linkrx.errors import LinkrxError, MissingPrivilege
from linkrx.kernel import remedies
from linkrx.kernel.namespace import enter_private_network
from linkrx.kernel.uapi import ETHERTYPE_ARP, ETHERTYPE_IPV4
from linkrx.packets import Packet
from linkrx.packets.headers import mac
from linkrx.receiving.dispatcher import Dispatcher
from linkrx.registry import backends
from linkrx.sources.options import Options
from linkrx.sources.tuntap import TunTap

KERNEL = IPv4Address("10.77.0.1")
RESPONDER = IPv4Address("10.77.0.2")
PREFIX_LENGTH = 24
RESPONDER_MAC = bytes.fromhex("020000000002")  # locally administered
PATIENCE = 10.0  # seconds to wait for a ping's answer; the kernel repeats an ARP request after one second

_NAMES = {ETHERTYPE_ARP: "ARP", ETHERTYPE_IPV4: "IPv4"}
_LINE = "{:>9}  {:<{}}  {:<8}  {:<17} > {:<17}  {:>6}"


@dataclass
class Trial:
    """The results of one backend."""

    backend: str
    status: str
    failed: bool = False
    packets: int = 0
    bytes: int = 0
    sent: int = 0
    answered: int = 0
    sequence: int = 0  # the sequence number of the last echo received

    def row(self) -> tuple[str, ...]:
        """A row of the summary."""
        counted = (str(self.packets), str(self.bytes), f"{self.answered}/{self.sent}")
        return (self.backend, *(counted if self.sent else "---"), self.status)


def run(terminal: Terminal, pings: int = 3) -> bool:
    """Try every backend of this host. True if all pings of each available backend were answered.

    Moves this process into a new network namespace and does not return. Raises LinkrxError or OSError if the process cannot
    make a namespace, a device or a raw socket.
    """
    enter_private_network()
    with TunTap() as tap, _raw_socket() as pinger:
        _configure(tap.name)
        pinger.connect((str(RESPONDER), 0))  # it receives from this address only
        terminal.heading(f"{tap.name}: the kernel, at {KERNEL}, pings {RESPONDER}, where only Python answers")
        demo = Demo(terminal, tap, pinger)
        trials = [demo.trial(info, pings) for info in backends() if demo.concerns(info)]
    terminal.line()
    terminal.table(
        ("backend", "packets", "bytes", "answered", "status"),
        [trial.row() for trial in trials],
        numbers=("packets", "bytes", "answered"),
    )
    return not any(trial.failed for trial in trials)


class Demo:
    """One TAP device, and the kernel's end of the pings."""

    def __init__(self, terminal: Terminal, tap: TunTap, pinger: socket.socket) -> None:
        self._terminal = terminal
        self._tap = tap
        self._pinger = pinger
        self._responder = Responder(RESPONDER_MAC, RESPONDER)
        self._queue_found, self._interface_found = linkrx.probe(tap), linkrx.probe(tap.name)
        # Not "auto", which the environment can change: the demo runs every backend by name.
        self._answering = decide(self._queue_found, backends(), Options()).backend
        self._sequences = count(1)
        self._start = time.monotonic()
        self._width = max(len(info.name) for info in backends() if self.concerns(info))
        terminal.line(
            _LINE.format("seconds", "backend", self._width, "protocol", "remote", "local", "length")
        )

    def concerns(self, info: BackendInfo) -> bool:
        """Whether a backend takes the queue or the interface. A backend for files takes neither."""
        return None in map(info.backend.refuses, (self._queue_found, self._interface_found))

    def trial(self, info: BackendInfo, pings: int) -> Trial:
        """Ping while the backend receives. It reads the pings from the TAP queue, or else the answers by interface name."""
        no_queue = info.backend.refuses(self._queue_found)
        missing = info.reason or (no_queue and info.backend.refuses(self._interface_found))
        if missing:
            return Trial(info.name, f"unavailable: {missing}")
        trial = Trial(info.name, f"ok: answered on {self._tap.name}")
        forget_neighbour(self._tap.name)
        try:
            with ExitStack() as stack:
                readers = [
                    stack.enter_context(reader) for reader in self._open(trial, by_name=no_queue is not None)
                ]
                for _ in range(pings):
                    self._ping(trial, readers)
        except BrokenPipeError:
            raise  # from stdout, not from the backend
        except (LinkrxError, OSError) as error:
            trial.failed, trial.status = True, f"failed: {sentence(error)}"
        else:
            missed = trial.sent - trial.answered
            if missed:
                trial.failed, trial.status = True, f"failed: {missed} pings were not answered"
        return trial

    def _open(self, trial: Trial, *, by_name: bool) -> Iterator[Dispatcher]:
        """Open the dispatcher on trial. If it reads by interface name, also open a second one, which answers."""

        def show(remote: bytes | None, local: bytes | None, protocol: int, packet: Packet) -> None:
            self._show(trial, remote, local, protocol, packet)

        def answer(remote: bytes | None, _local: bytes | None, protocol: int, packet: Packet) -> None:
            answer = self._responder.answer(remote, protocol, packet)
            if answer is not None:
                answering.send(answer)

        def show_and_answer(remote: bytes | None, local: bytes | None, protocol: int, packet: Packet) -> None:
            show(remote, local, protocol, packet)
            answer(remote, local, protocol, packet)

        if by_name:
            trial.status = f"ok: watched {self._tap.name} while {self._answering} answered"
            yield linkrx.open(self._tap.name, show, backend=trial.backend)
            answering = linkrx.open(self._tap, answer, backend=self._answering)
        else:
            answering = linkrx.open(self._tap, show_and_answer, backend=trial.backend)
        yield answering

    def _ping(self, trial: Trial, readers: list[Dispatcher]) -> None:
        """Send one ping. It counts as answered if the backend delivered its packet and the kernel got the same payload back."""
        sequence = next(self._sequences) & 0xFFFF
        echo = Echo(KERNEL, RESPONDER, ECHO_REQUEST, os.getpid() & 0xFFFF, sequence, bytes(range(56)))
        deadline = time.monotonic() + PATIENCE
        trial.sent += 1
        self._pinger.send(echo.message())
        replied = False
        # One thread is enough: a dispatcher can be polled, and drain() never waits.
        with DefaultSelector() as selector:
            for reader in readers:
                selector.register(reader, EVENT_READ, reader)
            selector.register(self._pinger, EVENT_READ)
            while not (replied and trial.sequence == sequence):
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                for ready, _ in selector.select(left):
                    if ready.data is not None:
                        ready.data.drain()
                    else:
                        replied |= Echo.parse(self._pinger.recv(0xFFFF)) == echo.reply()
        trial.answered += 1

    def _show(
        self, trial: Trial, remote: bytes | None, local: bytes | None, protocol: int, packet: Packet
    ) -> None:
        trial.packets += 1
        trial.bytes += len(packet)
        echo = Echo.parse(bytes(packet.data)) if protocol == ETHERTYPE_IPV4 else None
        if echo is not None:
            trial.sequence = echo.sequence
        self._terminal.line(
            _LINE.format(
                f"{time.monotonic() - self._start:.6f}",
                trial.backend,
                self._width,
                _NAMES.get(protocol) or f"0x{protocol:04x}",
                mac(remote),
                mac(local),
                len(packet),
            ),
            "cyan" if protocol == ETHERTYPE_ARP else "",
        )


def _raw_socket() -> socket.socket:
    """The raw(7) socket that pings are sent from."""
    try:
        return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    except PermissionError as error:
        raise MissingPrivilege(
            "pinging from a raw socket",
            "CAP_NET_RAW",
            remedies.capability("CAP_NET_RAW"),
            error.errno,
        ) from error


def _configure(name: str) -> None:
    from pyroute2 import IPRoute  # imported here: it takes 0.1 seconds, and `linkrx doctor` does not need it

    index = socket.if_nametoindex(name)
    with IPRoute() as route:
        route.addr("add", index=index, address=str(KERNEL), prefixlen=PREFIX_LENGTH)
        route.link("set", index=index, state="up")


def forget_neighbour(name: str) -> None:
    """Delete the neighbour entry of the other address, so that the kernel sends an ARP request again."""
    from pyroute2 import IPRoute, NetlinkError

    # ENOENT: there is no entry yet.
    with IPRoute() as route, suppress(NetlinkError):
        route.neigh("del", dst=str(RESPONDER), ifindex=socket.if_nametoindex(name))
