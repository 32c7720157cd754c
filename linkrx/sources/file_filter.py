"""The filter of a capture file: each link type in it has a program of its own, compiled when the first packet of that type comes."""

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
    """One filter, as struct lrx_file_programs, which classification finds at `address`."""

    def __init__(self, given: FilterLike) -> None:
        self._given = given
        self._table = _core.new("struct lrx_file_programs *")
        self._codes: list[bytearray] = []  # which the table points to
        self._adding = threading.RLock()
        self.address = _core.pointer(self._table)

    def add(self, file_type: int) -> None:
        """Have a program for this link type, as packets of the file tell it. Raises ValueError where there can be none."""
        table, most = self._table, _core.lib.LRX_FILE_PROGRAMS
        if file_type in table.file_types[0 : table.count]:
            return
        try:
            code = bytearray(filters.for_file(self._given, file_type).code)
        except RejectsAll:
            code = bytearray(_REJECT)  # other link types may have what it takes
        with self._adding:
            count = table.count
            if count == most:
                raise UnsupportedOption(f"a filter on packets of more than {most} link types in one file")
            self._codes.append(code)
            table.file_types[count] = file_type
            table.programs[count] = _core.at("struct lrx_instruction *", _core.address(code))
            table.count = count + 1


class FileFilters:
    """The link types that were met in a file, and the filters that must know them: the one in force, and one that is to take its place."""

    def __init__(self) -> None:
        self._met: list[int] = []
        self._live: list[FilePrograms] = []

    def meet(self, file_type: int) -> None:
        """Before the first packet of this link type, on the thread that receives. Raises ValueError where a filter cannot judge it."""
        if file_type not in self._met:
            self._met.append(file_type)
        for programs in tuple(self._live):
            programs.add(file_type)

    def put(self, given: FilterLike, run: Callable[[FilePrograms], None]) -> None:
        """Filter by this from now on. Raises ValueError, and changes nothing, where it cannot judge a link type that was met."""
        programs, before = FilePrograms(given), self._live
        self._live = [*before, programs]  # what is met from here on it is told
        try:
            for file_type in self._met:
                programs.add(file_type)
        except BaseException:
            self._live = before
            raise
        run(programs)
        self._live = [programs]

    def clear(self) -> None:
        """There is no filter any more."""
        self._live = []
