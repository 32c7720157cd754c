"""The report of one receive, in front of the table of its packets. `_core/report.h` has the same layout."""

from __future__ import annotations

import ctypes


class Report(ctypes.Structure):
    """struct lrx_report.

    `receives` system calls received `count` packets, which use `end` bytes of the arena. `error` is an errno that followed these
    packets, or came without any. It stays until it is handled. `held` packets wait in the backend for the next fill. `most` is how
    many packets that fill may receive; 0 means as many as there are rows. The classifier sets `classified` to 1 plus the number
    of packets, and `rows` to the rows of the table that it wrote. `held_back` frames of earlier fills wait in the receiver for
    the same batch. Only C uses the rest: the classifier that a fill calls, the address of the table that it writes, and the function
    that releases the GIL after a fill has received several packets.
    """

    count: int
    receives: int
    end: int
    error: int
    classified: int
    rows: int
    held: int
    most: int
    held_back: int
    table: int

    _fields_ = (
        ("count", ctypes.c_uint32),
        ("receives", ctypes.c_uint32),
        ("end", ctypes.c_uint32),
        ("error", ctypes.c_uint32),
        ("classified", ctypes.c_uint32),
        ("rows", ctypes.c_uint32),
        ("held", ctypes.c_uint32),
        ("most", ctypes.c_uint32),
        ("held_back", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
        ("classifier", ctypes.c_void_p),
        ("table", ctypes.c_size_t),
        ("release_gil", ctypes.c_void_p),
        ("release_gil_argument", ctypes.c_void_p),
    )


REPORT_BYTES = ctypes.sizeof(Report)  # a multiple of 8, so that the columns after it are aligned
WORDS_BYTES = Report.classifier.offset  # bytes of the fields that each receive changes
