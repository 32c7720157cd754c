"""Checks of changes of the network device: down and up, another name, another namespace, deletion."""

from __future__ import annotations

import asyncio
import os
import selectors
from collections.abc import Callable
from contextlib import ExitStack

from linkrx.kernel.namespace import inside, new_network
from linkrx.packets import Packet
from linkrx.receiving.dispatcher import Dispatcher
from linkrx.receiving.stats import End
from linkrx.testing import rigs
from linkrx.testing.cells import Check, Inapplicable
from linkrx.testing.devices import Device, raised_injector
from linkrx.testing.packets import sample
from linkrx.testing.rigs import TAP_MTU, Rig
from linkrx.testing.stops import ignore
from linkrx.testing.waiting import PATIENCE, asleep, collect, flooded, number_of, running, until


def device_of(rig: Rig) -> Device:
    """The device behind the source. Raises Inapplicable if there is none."""
    if rig.device is None:
        raise Inapplicable("there is no network device behind it")
    return rig.device


def check_link_flaps(rig: Rig, backend: str) -> None:
    """Reception survives a link that goes down and up twice: queued packets are delivered, and later ones too."""
    device = device_of(rig)
    with rig.open(backend, ignore) as rx:
        for turn in range(1, 3):
            sent = sample(rig, 5)
            for frame in sent:
                rig.send(frame)
            assert [bytes(packet) for packet in collect(rx, 5)] == sent
            device.set_down()
            assert rx.dispatch(0.03) is True
            assert rx.end is None
            downs = rx.stats().link_downs
            assert downs == (turn if rx.capabilities.socket else None)
            device.set_up()
        rig.send(rig.frame(100))
        assert len(collect(rx, 1)) == 1
        # One sleep: the timer that watched the link is off.
        waits = rx.stats().waits
        assert rx.dispatch(0.05) is True
        assert rx.stats().waits == waits + 1


def check_link_flaps_under_traffic(rig: Rig, backend: str) -> None:
    """When the link goes down and up in a flood, reception goes on, and no packet comes twice or out of order."""
    device = device_of(rig)
    got: list[int] = []

    def deliver(_remote: object, _local: object, _protocol: int, packet: Packet) -> None:
        got.append(number_of(rig, packet))

    with rig.open(backend, deliver) as rx, flooded(rig), running(rx.run):
        try:
            for _ in range(3):
                seen = len(got)
                until(lambda seen=seen: len(got) > seen)  # type: ignore[misc]
                device.set_down()
                device.set_up()
            seen = len(got)
            until(lambda: len(got) > seen)
            assert rx.end is None
        finally:
            rx.stop()
    assert got == sorted(set(got))


def check_renamed(rig: Rig, backend: str) -> None:
    """Reception goes on when the device is renamed."""
    device = device_of(rig)
    name = device.name
    with rig.open(backend, ignore) as rx:
        device.rename("renamed0")
        rig.send(rig.frame(100, 1))
        assert [bytes(packet) for packet in collect(rx, 1)] == [rig.frame(100, 1)]
        assert rx.dispatch(0.03) is True
        assert rx.end is None
        device.rename(name)


def check_mtu_raised(rig: Rig, backend: str) -> None:
    """Frames up to an MTU that is raised after open are received whole."""
    device = device_of(rig)
    device.set_mtu(1500)
    with rig.open(backend) as rx:
        assert rx.capabilities.mtu in (None, 1500)
        device.set_mtu(TAP_MTU)
        for size in (1515, 9000, rig.longest - 14):
            rig.send(rig.frame(size, size))
            (got,) = collect(rx, 1)
            assert bytes(got) == rig.frame(size, size)
            assert not got.truncated


def check_moved(rig: Rig, backend: str) -> None:
    """When the device moves to another namespace, a queue goes on receiving, and a packet socket ends."""
    device = device_of(rig)
    name = device.name
    namespace = new_network()
    try:
        with rig.open(backend, ignore) as rx:
            device.move(namespace)
            if rx.capabilities.socket:
                assert rx.run() is End.LINK_GONE
                return
            with inside(namespace, lambda: raised_injector(name)) as injector:
                injector.send(rig.frame(100, 1))
                assert bytes(rx.recv(PATIENCE)) == rig.frame(100, 1)
                assert rx.end is None
                for _ in range(2000):
                    injector.send(rig.frame(100, 2))
                received = sum(map(len, rx.batches(0)))
                assert received + (rx.stats().kernel_drops or 0) == 2000
    finally:
        os.close(namespace)


# Deletion, in every way to receive.


def _run(rx: Dispatcher) -> None:
    rx.run()


def _batches(rx: Dispatcher) -> None:
    for _ in rx.batches():
        pass


def _each(rx: Dispatcher) -> None:
    for _ in rx:
        pass


def _recv(rx: Dispatcher) -> None:
    try:
        while True:
            rx.recv()
    except EOFError:
        pass


def _asynchronously(rx: Dispatcher) -> None:
    async def work() -> None:
        async for _ in rx:
            pass

    asyncio.run(work())


def _foreign_loop(rx: Dispatcher) -> None:
    vain = 0
    with selectors.DefaultSelector() as selector:
        selector.register(rx.fileno(), selectors.EVENT_READ)
        while rx.end is None:
            assert selector.select(PATIENCE), "fileno() did not become readable at the end"
            vain = 0 if rx.drain() else vain + 1
            assert vain < 100, "fileno() was readable, but drain() had no work"


WAYS: tuple[Callable[[Dispatcher], None], ...] = (
    _run,
    _batches,
    _each,
    _recv,
    _asynchronously,
    _foreign_loop,
)


def _deletion(way: Callable[[Dispatcher], None], *, when: str) -> Check:
    """Reception ends with LINK_GONE when the device is deleted: in a wait, in a flood, and while the link is down."""

    def check(rig: Rig, backend: str) -> None:
        device = device_of(rig)
        with rig.open(backend, ignore) as rx:
            if when == "busy":
                with flooded(rig), running(lambda: way(rx)):
                    until(lambda: rx.stats().packets > 100)
                    device.delete()
            elif when == "down":
                with running(lambda: way(rx)):
                    device.set_down()
                    # The kernel does not report a link that is down to a queue. A socket gets ENETDOWN, which must not end
                    # reception: more waits follow.
                    until(lambda: rx.stats().link_downs in (1, None))
                    waits = rx.stats().waits
                    if rx.capabilities.socket and way not in (_asynchronously, _foreign_loop):
                        until(lambda: rx.stats().waits > waits + 2)
                    assert rx.end is None
                    device.delete()
            else:
                rig.send(rig.frame(100))
                with running(lambda: way(rx)):
                    # These two sleep outside of linkrx.
                    until(
                        lambda: (
                            rx.stats().packets == 1
                            and (asleep(rx) or way in (_asynchronously, _foreign_loop))
                        )
                    )
                    device.delete()
            assert rx.end is End.LINK_GONE
            assert rx.dispatch() is False
            assert rx.stats().undelivered == 0

    check.__name__ = f"check_deleted_while_{when}__{way.__name__.strip('_')}"
    check.__doc__ = _deletion.__doc__
    return check


DELETIONS = tuple(_deletion(way, when=when) for when in ("waiting", "busy", "down") for way in WAYS)


def check_made_again(rig: Rig, backend: str) -> None:
    """After the deletion of a device, a new one with the same name can be opened. The old dispatcher stays ended."""
    device = device_of(rig)
    name = device.name
    with rig.open(backend, ignore) as rx:
        device.delete()
        assert rx.run() is End.LINK_GONE
        with ExitStack() as stack:
            if rx.capabilities.socket:
                again = stack.enter_context(rigs.interface(name))
            else:
                again = stack.enter_context({"tap": rigs.tap, "tun": rigs.tun}[rx.capabilities.kind](name))
            with again.open(backend) as other:
                assert other.capabilities.interface == name
                again.send(again.frame(100))
                assert bytes(other.recv(PATIENCE)) == again.frame(100)
                assert rx.dispatch() is False
