"""The fixtures in asynchronous tests."""

from __future__ import annotations

import asyncio

import pytest

from linkrx.testing.network import End

FRAME = bytes.fromhex("02005e000002 02005e000001 88b5") + bytes(50)


@pytest.mark.asyncio
async def test_ends(linkrx_veth: tuple[End, End]) -> None:
    """Methods that wait are run in a thread, and the others in the event loop, also those that configure."""
    near, far = linkrx_veth
    waiting = asyncio.create_task(asyncio.to_thread(far.expect, FRAME))
    near.set_mtu(1400)
    near.inject(FRAME)
    assert await waiting == FRAME
    assert near.mtu == 1400
