"""C: parses the records of pcap and pcapng files, which are read in large pieces."""

from __future__ import annotations

import errno
import zlib
from typing import Any

from linkrx import _core
from linkrx.backend import Backend, Capabilities, Descriptors, Owner, ReceiveConfig
from linkrx.errors import DamagedCapture, UnsupportedOption
from linkrx.sources.capture_file import CaptureReader, Got

# The most pieces without a packet that one fill reads: 16 MiB. The receiver handles stop() between fills.
PIECES_MOST = 64

PIECE_NUMBERS = 2**32 - 1


class CaptureWalk(Backend):
    """The only backend for capture files. It reads a piece of the file into the arena, and does not copy frames."""

    name = "capture_file"
    rank = 5  # no other backend takes a capture file
    batch_size = 4096  # a piece of 256 KiB has 3276 frames of 64 bytes
    coalesces = True  # the writer of a pipe does: it writes many packets at once

    @classmethod
    def missing(cls) -> str | None:
        """The reason why the core is missing."""
        return _core.reason

    @classmethod
    def refuses(cls, capabilities: Capabilities) -> str | None:
        """Other sources than capture files."""
        if capabilities.kind == "capture_file":
            return None
        return f"capture_file reads linkrx.CaptureFile only, and the source is {capabilities.a_title}"

    def __init__(self, receive: ReceiveConfig, descriptors: Descriptors) -> None:
        assert receive.file is not None
        self._file: CaptureReader = receive.file
        self._name = receive.capabilities.title
        self._descriptors, self._rows = descriptors, descriptors.rows
        self._address = descriptors.address()
        self._got: Got = []  # at most one piece that was read and not parsed yet
        self._piece = 1
        self._failure: Exception | None = None
        self._refused: Exception | None = None  # the filter does not suit the next packet; it may be replaced
        self._state: Any = _core.owned(_core.lib.lrx_capture_open(), "lrx_capture_free")

    def fill(self, arena: Owner, room: int) -> int:
        """Read the packets of one piece. Ignores `report.most`, which is for mechanisms that could wait for more."""
        try:
            return self._fill(arena)
        finally:
            self.goes_on = bool(self._state.more) or self._file.goes_on

    def _fill(self, arena: Owner) -> int:
        lib, state, got = _core.lib, self._state, self._got
        region = arena.address + arena.cursor
        for _ in range(PIECES_MOST):
            if state.asked and not self._meet():
                return self._report_error(errno.EBADMSG)
            if not got:
                count: int = lib.lrx_capture_again(state, self._address, self._rows, region)
                if count:
                    return count
                if state.asked:
                    continue
                if state.damage or self._failure:
                    return self._report_error(errno.EBADMSG)
                if self._piece == state.piece:  # it was parsed
                    self._piece = self._piece % PIECE_NUMBERS + 1
                try:
                    self._read(arena)
                except BlockingIOError:
                    return 0
            first = got[0]
            size = first if isinstance(first, int) else len(first)
            if not size:
                return self._end()
            if not isinstance(first, int):
                start = arena.cursor + state.rest_end - state.rest_at
                if self._piece != state.piece:
                    arena.view[start : start + size] = first
            count = lib.lrx_capture_walk(state, self._address, self._rows, region, size, self._piece)
            got.clear()
            if count:
                return count
        return 0

    def _meet(self) -> bool:
        """Add the link type of the next packet's interface to the filters. False if the filter does not suit it."""
        state = self._state
        interface = state.interfaces[state.asked - 1]
        try:
            self._file.filters.meet(interface.file_type)
        except ValueError as error:
            self._refused = UnsupportedOption(
                f"the filter does not suit the next packet of the {self._name}, which comes from interface {state.asked}: {error}\n"
                "Set another filter with set_filter(). No packet is lost"
            )
            return False
        interface.met, state.asked = 1, 0
        self._refused = None
        return True

    def _read(self, arena: Owner) -> None:
        start = arena.cursor + self._state.rest_end - self._state.rest_at
        try:
            self._file.read(self._got, arena.view[start : start + _core.lib.LRX_CAPTURE_PIECE])
        except (EOFError, zlib.error) as error:
            self._failure = DamagedCapture(self._name, self._state.offset, str(error))
            raise OSError(errno.EBADMSG, str(error)) from error

    def _end(self) -> int:
        """Handle the end of the file: the end of reception, or damage if the file ends within a record."""
        self._file.finish()
        return self._report_error(errno.ENODATA if _core.lib.lrx_capture_end(self._state) else errno.EBADMSG)

    def _report_error(self, code: int) -> int:
        self._descriptors.report.error = code
        return 0

    def explain(self, code: int) -> Exception | None:
        """The exception for EBADMSG: DamagedCapture, or UnsupportedOption for a filter that does not suit the next packet."""
        if code != errno.EBADMSG:
            return None
        state = self._state
        return self._refused or self._failure or DamagedCapture(self._name, state.offset, _sentence(state))

    def interface_name(self, index: int) -> str | None:
        """The name of an interface of a pcapng file. None before its block is read."""
        state = self._state
        if not (state.pcapng and 1 <= index <= state.first + state.count):
            return None
        return _core.text(state.interfaces[index - 1].name) or None

    def close(self) -> None:
        """Free the buffer, unless another thread is in `interface_name`. The source closes the file."""
        self._state = None


def _sentence(state: Any) -> str:
    """The sentence about the damage at `offset`. See LRX_CAPTURE_MAGIC and the next lines of _core/capture_file.h."""
    lib, value = _core.lib, state.value
    return {
        lib.LRX_CAPTURE_MAGIC: f"the magic number 0x{value:08x} is not that of pcap or pcapng",
        lib.LRX_CAPTURE_VERSION: f"version {value >> 16}.{value & 0xFFFF} of the format is unknown",
        lib.LRX_CAPTURE_LENGTH: f"a packet of {value} bytes is longer than its record, or than any packet",
        lib.LRX_CAPTURE_BLOCK_LENGTH: f"a block of {value} bytes is too short for its type, too long, or no multiple of 4",
        lib.LRX_CAPTURE_TRAILER: f"the length at the end of a block is {value} bytes, which differs from that at its beginning",
        lib.LRX_CAPTURE_BYTE_ORDER: f"the byte-order magic of a section is 0x{value:08x}",
        lib.LRX_CAPTURE_INTERFACE: f"a packet of interface {value}, but no block describes that interface",
        lib.LRX_CAPTURE_OPTION: f"option {value} of an interface is longer than its block",
        lib.LRX_CAPTURE_TOO_MANY: f"the file has more than {value} interfaces",
        lib.LRX_CAPTURE_LINK_TYPE: f"link type {value} does not fit into 16 bits",
        lib.LRX_CAPTURE_CUT: f"the file ends {value} bytes later, within a record"
        if value
        else _nothing(state),
    }[state.damage]


def _nothing(state: Any) -> str:
    return "the file ends within a block" if state.begun else "it is empty"
