"""Prints packets to standard output as lines or JSON. Lines are coloured in a terminal."""

from __future__ import annotations

import json
import os
import select
import stat
import sys
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec

import linkrx
from linkrx.cli.dissection import ALL, CHECKED, LINE, dissect
from linkrx.cli.dissection.fields import Fields
from linkrx.cli.lines import Sequences, hexadecimal, line, times
from linkrx.cli.terminal import ENCODING_ERRORS, escaped
from linkrx.packets import Packet

# Styles by field. The first field that a packet has gives the style of its line.
_STYLES = {
    "cut": "red",
    "malformed": "red",
    "dns": "magenta",
    "dhcp": "yellow",
    "dhcpv6": "yellow",
    "icmp": "green",
    "icmpv6": "green",
    "arp": "cyan",
    "udp": "blue",
}

READER_PATIENCE = 0.5  # seconds between two checks whether the reader of a pipe is still there

# Bytes of a frame that the MTU does not count: link header and two VLAN tags.
_BESIDE_MTU = 14 + 8


class Printer:
    """Prints packets, and writes each batch out at once."""

    def __init__(
        self,
        rx: linkrx.Dispatcher,
        *,
        every: bool,
        as_json: bool,
        asked_times: int,
        link: bool,
        digits: int,
        characters: int,
        verbose: bool,
        absolute: bool,
    ) -> None:
        self._rx = rx
        # The seconds after which tick() is to be called if no packet comes. None: never.
        self.patience = reader_patience()
        self._live = rx.capabilities.kind != "capture_file"
        self._several = every
        self._json, self._link, self._verbose = as_json, link, verbose
        self._stamp = times.stamp(asked_times)
        self._bytes = max(digits, characters)  # 2: with the link header
        self._readable = bool(characters)
        self._depth = CHECKED if verbose else ALL if link or as_json else LINE
        self._paint = _painter() if sys.stdout.isatty() and not as_json else None
        self._sequences = None if absolute else Sequences()
        self._longest = _longest(rx)
        self._least_longest = min(self._longest.values(), default=2**32)
        self._names: dict[int, str] = {}

    def take(self, packets: Iterable[Packet]) -> None:
        """Print packets."""
        if not self._several and not self._live and self._rx.interface_name(2) is not None:
            self._several = True  # the file describes more than one interface
        make = self._object if self._json else self._line
        text = "\n".join([make(packet) for packet in packets])
        if text:
            write(text)

    def tick(self) -> None:
        """Raise BrokenPipeError if the reader of the pipe is gone."""
        if self.patience is not None:
            check_reader()

    def _fields(self, packet: Packet, wire_length: int) -> Fields:
        frame = packet.tobytes()
        if packet.local is None:
            fields = dissect(
                frame,
                wire_length,
                ethernet=False,
                protocol=packet.protocol,
                tag=packet.vlan,
                sender=packet.remote,
                depth=self._depth,
            )
        else:
            fields = dissect(frame, wire_length, ethernet=True, tag=packet.vlan, depth=self._depth)
        if wire_length > self._least_longest and wire_length > self._longest.get(
            packet.interface, wire_length
        ):
            fields["super_packet"] = True
        if self._verbose and packet.checksum_unfinished:
            _mark_unfinished(fields)
        return fields

    def _line(self, packet: Packet) -> str:
        wire_length = packet.wire_length
        fields = self._fields(packet, wire_length)
        if "tcp" in fields and self._sequences is not None:
            self._sequences.count(fields)
        text = line(fields, wire_length, link=self._link, verbose=self._verbose)
        if self._several:
            direction = ("Out " if packet.outgoing else "In  ") if self._live or packet.outgoing else ""
            # The name that a capture file gives an interface may have line feeds.
            name = escaped(self._name(packet.interface)).replace("\n", r"\n")
            text = f"{name} {direction}{text}"
        if self._paint is not None:
            text = self._paint(text, fields)
        if self._bytes:
            shown = packet.tobytes() if self._bytes > 1 else bytes(packet.data)
            text += hexadecimal.rows(shown, readable=self._readable)
        moment = packet.timestamp_ns
        return self._stamp(self._time(packet) if moment is None else moment) + text

    def _object(self, packet: Packet) -> str:
        """One line of JSON. docs/dump.md describes the fields."""
        wire_length = packet.wire_length
        shown: Fields = {"time": times.iso(self._time(packet))}
        if packet.interface:
            shown["interface"] = self._name(packet.interface)
        if self._live or packet.outgoing:
            shown["direction"] = "out" if packet.outgoing else "in"
        shown["length"], shown["captured"] = wire_length, len(packet)
        shown |= self._fields(packet, wire_length)
        if self._bytes:
            shown["frame"] = packet.tobytes().hex()
        return json.dumps(shown)

    def _time(self, packet: Packet) -> int | None:
        moment = packet.timestamp_ns
        return time.time_ns() if moment is None and self._live else moment

    def _name(self, index: int) -> str:
        name = self._names.get(index)
        if name is None:
            found = self._rx.interface_name(index)
            name = self._names[index] = f"#{index}" if found is None else found
        return name


def reader_patience() -> float | None:
    """The seconds between two checks of the reader of standard output. None if it is no pipe."""
    return READER_PATIENCE if stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode) else None


def check_reader() -> None:
    """Raise BrokenPipeError if the reader of the pipe is gone. Only a write would show it, and no packet may come for long."""
    ended = select.poll()
    ended.register(sys.stdout.fileno(), 0)
    if any(events & select.POLLERR for _, events in ended.poll(0)):
        raise BrokenPipeError


def _mark_unfinished(fields: Fields) -> None:
    """Mark a checksum that the sender left to a device as unfinished instead of wrong."""
    for name in ("tcp", "udp"):
        if fields.get(name, {}).get("checksum_state") == "wrong":
            fields[name]["checksum_state"] = "unfinished"


def write(text: str) -> None:
    """Write lines and a line feed to standard output, without a buffer.

    Writes to the descriptor, in the encoding of standard output. Raises OSError. With PYTHONUNBUFFERED, sys.stdout may write only
    a part when a signal comes. If another process made the terminal or pipe non-blocking, this waits until it has room.
    """
    descriptor = sys.stdout.fileno()
    data = memoryview(f"{text}\n".encode(sys.stdout.encoding, ENCODING_ERRORS))
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            room = select.poll()
            room.register(descriptor, select.POLLOUT)
            room.poll()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, "<stdout>") from error


def _longest(rx: linkrx.Dispatcher) -> dict[int, int]:
    """The longest frame of each interface, by its MTU. A longer frame is a super-packet."""
    if rx.capabilities.kind == "capture_file":
        return {}
    return {one.index: one.mtu + _BESIDE_MTU for one in linkrx.interfaces() if one.mtu}


def _painter() -> Callable[[str, Fields], str] | None:
    """A function that colours a line. None without rich, in a terminal without colours, and if NO_COLOR (no-color.org) is set."""
    if os.environ.get("NO_COLOR") or find_spec("rich") is None:
        return None
    from rich.color import ColorSystem
    from rich.console import Console
    from rich.style import Style

    system = Console().color_system
    if system is None:
        return None
    colours = {name: Style.parse(style) for name, style in _STYLES.items()}

    def paint(text: str, fields: Fields) -> str:
        style = next((colours[name] for name in colours if name in fields), None)
        return text if style is None else style.render(text, color_system=ColorSystem.STANDARD)

    return paint
