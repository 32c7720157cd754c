"""The filter of a capture file. It has a program for each link type, compiled when the first packet of that type comes."""

from __future__ import annotations

import threading
from collections.abc import Callable

from linkrx import _core
from linkrx.errors import UnsupportedOption
from linkrx.kernel import bpf
from linkrx.sources import filters
from linkrx.sources.filters import FilterLike
from linkrx.sources.libpcap import RejectsAll

_REJECT = filters.packed([(bpf.RET, 0, 0, 0)])


class FilePrograms:
    """One filter, as a struct lrx_file_programs at `address`. Classification reads it."""

    def __init__(self, given: FilterLike) -> None:
        self._given = given
        self._table = _core.new("struct lrx_file_programs *")
        self._codes: list[bytearray] = []  # the table has pointers to these
        self._adding = threading.RLock()
        self.address = _core.pointer(self._table)

    def add(self, file_type: int) -> None:
        """Compile a program for this link type (`file_types` of _core/report.h). Raises ValueError if the filter does not suit it."""
        table, most = self._table, _core.lib.LRX_FILE_PROGRAMS
        if file_type in table.file_types[0 : table.count]:
            return
        try:
            code = bytearray(filters.for_file(self._given, file_type).code)
        except RejectsAll:
            code = bytearray(_REJECT)  # the filter may accept packets of other link types
        with self._adding:
            count = table.count
            if count == most:
                raise UnsupportedOption(
                    f"a filter on a capture file takes packets of {most} link types at most, and this file has more"
                )
            self._codes.append(code)
            table.file_types[count] = file_type
            table.programs[count] = _core.at("struct lrx_instruction *", _core.address(code))
            table.count = count + 1


class FileFilters:
    """The link types that a file has so far, and the filters that need a program for each: the current one, and its successor."""

    def __init__(self) -> None:
        self._met: list[int] = []
        self._live: list[FilePrograms] = []

    def meet(self, file_type: int) -> None:
        """Add a link type before its first packet, on the receiving thread. Raises ValueError if a filter does not suit it."""
        if file_type not in self._met:
            self._met.append(file_type)
        for programs in tuple(self._live):
            programs.add(file_type)

    def put(self, given: FilterLike, run: Callable[[FilePrograms], None]) -> None:
        """Set the filter, and give its programs to `run`. Raises ValueError if it does not suit a link type of the file so far;
        then nothing changes.
        """
        programs, before = FilePrograms(given), self._live
        self._live = [*before, programs]  # from here on meet() adds to it
        try:
            for file_type in self._met:
                programs.add(file_type)
        except BaseException:
            self._live = before
            raise
        run(programs)
        self._live = [programs]

    def clear(self) -> None:
        """Remove the filter."""
        self._live = []
