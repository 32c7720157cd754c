"""The command line: its arguments and exit codes."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence

import linkrx
from linkrx.cli import demo, doctor, dump
from linkrx.cli.dump_options import UsageError, add_options, wanted
from linkrx.cli.recording import NotRecorded
from linkrx.cli.terminal import on_stdout, report, sentence
from linkrx.sources.options import ETHERTYPE_MOST

OK, FAILED, USAGE, CANNOT_RUN = range(4)
BROKEN_PIPE = 128 + 13  # a shell's exit code for a program that SIGPIPE ended

COUNT_MAX = 1000

_ENVIRONMENT = """\
environment, for linkrx.open and doctor (demo runs every backend by name):
  LINKRX_BACKEND=NAME   replaces backend="auto"
  LINKRX_AVOID=A,B      takes backends out of "auto"

"""

_EXIT_CODES = """\
exit codes:
  0    success: every ping was answered (demo), a backend can work (doctor), or Ctrl-C or the reader ended it (dump)
  1    failure: the output says why
  2    wrong usage
  3    demo cannot run here: stderr says what is missing and what to type
  130  interrupted with Ctrl-C (dump: a second time, or before it listens)
  141  the reader of the output closed the pipe (demo, doctor)

"""

_EXAMPLES = """\
examples:
  linkrx doctor          what this host can do
  linkrx doctor eth0     which backend linkrx.open("eth0") takes, and why
  linkrx doctor any      the same for every interface at once
  linkrx demo            packets through every backend of this host
  linkrx demo | grep ARP
  linkrx dump -i eth0 udp port 53
  linkrx dump -r some.pcap -v
  linkrx dump -i any -w some.pcapng --duration 60
"""

_DEMO = """\
Enters a new network namespace (without root: and a user namespace) and makes a TAP device there. The kernel pings an
address on it. A Python function answers ARP and ICMP echo for that address, through linkrx. Each backend of this host
takes its turn. A backend that does not read TAP queues watches the device by name, and receives the answers. The demo
touches nothing outside the namespace, and leaves nothing behind.
"""

_DOCTOR = """\
Prints the kernel, the privileges and the cost of a missing one, and each backend, with the reason if it cannot run.
With the name of an interface it also prints what probing finds, and which backend "auto" chooses there and why. It
receives nothing and changes nothing.
"""

_DUMP = """\
Prints a line for each packet as tcpdump does, or records packets. With neither -i nor -r it lists the interfaces. Ctrl-C ends it.
A summary then counts the packets that were captured, that the filter accepted, and that the kernel dropped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Wrong usage, `--help` and `--version` raise SystemExit, Ctrl-C KeyboardInterrupt."""
    _open_closed_streams()
    arguments = _parse(argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        code = OK if arguments.command == "dump" else BROKEN_PIPE
        # The reader, such as `head`, closed the pipe. The rest of the buffer must not fail again at exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return code
    return code


def _open_closed_streams() -> None:
    """Open /dev/null for each standard stream that the caller closed.

    Else a file or socket would get that descriptor, and print() to a standard error that is None writes to standard output.
    Standard input and output get the wrong access mode, so that using them is an error.
    """
    for name, flags, mode in (
        ("stdin", os.O_WRONLY, "r"),
        ("stdout", os.O_RDONLY, "w"),
        ("stderr", os.O_WRONLY, "w"),
    ):
        if getattr(sys, name) is None:
            # Unbuffered: what cannot be written would fail again at exit.
            raw = io.FileIO(os.open(os.devnull, flags), mode)
            setattr(sys, name, io.TextIOWrapper(raw, write_through=True))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments. The words of dump's expression may stand between its options, which argparse does not support."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (arguments.command != "dump" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.expression += rest
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.command == "demo":
            return OK if demo.run(on_stdout(), arguments.count) else FAILED
        if arguments.command == "dump":
            return OK if dump.run(wanted(arguments)) else FAILED
        return OK if doctor.run(on_stdout(), arguments.source, arguments.protocol) else FAILED
    except BrokenPipeError:
        raise
    except linkrx.RecordingFailed as error:
        if error.errno == errno.EPIPE:
            raise BrokenPipeError(*error.args) from error
        report(sentence(error))
        return FAILED
    except (UsageError, linkrx.UnsupportedOption) as error:
        report(str(error))
        return USAGE if arguments.command == "dump" else FAILED
    except (linkrx.LinkrxError, NotRecorded, OSError) as error:
        report(sentence(error))
        return CANNOT_RUN if arguments.command == "demo" else FAILED


def _ethertype(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = 0
    if not 0 < value <= ETHERTYPE_MOST:
        raise argparse.ArgumentTypeError(f"{text}: give an EtherType, 1 to 0x{ETHERTYPE_MOST:04x}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="linkrx",
        description=linkrx.__doc__.partition("\n")[0] if linkrx.__doc__ else None,
        epilog=_ENVIRONMENT + _EXIT_CODES + _EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"linkrx {linkrx.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    command = _add(
        commands,
        "demo",
        "receive from a TAP device of its own on every backend",
        _DEMO,
        _EXIT_CODES + _EXAMPLES,
    )
    command.add_argument(
        "-c",
        "--count",
        type=_count,
        default=3,
        metavar="N",
        help=f"pings per backend, 1 to {COUNT_MAX} (default: 3)",
    )
    command = _add(
        commands,
        "doctor",
        "show which backends can work on this host or on one interface, and why",
        _DOCTOR,
        _ENVIRONMENT + _EXIT_CODES + _EXAMPLES,
    )
    command.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="the name of an interface, such as eth0, or any for every interface",
    )
    command.add_argument(
        "-p",
        "--protocol",
        type=_ethertype,
        metavar="ETHERTYPE",
        help="as protocol= of linkrx.open, such as 0x88cc",
    )
    add_options(
        _add(
            commands,
            "dump",
            "print or record packets, as tcpdump does",
            _DUMP,
            _ENVIRONMENT + _EXIT_CODES + _EXAMPLES,
        )
    )
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= COUNT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {COUNT_MAX}")
    return int(text)
