"""The arguments of `linkrx dump`."""

from __future__ import annotations

import argparse
import math
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from linkrx.kernel.uapi import ETH_HEADER_BYTES
from linkrx.memory.layouts import CAPACITY_MAX

TIMES_MOST = 4


class UsageError(Exception):
    """The arguments are invalid."""


@dataclass(frozen=True)
class Wanted:
    """The parsed arguments."""

    interface: str | None
    read: str | None
    expression: str
    count: int | None
    write: str | None
    snaplen: int | None
    times: int
    link: bool
    digits: int
    characters: int
    verbose: bool
    absolute: bool
    json: bool
    backend: str
    duration: float | None
    promiscuous: bool
    direction: str | None

    def check(self) -> None:
        """Raise UsageError for arguments that exclude each other."""
        if self.times > TIMES_MOST:
            raise UsageError(f"-t is given {self.times} times: give it {TIMES_MOST} times at most")
        if self.interface is not None and self.read is not None:
            raise UsageError("-i INTERFACE and -r FILE exclude each other: packets come from one of them")
        if self.read is not None:
            for given, name in ((self.snaplen, "-s"), (not self.promiscuous, "-p")):
                if given:
                    raise UsageError(
                        f"{name} is for capturing with -i: it cannot change the packets of a file"
                    )
        if self.write is not None and (self.json or self.digits or self.characters):
            raise UsageError("-w FILE records packets and prints none: leave out --json, -x and -X")
        if self.write == "-" and sys.stdout.isatty():
            raise UsageError(
                "-w - writes a capture file to standard output, which is a terminal: give a pipe or a file"
            )
        if self.read is not None and self.write is not None:
            read, written = _regular_file(self.read, 0), _regular_file(self.write, 1)
            if read is not None and read == written:
                raise UsageError(
                    f"-w {self.write} is the file that -r reads, and recording would overwrite it: give another name"
                )


def _regular_file(name: str, standard: int) -> tuple[int, int] | None:
    """The device and inode of a regular file. None for anything else. `standard`: the descriptor that "-" stands for."""
    try:
        found = os.fstat(standard) if name == "-" else Path(name).stat()
    except OSError:
        return None  # opening it gives a better error
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the arguments. They have tcpdump's letters where tcpdump has the same."""
    add = command.add_argument
    add(
        "expression",
        nargs="*",
        metavar="EXPRESSION",
        help="which packets, in tcpdump's language: udp port 53",
    )
    add(
        "-i",
        "--interface",
        metavar="INTERFACE",
        help="capture from this interface; any: from every interface",
    )
    add("-r", "--read", metavar="FILE", help="read a capture file, pcap or pcapng, or - for standard input")
    add("-c", "--count", type=_number(1), metavar="COUNT", help="end after this number of packets")
    add("--duration", type=_seconds, metavar="SECONDS", help="end after this number of seconds")
    add(
        "-w",
        "--write",
        metavar="FILE",
        help="record the packets instead: pcap if the name ends in .pcap or .cap, else pcapng; - for standard output",
    )
    add(
        "-s",
        "--snaplen",
        type=_snaplen,
        metavar="SNAPLEN",
        help="keep this number of bytes of each frame; 0 (default): all",
    )
    add(
        "-t",
        dest="times",
        action="count",
        default=0,
        help="no time; -tt: seconds since 1970; -ttt: since the previous packet; -tttt: with the date",
    )
    add("-e", dest="link", action="store_true", help="show the link header")
    add(
        "-x",
        dest="digits",
        action="count",
        default=0,
        help="show the bytes after the link header; -xx: all bytes",
    )
    add(
        "-X",
        dest="characters",
        action="count",
        default=0,
        help="show the bytes as hexadecimal and as characters; -XX: all bytes",
    )
    add(
        "-v",
        dest="verbose",
        action="count",
        default=0,
        help="show more header fields, and whether checksums are right",
    )
    add("-S", dest="absolute", action="store_true", help="show absolute TCP sequence numbers")
    add("-n", dest="numeric", action="count", help="accepted: addresses and ports are always numbers")
    add("-l", dest="lines", action="store_true", help="accepted: output is never buffered")
    add(
        "--json",
        action="store_true",
        help="print a JSON object per line for each packet: docs/dump.md describes the fields",
    )
    add(
        "--backend",
        default="auto",
        metavar="NAME",
        help="as backend= of linkrx.open: linkrx doctor lists them",
    )
    add("-p", dest="promiscuous", action="store_false", help="do not make the interface promiscuous")
    add(
        "-Q",
        "--direction",
        choices=("in", "out", "inout"),
        help="packets that come in, that this host sends, or both (default)",
    )


def wanted(arguments: argparse.Namespace) -> Wanted:
    """The arguments as a Wanted."""
    given = vars(arguments)
    values = {field.name: given[field.name] for field in fields(Wanted)}
    values["expression"] = " ".join(values["expression"])
    values["verbose"] = bool(values["verbose"])
    return Wanted(**values)


def _number(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {least} or more")
        return int(text)

    return number


def _snaplen(text: str) -> int | None:
    size = _number(0)(text)
    if size and not ETH_HEADER_BYTES <= size <= CAPACITY_MAX:
        raise argparse.ArgumentTypeError(f"{text}: give 0, or {ETH_HEADER_BYTES} to {CAPACITY_MAX} bytes")
    return size or None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds
