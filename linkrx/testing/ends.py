"""The ends of a test's network: interfaces that a test sends frames out of, and that it says what must come in on."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack

from linkrx.errors import Ended
from linkrx.factory import open
from linkrx.kernel import ethtool
from linkrx.kernel.rtnetlink import Link
from linkrx.kernel.uapi import ARPHRD_ETHER, IFA_F_NODAD, RT_TABLE_LOCAL
from linkrx.packets import Packet
from linkrx.registry import backends
from linkrx.sources.options import OpenOptions
from linkrx.sources.tuntap import TunTap
from linkrx.testing import differences
from linkrx.testing.devices import Device
from linkrx.testing.wanted import Frame, Wanted, failure, frames_of, matcher_of, title_of

if TYPE_CHECKING:
    from linkrx.testing.network import Network

Address: TypeAlias = ipaddress.IPv4Interface | ipaddress.IPv6Interface

# Only a test that fails waits as long as this.
PATIENCE = 5.0  # seconds
QUIET = 0.1  # seconds

# A ring holds a packet back for a millisecond, which kernels before 6.18 round up to two ticks of their clock of 100 Hz or more:
# prb_setup_retire_blk_timer() of net/packet/af_packet.c.
HELD_BACK = 0.025  # seconds

RING_BYTES = (
    4 * 1024 * 1024
)  # where what came waits for the test: 2,000 of the longest frames of an ordinary MTU


class End:
    """An interface. `inject` sends a frame out of it, `expect` waits for a frame that comes in on it.

    Made by `Network`, which also ends it. What comes in is kept from the start, whether a test waits or not. Every method
    works in the network of the end, whichever thread calls it; those that wait are for one thread at a time.
    """

    def __init__(self, network: Network, name: str) -> None:
        self._network = network
        self._device: Device = network.inside(lambda: Device(name))
        self._came: list[Packet] = []  # what nobody has expected yet
        self.recorded: list[Packet] = []  # all there was, in both directions, where the network records
        self._injector: socket.socket = network.inside(self._open_injector)
        try:
            backend, options = _receiving(network.records)
            self._rx = network.inside(lambda: open(name, backend=backend, **options))
        except BaseException:
            self._injector.close()
            raise
        self._ethernet = self.link.hardware_type == ARPHRD_ETHER
        self._dropped = self.link.tx_dropped or 0

    def _open_injector(self) -> socket.socket:
        injector = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            injector.bind((self.name, 0))
            # Binding to what is down has left an ENETDOWN behind.
            injector.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except BaseException:
            injector.close()
            raise
        return injector

    # What it is.

    @property
    def link(self) -> Link:
        """What the kernel says of the interface now. Raises AssertionError when it is gone."""
        link = self._network.route.link(index=self._device.index)
        assert link is not None, f"the interface {self._device.index} is gone"
        return link

    @property
    def name(self) -> str:
        """What the interface is called now."""
        return str(self._network.inside(lambda: self._device.name))

    @property
    def index(self) -> int:
        """The number of the interface, which stays when it is renamed."""
        return self._device.index

    @property
    def mac(self) -> bytes:
        """The link address, 6 bytes; nothing on a TUN device."""
        return self.link.address

    @property
    def mtu(self) -> int:
        """The longest packet in bytes, link header excluded."""
        return self.link.mtu or 0

    @property
    def addresses(self) -> list[Address]:
        """The IP addresses, with their networks."""

        def ask(route: Any) -> list[Address]:
            found = route.get_addr(index=self.index)
            return [
                ipaddress.ip_interface(f"{one.get('local') or one.get('address')}/{one['prefixlen']}")
                for one in found
            ]

        return self._network.configure(ask)

    def __repr__(self) -> str:
        link = self._network.route.link(index=self.index) if self._network.is_open else None
        return f"<{type(self).__name__} {link.name if link else 'gone'}>"

    # What can be done to it.

    def up(self) -> None:
        """Set it up. It gets a carrier when the other end is up, or somebody has the queue open: see `wait_for_carrier`."""
        self._set(state="up")

    def down(self) -> None:
        """Set it down."""
        self._set(state="down")

    def delete(self) -> None:
        """Delete the interface; of a veth pair that deletes both ends."""
        self._network.configure(lambda route: route.link("del", index=self.index))

    def rename(self, name: str) -> None:
        """Give it another name. Before Linux 6.2 it goes down and up for that."""
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            self._set(ifname=name)
        except NetlinkError as error:
            if error.code != errno.EBUSY:
                raise
            self.down()
            self._set(ifname=name)
            self.up()

    def set_mtu(self, mtu: int) -> None:
        """Set the MTU, in bytes. The other end of a veth pair keeps its own."""
        self._set(mtu=mtu)

    def set_mac(self, mac: bytes) -> None:
        """Set the link address, 6 bytes."""
        self._set(address=mac.hex(":"))

    def set_offloads(self, on: bool) -> None:
        """Whether packets come with unfinished checksums and as super-packets, as between a kernel and good hardware.

        Off in every end that `Network` makes: frames are what they would be on a wire. A TAP or TUN device has the
        offloads of its queue: `Network.tap(vnet_header=True, offload=True)`.
        """
        self._network.inside(lambda: ethtool.set_offloads(self.name, on))

    def add_address(self, address: str) -> None:
        """Give it an IP address, as "10.0.0.1/24", ready for use where the interface has a carrier.

        The first IPv6 address turns IPv6 on: from then on the kernel sends reports of the groups that it joins.
        """
        wanted = ipaddress.ip_interface(address)
        flags = 0
        if wanted.version == 6:
            flags = IFA_F_NODAD
            folder = Path("/proc/sys/net/ipv6/conf") / self.name
            for name, value in {"addr_gen_mode": "1", "disable_ipv6": "0"}.items():
                self._network.inside(partial((folder / name).write_text, value))

        def add(route: Any) -> None:
            ip, length = str(wanted.ip), wanted.network.prefixlen
            route.addr("add", index=self.index, address=ip, prefixlen=length, flags=flags)
            if flags and self._has_carrier():
                # A worker of the kernel's makes it local, be there nobody to ask whether it is another's.
                deadline = time.monotonic() + PATIENCE
                while not list(route.get_routes(family=socket.AF_INET6, table=RT_TABLE_LOCAL, dst=ip)):
                    assert time.monotonic() < deadline, f"{address} never became local"

        self._network.configure(add)

    def _set(self, **settings: Any) -> None:
        self._network.configure(lambda route: route.link("set", index=self.index, **settings))

    # What goes out of it.

    def inject(self, frames: Frame | Iterable[Frame], timeout: float = PATIENCE) -> None:
        """Send one frame, or several, out of this interface: to the other end, or to whoever has the queue open.

        Waits at most `timeout` seconds for a carrier, which is there when the other end is ready, and for room. Raises
        AssertionError when the time is over or the interface is down, ValueError for a frame that is longer than the
        MTU allows.
        """
        __tracebackhide__ = True
        deadline = time.monotonic() + timeout
        self.wait_for_carrier(timeout)
        for number, frame in enumerate(frames_of(frames)):
            self._injector.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                self._injector.send(frame)
            except TimeoutError:
                raise AssertionError(
                    f"{self.name} took {number} frames in {timeout:g} s and has no room for more: nobody reads them"
                ) from None
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    raise ValueError(
                        f"a frame of {len(frame)} bytes is too long for {self.name}, whose MTU is {self.mtu}: "
                        "set_mtu() raises it"
                    ) from error
                error.add_note(f"{self.name} refused frame {number}, of {len(frame)} bytes")
                raise

    def wait_for_carrier(self, timeout: float = PATIENCE) -> None:
        """Wait until what is sent leaves the interface. Raises AssertionError when it is down, or gets no carrier in time.

        `inject` does it by itself. Do it before others send, such as the kernel.
        """
        __tracebackhide__ = True
        deadline = time.monotonic() + timeout
        while not self._has_carrier():
            if not self.link.up:
                raise AssertionError(f"{self.name} is down: up() sets it up")
            if time.monotonic() >= deadline:
                raise AssertionError(f"{self.name} got no carrier within {timeout:g} s: {self._no_carrier()}")
            os.sched_yield()

    def _has_carrier(self) -> bool:
        return ethtool.has_carrier(self.link.name, self._injector)

    def _no_carrier(self) -> str:
        """Why there is no carrier."""
        return "its other end is down"

    # What comes in.

    def expect(self, wanted: Wanted, timeout: float = PATIENCE) -> Packet:
        """Return the first packet that is `wanted`, waiting for it at most `timeout` seconds.

        `wanted` is a frame, link header and VLAN tag included, a predicate of a packet, or an expression of tcpdump's language,
        as "udp port 53" (which takes libpcap). Looks first at what came
        already and was not expected yet; that stays for the next `expect`. Raises AssertionError that tells what came
        instead.
        """
        __tracebackhide__ = True
        is_wanted = self._matcher(wanted)
        for index, packet in enumerate(self._came):
            if is_wanted(packet):
                return self._came.pop(index)
        deadline = time.monotonic() + timeout
        for packet in self._coming(deadline):
            if is_wanted(packet):
                return packet
            self._came.append(packet)
        told = failure(wanted, self._came, f"within {timeout:g} s", self._told_name, self._ethernet)
        raise AssertionError("\n".join([*told, *self._losses()]))

    def collect(self, count: int, timeout: float = PATIENCE) -> list[Packet]:
        """Return the next `count` packets, whatever they are. Raises AssertionError unless they come in `timeout` seconds."""
        __tracebackhide__ = True
        deadline = time.monotonic() + timeout
        if len(self._came) < count:
            for packet in self._coming(deadline):
                self._came.append(packet)
                if len(self._came) == count:
                    break
        if len(self._came) < count:
            came = self._seen()
            told = [f"{len(came)} of {count} packets came in on {self._told_name} within {timeout:g} s:"]
            raise AssertionError(
                "\n".join([*told, *differences.listed(came, self._ethernet), *self._losses()])
            )
        taken, self._came = self._came[:count], self._came[count:]
        return taken

    def expect_nothing(self, seconds: float = QUIET, wanted: Wanted | None = None) -> None:
        """Raise AssertionError if anything came that was not expected yet, or comes within `seconds`.

        With `wanted`, as `expect` takes it, only what is wanted counts; the rest stays for the next `expect`.
        """
        __tracebackhide__ = True
        counts = (lambda _: True) if wanted is None else self._matcher(wanted)
        deadline = time.monotonic() + seconds
        if not any(counts(packet) for packet in self._came):
            for packet in self._coming(deadline):
                self._came.append(packet)
                if counts(packet):
                    break
        unwelcome = [packet.tagged() for packet in self._came if counts(packet)]
        if unwelcome:
            what = "nothing" if wanted is None else f"no {title_of(wanted)}"
            told = f"{self._told_name} should have got {what} within {seconds:g} s, but got:"
            raise AssertionError("\n".join([told, *differences.listed(unwelcome, self._ethernet)]))

    def _matcher(self, wanted: Wanted) -> Callable[[Packet], object]:
        return matcher_of(wanted, self._rx.capabilities, self._ethernet)

    def _coming(self, deadline: float) -> Iterator[Packet]:
        """What comes in until the deadline, or until the interface is gone; all that had come before is among it."""
        deadline = max(deadline, time.monotonic() + HELD_BACK)
        while True:
            try:
                packet = self._rx.recv(max(deadline - time.monotonic(), 0))
            except (TimeoutError, Ended):
                return
            if self._network.records:
                self.recorded.append(packet)
            if not packet.outgoing:
                yield packet

    def record_the_rest(self) -> None:
        """Keep what waits to be received."""
        self._came += self._coming(0)

    def _seen(self) -> list[bytes]:
        return [packet.tagged() for packet in self._came]

    def _losses(self) -> Iterator[str]:
        """What was lost on the way."""
        link = self._network.route.link(index=self.index)
        if link is None:
            yield "The interface is gone."
            return
        if not self._has_carrier():
            yield f"{link.name} has no carrier: {self._no_carrier()}." if link.up else f"{link.name} is down."
        drops = self._rx.stats().kernel_drops
        if drops:
            yield f"The kernel dropped {drops} packets that the test did not take in time: receive more often."
        dropped = (link.tx_dropped or 0) - self._dropped
        if dropped:
            yield f"{dropped} frames that were sent out of {link.name} were dropped: nobody read them in time."

    @property
    def _told_name(self) -> str:
        link = self._network.route.link(index=self.index)
        return link.name if link else f"the interface {self.index}"

    def close(self) -> None:
        """Stop receiving. The interface stays."""
        try:
            self._rx.close()
        finally:
            self._injector.close()


class QueueOptions(TypedDict, total=False):
    """Options of `linkrx.TunTap` that `Network.tap` and `Network.tun` take: False where they are left out."""

    multi_queue: bool
    vnet_header: bool
    offload: bool


class Tap(End):
    """A TAP or TUN device. The program under test has its queue; the test is on the side of the kernel.

    `queue` is for a program in this process: an open `linkrx.TunTap`. A program of its own process opens the device by
    name instead. A frame that is injected is read from the queue; a frame that is written to the queue comes in.
    """

    def __init__(self, network: Network, name: str, mode: str, **options: Unpack[QueueOptions]) -> None:
        self._mode, self._options = mode, options
        self._queues: list[TunTap] = []
        super().__init__(network, name)

    @property
    def queue(self) -> TunTap:
        """The queue, opened when it is first asked for and closed behind the test."""
        return self._queues[0] if self._queues else self.open_queue()

    def open_queue(self) -> TunTap:
        """One more queue; more than one takes `multi_queue=True`. Closed behind the test."""
        name = self.name
        opened: TunTap = self._network.inside(lambda: TunTap(name, self._mode, **self._options))
        self._queues.append(opened)
        if self.link.up:
            self.wait_for_carrier()
        return opened

    def _no_carrier(self) -> str:
        return f"nobody has its queue open; `.queue` opens it, and so does TunTap({self._told_name!r}, {self._mode!r})"

    def close(self) -> None:
        """Stop receiving, and close the queues that were opened here."""
        try:
            super().close()
        finally:
            for queue in self._queues:
                queue.close()


class Bridge(End):
    """A bridge: a switch that ends are plugged into. It forwards at once, without spanning tree and IGMP snooping."""

    def attach(self, end: End) -> None:
        """Make the interface of an end a port. Returns when frames go through it, if it is up and has a carrier."""
        self._network.configure(lambda route: route.link("set", index=end.index, master=self.index))
        deadline = time.monotonic() + PATIENCE
        while end._has_carrier() and not end.link.forwards:
            assert time.monotonic() < deadline, f"{end.name} never became a forwarding port of {self.name}"
            os.sched_yield()

    def port(self) -> End:
        """A new end that is plugged in with a cable: one end of a veth pair, whose other end is a port."""
        near, far = self._network.veth()
        self.attach(far)
        return near

    def _no_carrier(self) -> str:
        return "none of its ports has one"


def _receiving(records: bool) -> tuple[str, OpenOptions]:
    """The backend that can tell most on this host, and options that need no privilege."""
    there = {info.name: info for info in backends() if info.supported}
    name = next(name for name in ("packet_mmap", "recvmmsg", "os_readv") if name in there)
    options: OpenOptions = {}
    if "timestamps" in there[name].honours:
        options = {"timestamps": True, "outgoing": records}
    if name == "packet_mmap":
        options["receive_buffer"] = RING_BYTES
    return name, options
