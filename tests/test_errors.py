"""Errors of linkrx in other processes."""

from __future__ import annotations

import copy
import errno
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from support import captures

import linkrx
from linkrx import _core, errors

ERRORS = [
    linkrx.LinkrxError("some text"),
    linkrx.UnsupportedSource("some text"),
    linkrx.UnsupportedOption("some text"),
    linkrx.BackendUnavailable("some text"),
    linkrx.Busy("some text"),
    linkrx.Closed("some text"),
    linkrx.Ended(errno.ENODEV, "some text"),
    linkrx.MissingPrivilege("opening a socket", "CAP_NET_RAW", "type sudo"),
    linkrx.MissingPrivilege("opening a file", "CAP_NET_ADMIN", "type sudo", errno.EACCES),
    linkrx.DamagedCapture("some.pcap", 24, "it is cut"),
    linkrx.RecordingFailed("some.pcap", OSError(errno.ENOSPC, "full"), 5, 3),
]


def public() -> set[type[linkrx.LinkrxError]]:
    """Every class of errors."""
    return {
        thing
        for thing in vars(errors).values()
        if isinstance(thing, type) and issubclass(thing, linkrx.LinkrxError)
    }


def test_each_class_is_here() -> None:
    """The list above has every class."""
    assert {type(error) for error in ERRORS} == public()


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_copies(error: linkrx.LinkrxError, again: Callable[[linkrx.LinkrxError], linkrx.LinkrxError]) -> None:
    """A copy and a pickle of an error have its class, its text, its errno, its attributes and its notes."""
    error.add_note("a note")
    other = again(error)
    assert (type(other), str(other), other.args) == (type(error), str(error), error.args)
    assert getattr(other, "errno", None) == getattr(error, "errno", None)
    assert getattr(other, "strerror", None) == getattr(error, "strerror", None)
    assert vars(other) == vars(error)


def count(path: Path) -> int:
    """The number of packets of a capture file."""
    with linkrx.open(path) as rx:
        return sum(map(len, rx.batches()))


@pytest.mark.skipif(_core.reason is not None, reason=f"capture files take the C core: {_core.reason}")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_damaged_file_in_a_pool_of_processes(tmp_path: Path) -> None:
    """A process of a pool that reads a damaged file returns the error, and the pool goes on."""
    whole, damaged = tmp_path / "whole.pcap", tmp_path / "damaged.pcap"
    whole.write_bytes(captures.pcap([captures.Recorded(captures.frame(60), 60, 0)] * 3))
    damaged.write_bytes(whole.read_bytes()[:-1])
    # Not "spawn", which leaves a descriptor of its resource tracker open.
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        with pytest.raises(linkrx.DamagedCapture, match="is damaged at byte 176") as caught:
            pool.submit(count, damaged).result()
        assert (caught.value.errno, caught.value.offset) == (errno.EBADMSG, 176)
        assert pool.submit(count, whole).result() == 3
