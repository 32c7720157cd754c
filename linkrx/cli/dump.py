"""`linkrx dump`: prints or records the packets of an interface or a capture file."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import linkrx
from linkrx.cli.dump_options import UsageError, Wanted
from linkrx.cli.printing import Printer
from linkrx.cli.recording import Recorder
from linkrx.cli.terminal import on_stdout, report
from linkrx.factory import from_environment
from linkrx.packets import Batch, Packet
from linkrx.registry import backends

EVERY = "any"


def run(wanted: Wanted) -> bool:
    """Print or record packets. False if the interface was deleted.

    Without an interface or file it lists the interfaces. Raises UsageError for invalid arguments, and LinkrxError or OSError if
    the source or the file cannot be opened, read or written.
    """
    wanted.check()
    known = ["auto", *(info.name for info in backends())]
    if wanted.backend not in known:
        raise UsageError(f"there is no backend {wanted.backend!r}: give one of {', '.join(known)}")
    if wanted.interface is None and wanted.read is None:
        _list_interfaces()
        if wanted.expression or wanted.write:
            raise UsageError("nothing says where packets come from: give -i INTERFACE or -r FILE")
        return True
    try:
        rx = _open(wanted)
    except ValueError as error:
        if isinstance(error, linkrx.LinkrxError):
            raise
        raise UsageError(str(error)) from error
    with rx:
        live = wanted.interface is not None
        with ending_on_signals(rx, live=live) as came:
            if live:
                _announce(rx, wanted)
            captured = _record(rx, wanted) if wanted.write is not None else _print(rx, wanted, came)
            if live:
                _count_the_rest(rx)
            if live or came:
                _summary(rx, captured)
        _report_left_out(rx)
        if rx.end is linkrx.End.LINK_GONE:
            report(f"{wanted.interface} was deleted")
            return False
    return True


def _print(rx: linkrx.Dispatcher, wanted: Wanted, came: list[int]) -> int:
    """Print packets until the end. A signal ends it after the current batch, so that Ctrl-C does not wait for a slow terminal."""
    printer = Printer(
        rx,
        every=wanted.interface == EVERY,
        as_json=wanted.json,
        asked_times=wanted.times,
        link=wanted.link,
        digits=wanted.digits,
        characters=wanted.characters,
        verbose=wanted.verbose,
        absolute=wanted.absolute,
    )
    return _receive(rx, wanted, printer, came)


def _record(rx: linkrx.Dispatcher, wanted: Wanted) -> int:
    """Record packets until the end. All packets that arrive before a signal are recorded."""
    assert wanted.write is not None
    with Recorder(rx, wanted.write, show=sys.stderr.isatty()) as recorder:
        return _receive(rx, wanted, recorder, [])


def _list_interfaces() -> None:
    """Print the interfaces that `-i` takes."""
    terminal = on_stdout()
    terminal.table(
        ("interface", "state", "mtu", "address"),
        [
            (
                one.name,
                one.state if one.up else "not set up",
                str(one.mtu or "-"),
                one.address.hex(":") or "-",
            )
            for one in linkrx.interfaces()
        ],
        numbers=("mtu",),
    )
    terminal.line()
    terminal.line(
        "linkrx dump -i INTERFACE    prints the packets of an interface; -i any: of every interface"
    )
    terminal.line("linkrx dump -r FILE         prints the packets of a capture file")


def _open(wanted: Wanted) -> linkrx.Dispatcher:
    expression = wanted.expression or None
    if wanted.read is not None:
        file = linkrx.CaptureFile(sys.stdin.buffer if wanted.read == "-" else wanted.read)
        return linkrx.open(file, backend=wanted.backend, filter=expression)
    assert wanted.interface is not None
    able = _abilities(wanted.backend)
    return linkrx.open(
        wanted.interface,
        backend=wanted.backend,
        filter=expression,
        snaplen=wanted.snaplen,
        outgoing=wanted.direction in ("out", "inout") or (wanted.direction is None and "outgoing" in able),
        timestamps="timestamps" in able,
        promiscuous=wanted.promiscuous and wanted.interface != EVERY,
    )


def _abilities(backend: str) -> frozenset[str]:
    """The options that the named backend honours. For "auto": that any backend of this host honours."""
    name, avoid = from_environment(backend)
    return frozenset().union(
        *(
            info.honours
            for info in backends()
            if info.name == name or (name == "auto" and info.supported and info.name not in avoid)
        )
    )


def _announce(rx: linkrx.Dispatcher, wanted: Wanted) -> None:
    kept = "whole frames" if wanted.snaplen is None else f"{wanted.snaplen} bytes of each frame"
    where = "every interface" if wanted.interface == EVERY else wanted.interface
    report(f"listening on {where}, {kept}, backend {rx.backend}; Ctrl-C ends it")
    able = _abilities(wanted.backend)
    if "timestamps" not in able:
        report(f"{rx.backend} has no kernel timestamps: the times are those of printing or recording")
    if "outgoing" not in able and wanted.direction is None:
        report(f"{rx.backend} does not receive packets that this host sends: only incoming packets are shown")


@contextmanager
def ending_on_signals(rx: linkrx.Dispatcher, *, live: bool) -> Iterator[list[int]]:
    """Let SIGINT, SIGTERM and SIGHUP end reception. `live`: queued packets are received first. A second SIGINT, or a SIGINT after
    another signal, raises KeyboardInterrupt.

    The others may come twice: timeout(1) sends its signal to the process and to the group, a shell passes SIGHUP on. nohup(1)
    ignores SIGHUP, which stays. Gives the list of signals that came.
    """
    came: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        rx.stop(flush=live)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _receive(rx: linkrx.Dispatcher, wanted: Wanted, out: Printer | Recorder, ended: list[int]) -> int:
    """Give `out` the wanted packets of each batch, until the end or until `ended` is not empty. Returns their number."""
    captured = 0
    until = None if wanted.duration is None else time.monotonic() + wanted.duration
    outgoing = {"in": False, "out": True}.get(wanted.direction or "")
    while True:
        left = None if until is None else max(until - time.monotonic(), 0)
        for batch in rx.batches(out.patience, duration=left):
            packets: Batch | list[Packet] = batch
            if outgoing is not None:
                packets = [packet for packet in batch if packet.outgoing is outgoing]
            if wanted.count is not None and len(packets) > wanted.count - captured:
                packets = list(packets)[: wanted.count - captured]
            captured += len(packets)
            out.take(packets)
            if captured == wanted.count or ended:
                return captured
        out.tick()
        if rx.end is not None or (until is not None and time.monotonic() >= until):
            return captured


def _count_the_rest(rx: linkrx.Dispatcher) -> None:
    """Receive and count the packets that are queued in the kernel: the filter has accepted them too."""
    rx.stop(flush=True)
    for _ in rx.batches():
        pass


def _summary(rx: linkrx.Dispatcher, captured: int) -> None:
    """Print tcpdump's summary. Packets that the kernel dropped for lack of room count as received by the filter."""
    counted = rx.stats()
    dropped = counted.kernel_drops or 0
    print(
        f"{_packets(captured)} captured\n"
        f"{_packets(counted.packets + counted.undelivered + dropped)} received by filter\n"
        f"{_packets(dropped)} dropped by kernel",
        file=sys.stderr,
        flush=True,
    )


def _report_left_out(rx: linkrx.Dispatcher) -> None:
    """Report received frames that are no packets."""
    counted = rx.stats()
    for count, what in (
        (counted.runts, "shorter than a link header"),
        (counted.unknown_protocol, "of an unknown protocol"),
        (counted.empty, "empty"),
    ):
        if count:
            report(f"{count} frames were {what}, and are left out")


def _packets(count: int) -> str:
    return f"{count} packet{'' if count == 1 else 's'}"
