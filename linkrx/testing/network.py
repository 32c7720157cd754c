"""A private network for a test, and the interfaces in it.

    from linkrx.testing.network import Network

    with Network() as network:
        near, far = network.veth()
        near.inject(bytes.fromhex("ffffffffffff 020000000001 88b5") + b"hello")
        print(far.expect(lambda packet: packet.protocol == 0x88B5))

Needs CAP_SYS_ADMIN and CAP_NET_ADMIN, and pyroute2. Without root, `linkrx.kernel.namespace.enter_private_network` gives the
capabilities. The pytest plugin has the same as fixtures.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar, Unpack

from linkrx.capture.writer import PcapWriter, WritableFile
from linkrx.errors import LinkrxError
from linkrx.kernel import namespace
from linkrx.kernel.rtnetlink import RouteSocket
from linkrx.kernel.uapi import TUNSETPERSIST
from linkrx.sources.tuntap import TunTap
from linkrx.testing.bridges import Bridge
from linkrx.testing.ends import End, QueueOptions, Tap

__all__ = ["Bridge", "End", "Network", "QueueOptions", "Tap"]

Result = TypeVar("Result")
AnyEnd = TypeVar("AnyEnd", bound=End)


def _raise(error: LinkrxError) -> NoReturn:
    raise error


class Network:
    """A new network namespace. The `with` block runs in it, and so do the threads and processes that the block starts.

    `lo` is up and IPv6 is off. There are no other interfaces until the block makes some. At the end the thread returns to its old
    namespace. The kernel deletes the new one, with its devices, when no thread, process or socket uses it.
    """

    def __init__(self, *, records: bool = False, unable: Callable[[LinkrxError], NoReturn] = _raise) -> None:
        """`records`: keep every packet of every end in `End.recorded`. `unable` is called with the error if this host cannot make a
        namespace or a device. It must raise; by default it raises the error.
        """
        self.records = records
        self.ends: list[End] = []
        self._unable = unable
        self._opened = ExitStack()
        self._fd = -1

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            before = namespace.open_here()
            opening.callback(os.close, before)
            try:
                namespace.enter_new_network()
            except LinkrxError as error:
                self._unable(error)
            opening.callback(namespace.go_to, before)
            self._fd = namespace.open_here()
            opening.callback(self._close)
            self.route = RouteSocket()
            opening.callback(self.route.close)
            self._opened = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._opened, ExitStack() as closing:
            for end in self.ends:
                closing.callback(end.close)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)

    @property
    def is_open(self) -> bool:
        """Whether the `with` block runs."""
        return self._fd >= 0

    def fileno(self) -> int:
        """A descriptor of the namespace. -1 after the block."""
        return self._fd

    def inside(self, work: Callable[[], Result]) -> Result:
        """Run `work` in this network, in a new thread, and return its result. The calling thread may be in any network."""
        return namespace.inside(self._fd, work)

    def configure(self, work: Callable[[Any], Result]) -> Result:
        """Call `work` with a pyroute2.IPRoute of this network, and return its result.

        It runs in a new thread, because pyroute2 runs an event loop, and the calling thread may run one already.
        """
        try:
            from pyroute2 import IPRoute
        except ImportError as error:
            self._unable(
                LinkrxError(
                    f"making and configuring devices needs pyroute2 ({error}): "
                    "python3 -m pip install 'linkrx[pytest]'"
                )
            )

        def run() -> Result:
            with IPRoute() as route:
                return work(route)

        return self.inside(run)

    def write_capture(self, file: str | os.PathLike[str] | WritableFile) -> int:
        """Write all packets of all ends to a pcapng file, and return their number. Needs `records=True`.

        A packet that went from one end to another is in the file twice: as outgoing of one, and as incoming of the other.
        """
        for end in self.ends:
            end.record_the_rest()
        packets = sorted(
            (packet for end in self.ends for packet in end.recorded),
            key=lambda packet: packet.timestamp_ns or 0,
        )
        with PcapWriter(file) as writer:
            for packet in packets:
                writer.write(packet)
        return len(packets)

    def take_in(self) -> None:
        """Take the packets that wait in the ends, so that there is room for more. Ends do that before they send and wait."""
        for end in tuple(self.ends):
            end.take_in()

    # Devices.

    def tap(self, name: str | None = None, **options: Unpack[QueueOptions]) -> Tap:
        """Make a TAP device and set it up. The program under test opens its queue, or uses `.queue`. See `linkrx.TunTap`."""
        return self._queue_device("tap", name, options)

    def tun(self, name: str | None = None, **options: Unpack[QueueOptions]) -> Tap:
        """Make a TUN device and set it up. Its frames are IP packets."""
        return self._queue_device("tun", name, options)

    def veth(self, near: str | None = None, far: str | None = None) -> tuple[End, End]:
        """Make a veth pair and set both ends up. A frame that is injected at one end comes in at the other."""
        near = near or self._free_name("veth")
        far = far or self._free_name("veth", near)
        self._make("veth", ifname=near, peer=far)
        ends = (self._add(End(self, near)), self._add(End(self, far)))
        for end in ends:
            end.set_offloads(False)
            end.up()
        for end in ends:
            end.wait_for_carrier()
        return ends

    def bridge(self, name: str | None = None) -> Bridge:
        """Make a bridge without ports and set it up. `Bridge.port` adds a port."""
        name = name or self._free_name("br")
        self._make("bridge", ifname=name, br_forward_delay=0, br_stp_state=0, br_mcast_snooping=0)
        # With br_netfilter loaded, netfilter sees bridged packets, and the kernel drops malformed IP packets.
        for settings in Path("/proc/sys/net/bridge").glob("bridge-nf-call-*"):
            self.inside(lambda settings=settings: settings.write_text("0"))  # type: ignore[misc]
        made = self._add(Bridge(self, name))
        made.set_offloads(False)
        made.up()
        return made

    def end(self, name: str) -> End:
        """An end on an existing interface, such as `lo`."""
        return self._add(End(self, name))

    def _queue_device(self, mode: str, name: str | None, options: QueueOptions) -> Tap:
        if unknown := set(options) - set(QueueOptions.__annotations__):
            raise TypeError(f"{mode}() has no option {', '.join(map(repr, sorted(unknown)))}")
        name = name or self._free_name(mode)

        def make() -> None:
            with TunTap(name, mode, multi_queue=options.get("multi_queue", False)) as queue:
                fcntl.ioctl(queue.fileno(), TUNSETPERSIST, 1)  # it is deleted with the namespace

        try:
            self.inside(make)
        except LinkrxError as error:
            self._unable(error)
        made = self._add(Tap(self, name, mode, **options))
        made.up()
        return made

    def _make(self, kind: str, **settings: Any) -> None:
        def make(route: Any) -> None:
            from pyroute2.netlink.exceptions import NetlinkError

            try:
                route.link("add", kind=kind, **settings)
            except NetlinkError as error:
                if error.code != errno.EOPNOTSUPP:
                    raise
                raise LinkrxError(
                    f"this kernel makes no {kind} devices: load the driver with `sudo modprobe {kind}`"
                ) from error

        try:
            self.configure(make)
        except LinkrxError as error:
            self._unable(error)

    def _add(self, end: AnyEnd) -> AnyEnd:
        self.ends.append(end)
        return end

    def _free_name(self, stem: str, *taken: str) -> str:
        there = {name for _, name in self.inside(socket.if_nameindex)} | set(taken)
        return next(name for name in (f"{stem}{number}" for number in range(10_000)) if name not in there)
