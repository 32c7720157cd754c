"""Every option and every timeout refuses invalid numbers with an error that names it."""

from __future__ import annotations

import asyncio
import math
import re
import socket
import sys
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

import linkrx

# Options that take numbers, each with other values that it accepts.
NUMERIC: dict[str, tuple[object, ...]] = {
    "batch_size": (None,),
    "vnet_header": (None, True, False),
    "buffer_sizes": (None,),
    "snaplen": (None,),
    "fanout": (None, "auto"),
    "receive_buffer": (None,),
    "latency": (),
    "protocol": (None,),
}
NUMBERS = [math.nan, math.inf, -math.inf, -1, -0.5, 2**80, -(2**80), 10**400, 1.5, 1e300, Decimal(1)]
OTHERS = [
    True,
    None,
    "",
    "1",
    [],
    [1.0],
    [math.nan],
    [True],
    (),
    (-1,),
    (math.inf, "hash"),
    {},
    {1},
    1j,
    object(),
]


def test_the_numeric_options_are_these() -> None:
    """Every option of open whose type includes a number is tested below."""
    types = {name: str(kind) for name, kind in linkrx.OpenOptions.__annotations__.items()}
    assert {name for name, kind in types.items() if re.search(r"\b(int|float)\b", kind)} == set(NUMERIC)


def is_one(name: str, value: Any) -> bool:
    """Whether an option accepts a value."""
    if name == "latency":
        return value is None or (type(value) in (int, float) and 0 <= value <= sys.float_info.max)
    return any(value is other for other in NUMERIC[name])


@pytest.mark.parametrize("name", NUMERIC)
@pytest.mark.parametrize("value", [*NUMBERS, *OTHERS], ids=lambda value: repr(value)[:20])
def test_invalid_numbers_of_options(datagram: socket.socket, name: str, value: Any) -> None:
    """A number out of range raises ValueError, and a value of another type TypeError. Both messages begin with the option's name."""
    if is_one(name, value):
        return
    options: dict[str, Any] = {name: value}
    number = type(value) is int or (type(value) is float and name == "latency")
    kinds = ValueError if number and name != "buffer_sizes" else (TypeError, ValueError)
    for call in (linkrx.open, linkrx.choose):
        with pytest.raises(kinds, match=f"^{name}=") as caught:
            call(datagram, **options)
        assert not isinstance(caught.value, linkrx.LinkrxError)


async def _first(batches: Any) -> None:
    async for _ in batches:
        return


WAYS: dict[str, Callable[[linkrx.Dispatcher, Any], object]] = {
    "dispatch": lambda rx, timeout: rx.dispatch(timeout),
    "recv": lambda rx, timeout: rx.recv(timeout),
    "batches": lambda rx, timeout: next(rx.batches(timeout)),
    "async batches": lambda rx, timeout: asyncio.run(_first(rx.batches(timeout))),
    "run": lambda rx, duration: rx.run(duration=duration),
    "duration": lambda rx, duration: rx.batches(duration=duration),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("timeout", "kind"),
    [
        (math.nan, ValueError),
        (-1, ValueError),
        (-math.inf, ValueError),
        (10**400, ValueError),
        ("1", TypeError),
        ([], TypeError),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_timeout(datagram: socket.socket, way: str, timeout: Any, kind: type[Exception]) -> None:
    """Every call that receives refuses an invalid timeout with an error that names it."""
    with linkrx.open(datagram, lambda *_: None) as rx, pytest.raises(kind, match=r"^(timeout|duration)="):
        WAYS[way](rx, timeout)


@pytest.mark.parametrize("sizes", [(math.nan,), (1.5,), (True,), ("1",), 3, None])
def test_invalid_buffer_sizes(sizes: Any) -> None:
    """IovecBuffer raises TypeError, which names the sizes, for sizes that are not int."""
    with pytest.raises(TypeError, match=r"^buffer_sizes="):
        linkrx.IovecBuffer(sizes)


@pytest.mark.parametrize("size", [math.nan, 1.5, True, "1", None])
def test_invalid_header_sizes(size: Any) -> None:
    """IovecBuffer raises TypeError for a virtio-net header size that is not int."""
    with pytest.raises(TypeError, match=r"^vnet_header_size="):
        linkrx.IovecBuffer(vnet_header_size=size)
