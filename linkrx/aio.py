"""Waiting for a descriptor under asyncio and the loops that speak its language, such as uvloop."""

from __future__ import annotations

import asyncio


async def readable(fd: int, timeout: float | None = None) -> bool:
    """Let the running event loop work until `fd` is readable; False after `timeout` seconds.

    The reader is taken out as soon as it fires: left in, it would fire again in every turn of the loop for as long
    as the packets are not fetched.
    """
    loop = asyncio.get_running_loop()
    happened: asyncio.Future[bool] = loop.create_future()

    def settle(result: bool) -> None:
        if not happened.done():
            happened.set_result(result)

    timer = None if timeout is None else loop.call_later(timeout, settle, False)
    loop.add_reader(fd, settle, True)
    try:
        return await happened
    finally:
        loop.remove_reader(fd)
        if timer is not None:
            timer.cancel()
