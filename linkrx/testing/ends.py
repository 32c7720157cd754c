"""The ends of a test's network: interfaces on which a test sends frames and expects packets."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack

from linkrx.errors import Closed, Ended
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

PATIENCE = 5.0  # seconds to wait for an expected packet
QUIET = 0.1  # seconds to wait for unexpected packets

# Seconds that a ring may delay a packet. Its timeout is a millisecond, which kernels before 6.18 round up to two ticks of a clock
# of 100 Hz or more: prb_setup_retire_blk_timer() of net/packet/af_packet.c.
RING_DELAY = 0.025

# For 8,000 frames of an MTU of 1500 that come at once. Of frames that come one by one, each takes one of its 128 blocks.
RING_BYTES = 16 * 1024 * 1024

SENT_AT_ONCE = 16  # frames, before packets are taken out of the rings


class End:
    """An interface. `inject` sends a frame out of it, `expect` waits for a frame that comes in on it.

    `Network` makes and closes it. It keeps incoming packets from the start, also while no test waits. Any thread may call its
    methods. Only one thread at a time may call those that wait.
    """

    def __init__(self, network: Network, name: str) -> None:
        self._network = network
        self._device: Device = network.inside(lambda: Device(name))
        self._came: list[Packet] = []  # packets that were not expected yet
        self.recorded: list[Packet] = []  # all packets in both directions, if the network records
        self._taking = threading.RLock()
        self._waits = False  # the thread that has the lock takes packets
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
            # Binding to an interface that is down leaves ENETDOWN in SO_ERROR. Clear it.
            injector.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except BaseException:
            injector.close()
            raise
        return injector

    # Properties.

    @property
    def link(self) -> Link:
        """The current state of the interface. Raises AssertionError if it was deleted."""
        link = self._network.route.link(index=self._device.index)
        assert link is not None, f"the interface {self._device.index} is gone"
        return link

    @property
    def name(self) -> str:
        """The current name of the interface."""
        return str(self._network.inside(lambda: self._device.name))

    @property
    def index(self) -> int:
        """The interface index. It does not change with the name."""
        return self._device.index

    @property
    def mac(self) -> bytes:
        """The link address: 6 bytes, or none on a TUN device."""
        return self.link.address

    @property
    def mtu(self) -> int:
        """The MTU in bytes, without the link header."""
        return self.link.mtu or 0

    @property
    def addresses(self) -> list[Address]:
        """The IP addresses with their prefix lengths."""

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

    # Configuration.

    def up(self) -> None:
        """Set the interface up. Its carrier may come later: see `wait_for_carrier`."""
        self._set(state="up")

    def down(self) -> None:
        """Set the interface down."""
        self._set(state="down")

    def delete(self) -> None:
        """Delete the interface. This deletes both ends of a veth pair."""
        self._network.configure(lambda route: route.link("del", index=self.index))

    def rename(self, name: str) -> None:
        """Rename the interface. Before Linux 6.2 this sets it down and up again."""
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
        """Switch checksum and segmentation offloads on or off. With offloads on, the interface sends super-packets and packets with
        unfinished checksums.

        They are off in every end that `Network` makes, so that frames look as on a wire. The queue of a TAP or TUN device sets
        its offloads: `Network.tap(vnet_header=True, offload=True)`.
        """
        self._network.inside(lambda: ethtool.set_offloads(self.name, on))

    def add_address(self, address: str) -> None:
        """Add an IP address, such as "10.0.0.1/24". It is usable at once if the interface has a carrier.

        The first IPv6 address switches IPv6 on. From then on the kernel sends multicast listener reports.
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
                # A kernel worker adds the route of a local address later, even without duplicate address detection.
                deadline = time.monotonic() + PATIENCE
                while not list(route.get_routes(family=socket.AF_INET6, table=RT_TABLE_LOCAL, dst=ip)):
                    assert time.monotonic() < deadline, f"{address} never became local"

        self._network.configure(add)

    def _set(self, **settings: Any) -> None:
        self._network.configure(lambda route: route.link("set", index=self.index, **settings))

    # Sending.

    def inject(self, frames: Frame | Iterable[Frame], timeout: float = PATIENCE) -> None:
        """Send one or several frames out of this interface: to the other end, or to the program that has the queue open.

        Waits at most `timeout` seconds for the carrier and for room in the queue. Raises AssertionError if that is not enough or
        the interface is down, and ValueError for a frame that is too long for the MTU.
        """
        __tracebackhide__ = True
        deadline = time.monotonic() + timeout
        self.wait_for_carrier(timeout)
        for number, frame in enumerate(frames_of(frames)):
            if number % SENT_AT_ONCE == 0:
                self._network.take_in()
            self._injector.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                self._injector.send(frame)
            except TimeoutError:
                raise AssertionError(
                    f"{self.name} took {number} frames in {timeout:g} s and has no room for more: no program reads them"
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
        """Wait until the interface has a carrier and sends frames. Raises AssertionError if it is down or gets no carrier in time.

        `inject` calls this. Call it before another program or the kernel sends.
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

    # Receiving.

    def expect(self, wanted: Wanted, timeout: float = PATIENCE) -> Packet:
        """Return the first packet that is `wanted`. Wait for it at most `timeout` seconds.

        `wanted` is a frame with link header and VLAN tag, a predicate of a packet, or an expression in tcpdump's language such as
        "udp port 53", which needs libpcap. Packets that came before count, unless an `expect` returned them. Other packets stay
        for the next `expect`. Raises AssertionError, which shows the packets that came instead.
        """
        __tracebackhide__ = True
        is_wanted = self._matcher(wanted)
        with self._alone():
            for index, packet in enumerate(self._came):
                if is_wanted(packet):
                    return self._came.pop(index)
            for packet in self._coming(timeout):
                if is_wanted(packet):
                    return packet
                self._came.append(packet)
        lines = failure(wanted, self._came, f"within {timeout:g} s", self._title, self._ethernet)
        raise AssertionError("\n".join([*lines, *self._losses()]))

    def collect(self, count: int, timeout: float = PATIENCE) -> list[Packet]:
        """Return the next `count` packets of any kind. Raises AssertionError if they do not come within `timeout` seconds."""
        __tracebackhide__ = True
        with self._alone():
            if len(self._came) < count:
                for packet in self._coming(timeout):
                    self._came.append(packet)
                    if len(self._came) == count:
                        break
            if len(self._came) >= count:
                taken, self._came = self._came[:count], self._came[count:]
                return taken
            came = [packet.tagged() for packet in self._came]
        first = f"{len(came)} of {count} packets came in on {self._title} within {timeout:g} s:"
        raise AssertionError("\n".join([first, *differences.listed(came, self._ethernet), *self._losses()]))

    def expect_nothing(self, seconds: float = QUIET, wanted: Wanted | None = None) -> None:
        """Raise AssertionError if a packet came that no `expect` returned, or if one comes within `seconds`.

        With `wanted`, as for `expect`, only wanted packets count. Other packets stay for the next `expect`.
        """
        __tracebackhide__ = True
        counts = (lambda _: True) if wanted is None else self._matcher(wanted)
        with self._alone():
            if not any(counts(packet) for packet in self._came):
                for packet in self._coming(seconds):
                    self._came.append(packet)
                    if counts(packet):
                        break
            unwelcome = [packet.tagged() for packet in self._came if counts(packet)]
        if unwelcome:
            what = "nothing" if wanted is None else f"no {title_of(wanted)}"
            first = f"{self._title} should have got {what} within {seconds:g} s, but got:"
            raise AssertionError("\n".join([first, *differences.listed(unwelcome, self._ethernet)]))

    def _matcher(self, wanted: Wanted) -> Callable[[Packet], object]:
        return matcher_of(wanted, self._rx.capabilities, self._ethernet)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no other call take packets meanwhile. Makes room in all ends first."""
        self._network.take_in()
        with self._taking:
            before, self._waits = self._waits, True
            try:
                yield
            finally:
                self._waits = before

    def take_in(self) -> None:
        """Take the packets that wait, so that there is room for more. Does nothing while another call takes packets."""
        if self._taking.acquire(blocking=False):
            try:
                if not self._waits:
                    with suppress(Closed):  # in a forked child, which may send
                        self._came += self._coming(None)
            finally:
                self._taking.release()

    def _coming(self, seconds: float | None) -> Iterator[Packet]:
        """Incoming packets within that time, or until the interface is deleted. Includes all that came before the call.

        None: packets that can be read now.
        """
        deadline = 0.0 if seconds is None else time.monotonic() + max(seconds, RING_DELAY)
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
        """Receive and keep the packets that are queued."""
        with self._alone():
            self._came += self._coming(0)

    def _losses(self) -> Iterator[str]:
        """The lines of a failure message about lost packets."""
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
    def _title(self) -> str:
        link = self._network.route.link(index=self.index)
        return link.name if link else f"the interface {self.index}"

    def close(self) -> None:
        """Stop receiving. The interface stays."""
        try:
            self._rx.close()
        finally:
            self._injector.close()


class QueueOptions(TypedDict, total=False):
    """Options of `linkrx.TunTap` for `Network.tap` and `Network.tun`. Each is False by default."""

    multi_queue: bool
    vnet_header: bool
    offload: bool


class Tap(End):
    """A TAP or TUN device. The program under test uses its queue; the test uses the device.

    A program in this process uses `queue`, an open `linkrx.TunTap`. A program in another process opens the device by name. The
    program reads injected frames from the queue. Frames that it writes to the queue come in at this end.
    """

    def __init__(self, network: Network, name: str, mode: str, **options: Unpack[QueueOptions]) -> None:
        self._mode, self._options = mode, options
        self._queues: list[TunTap] = []
        super().__init__(network, name)

    @property
    def queue(self) -> TunTap:
        """The queue. It is opened on first use, and closed after the test."""
        return self._queues[0] if self._queues else self.open_queue()

    def open_queue(self) -> TunTap:
        """Open another queue. More than one needs `multi_queue=True`. Closed after the test."""
        name = self.name
        opened: TunTap = self._network.inside(lambda: TunTap(name, self._mode, **self._options))
        self._queues.append(opened)
        if self.link.up:
            self.wait_for_carrier()
        return opened

    def _no_carrier(self) -> str:
        return f"no program has its queue open; `.queue` opens it, and so does TunTap({self._title!r}, {self._mode!r})"

    def close(self) -> None:
        """Stop receiving, and close the queues that this object opened."""
        try:
            super().close()
        finally:
            for queue in self._queues:
                queue.close()


def _receiving(records: bool) -> tuple[str, OpenOptions]:
    """The backend of this host that reports most about packets, and options that need no privilege."""
    there = {info.name: info for info in backends() if info.supported}
    name = next(name for name in ("packet_mmap", "recvmmsg", "os_readv") if name in there)
    options: OpenOptions = {}
    if "timestamps" in there[name].honours:
        options = {"timestamps": True, "outgoing": records}
    if name == "packet_mmap":
        options["receive_buffer"] = RING_BYTES
    return name, options
