"""How the receiver waits, learns, is shared and is ended: what it promises beside every packet once and in order."""

from __future__ import annotations

import os

import pytest
from conftest import that_take

from linkrx import rigs
from linkrx.testing.stops import ignore

# Nobody can make a call block.


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    ("kind", "backend"),
    [(rigs.pipe_nonblocking, backend) for backend in that_take("pipe")]
    + [(rigs.tap, backend) for backend in that_take("tap")],
)
def test_somebody_makes_the_open_file_block(kind: rigs.MakeRig, backend: str) -> None:
    """Who shares the open file can clear O_NONBLOCK: no call blocks, with nothing there, or behind what is there."""
    with kind() as rig, rig.open(backend, ignore) as rx:
        fd = rig.source if isinstance(rig.source, int) else rig.source.fileno()  # type: ignore[union-attr]
        assert not os.get_blocking(fd)
        os.set_blocking(fd, True)
        assert rx.drain() == 0
        assert rx.dispatch(0.001) is True
        for count in (1, 3, 12):
            for number in range(count):
                rig.send(rig.frame(100, number))
            delivered = 0
            while delivered < count:
                delivered += rx.drain()
            assert delivered == count
            assert rx.drain() == 0
        assert rx.dispatch(0.001) is True
        assert rx.end is None
        assert os.get_blocking(fd)
