"""The keyword options of `open`, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypedDict

from linkrx.errors import UnsupportedOption, UnsupportedSource
from linkrx.kernel.uapi import ARPHRD_ETHER, ETH_HEADER_BYTES, ETH_P_ALL, VNET_HEADER_BYTES
from linkrx.memory.framing import BARE_IP_TYPES, PER_PACKET_LINK_TYPE, PER_PACKET_NO_HEADER, Framing
from linkrx.memory.layouts import CAPACITY_MAX, Layout, checked_sizes
from linkrx.sources import filters
from linkrx.sources.capabilities import Capabilities
from linkrx.sources.fanout import Fanout
from linkrx.sources.filters import FilterLike

BATCH_SIZE_MAX = 1024  # _core/recvmmsg.h LRX_MESSAGES_MAX, the kernel's UIO_MAXIOV

ETHERTYPE_MOST = 0xFFFF

VNET_HEADER_MOST = 4096  # far more than any that a kernel writes
PACKET_VNET_SIZES = (10, 12)  # what packet_setsockopt() takes for PACKET_VNET_HDR_SZ

# Options that only a packet socket can honour, and those that need a backend with the ability of that name.
_PACKET_OPTIONS = ("promiscuous", "outgoing", "fanout", "timestamps")
_BACKEND_OPTIONS = ("buffer_sizes", "snaplen", "outgoing", "timestamps", "fanout")


class OpenOptions(TypedDict, total=False):
    """The options that `open` and `choose` take as keywords, with their types. `help(linkrx.open)` says what each does."""

    batch_size: int | None
    ethernet: bool | None
    vnet_header: bool | int | None
    packet_info: bool | None
    buffer_sizes: Sequence[int] | None
    snaplen: int | None
    segment: bool
    promiscuous: bool
    outgoing: bool
    timestamps: bool
    fanout: int | str | tuple[int | str, str] | None
    receive_buffer: int | None
    latency: float | None
    protocol: int | None
    filter: FilterLike | None


@dataclass(frozen=True)
class Options:
    """What the caller asked for. `None` and the defaults ask for nothing."""

    batch_size: int | None = None
    ethernet: bool | None = None
    vnet_header: bool | int | None = None
    packet_info: bool | None = None
    buffer_sizes: Sequence[int] | None = None
    snaplen: int | None = None
    segment: bool = False
    promiscuous: bool = False
    outgoing: bool = False
    timestamps: bool = False
    fanout: int | str | tuple[int | str, str] | None = None
    receive_buffer: int | None = None
    latency: float | None = None
    protocol: int | None = None
    filter: FilterLike | None = None

    def __post_init__(self) -> None:
        """Raises TypeError and ValueError for values that no source could take."""
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if value is not _DEFAULTS[name] and type(value) not in kinds:
                raise TypeError(f"{name}={value!r}: give {' or '.join(kind.__name__ for kind in kinds)}")
        if self.batch_size is not None and not 1 <= self.batch_size <= BATCH_SIZE_MAX:
            raise ValueError(f"batch_size={self.batch_size}: give 1 to {BATCH_SIZE_MAX} packets")
        if self.receive_buffer is not None and not 1 <= self.receive_buffer < 2**31:
            raise ValueError(f"receive_buffer={self.receive_buffer}: give a size in bytes, below 2 GiB")
        if self.latency is not None and not 0 < self.latency < math.inf:  # nan is neither
            raise ValueError(f"latency={self.latency}: give a time in seconds above 0")
        wanted = self.vnet_header
        if type(wanted) is int and wanted and not VNET_HEADER_BYTES <= wanted <= VNET_HEADER_MOST:
            raise ValueError(
                f"vnet_header={wanted}: a virtio-net header has {VNET_HEADER_BYTES} to {VNET_HEADER_MOST} bytes; "
                "0 is for none"
            )
        if self.buffer_sizes is not None:
            checked_sizes(self.buffer_sizes)
        if self.fanout is not None:
            Fanout.of(self.fanout)
        if self.protocol is not None and not 0 < self.protocol <= ETHERTYPE_MOST:
            raise ValueError(f"protocol={self.protocol}: give an EtherType, 1 to 0x{ETHERTYPE_MOST:04x}")
        if self.outgoing and self.protocol not in (None, ETH_P_ALL):
            raise UnsupportedOption(
                f"outgoing=True and protocol=0x{self.protocol:04x} exclude each other: the kernel shows frames of this host to "
                "sockets that are bound to all protocols only"
            )
        if self.snaplen is not None and not ETH_HEADER_BYTES <= self.snaplen <= CAPACITY_MAX:
            raise ValueError(
                f"snaplen={self.snaplen}: give {ETH_HEADER_BYTES} bytes, as an Ethernet header has, to {CAPACITY_MAX}"
            )
        if self.snaplen is not None and (self.buffer_sizes is not None or self.segment):
            other = "segment=True" if self.segment else f"buffer_sizes={self.buffer_sizes!r}"
            raise ValueError(
                f"snaplen={self.snaplen} and {other} exclude each other: both say what is kept of a frame"
            )
        if self.filter is not None:
            filters.checked(self.filter)

    @property
    def coalescing(self) -> float:
        """Seconds that the receiver waits for more, once something is there."""
        return self.latency or 0.0

    def layout(self, found: Capabilities, prefix: int) -> Layout:
        """How a packet is laid into memory: whole, or as much of it as is to be kept."""
        longest = found.largest_frame if self.snaplen is None else min(self.snaplen, found.largest_frame)
        return Layout.of(longest, prefix, self.buffer_sizes)

    def needed(self) -> tuple[str, ...]:
        """The options set that not every backend honours."""
        return tuple(name for name in _BACKEND_OPTIONS if getattr(self, name) != _DEFAULTS[name])

    def check_source(self, capabilities: Capabilities) -> None:
        """Raise UnsupportedOption for what this source cannot honour whatever the backend, UnsupportedSource for one that is in
        use.
        """
        if capabilities.has_ring:
            raise UnsupportedSource(
                f"the {capabilities.title} has a ring, as libpcap puts one on its sockets: the kernel puts packets there, and "
                "no other reader sees one. Give linkrx a socket without one, or the name of the interface"
            )
        if capabilities.kind not in ("packet", "packet_cooked"):
            for name in _PACKET_OPTIONS:
                if getattr(self, name) != _DEFAULTS[name]:
                    raise UnsupportedOption(
                        f"{name}={getattr(self, name)!r} needs an AF_PACKET socket; the source is {capabilities.a_title}"
                    )
        if self.fanout is not None and not capabilities.owned:
            raise UnsupportedOption(
                f"fanout={self.fanout!r} on a borrowed socket could not be undone: a group is left only by closing the "
                "socket. Give the name of the interface"
            )
        if self.protocol is not None and not capabilities.owned:
            raise UnsupportedOption(
                f"protocol=0x{self.protocol:04x} binds a packet socket that linkrx opens, and the source is "
                f"{capabilities.a_title} of yours: give the name of the interface, or bind it to the protocol yourself"
            )
        if self.segment:
            self._check_segment(capabilities)
        if self.receive_buffer is not None and not capabilities.socket:
            advice = (
                f": the queue of {capabilities.interface} is as long as its txqueuelen; "
                f"`ip link set {capabilities.interface} txqueuelen 10000` makes it longer"
                if capabilities.interface
                else ""
            )
            raise UnsupportedOption(
                f"receive_buffer={self.receive_buffer} needs a socket; the source is {capabilities.a_title}{advice}"
            )

    def _check_segment(self, found: Capabilities) -> None:
        """Super-packets are told from others by the virtio-net header."""
        if self.buffer_sizes is not None:
            raise UnsupportedOption(
                f"segment=True and buffer_sizes={self.buffer_sizes!r} exclude each other: frames are made anew of whole "
                "super-packets"
            )
        if self.vnet_header is not None and not self.vnet_header:
            raise UnsupportedOption(
                f"segment=True and vnet_header={self.vnet_header!r} on the {found.title} contradict each other: the header "
                "tells super-packets from others. Leave out vnet_header"
            )
        if self.vnet_header or (
            self.vnet_header is None and (found.vnet_header_size or found.kind == "packet")
        ):
            return
        advice = "pass vnet_header=True if its peer sends one"
        if found.kind in ("tap", "tun"):
            advice = f"open it with linkrx.TunTap({found.interface!r}, {found.kind!r}, vnet_header=True, offload=True)"
        elif found.kind == "packet_cooked":
            advice = "a socket of type SOCK_RAW can have one"
        raise UnsupportedOption(
            f"segment=True needs a virtio-net header in front of frames, and the {found.title} has none: {advice}"
        )

    def vnet_header_to_set(self, found: Capabilities) -> int:
        """The bytes of virtio-net header that a packet socket is to put in front of frames from now on; 0: as it is."""
        if found.kind != "packet" or found.vnet_header_size:
            return 0
        if self.vnet_header is True or (self.vnet_header is None and self.segment):
            return VNET_HEADER_BYTES
        return self.vnet_header if self.vnet_header in PACKET_VNET_SIZES else 0

    def framing(self, capabilities: Capabilities) -> Framing:
        """What stands in front of the data: what the caller says where the probe does not know, never against it."""
        ethernet, packet_info = self._ethernet(capabilities), self._packet_info(capabilities)
        per_packet = _per_packet(capabilities, ethernet, packet_info)
        return Framing(
            ethernet=ethernet,
            vnet_header_size=self._vnet_header_size(capabilities),
            packet_info=packet_info,
            vnet_little_endian=capabilities.vnet_little_endian,
            # A backend that does not tell the link type is taken to have Ethernet.
            link_type=capabilities.hardware_type
            or (ARPHRD_ETHER if per_packet == PER_PACKET_LINK_TYPE else 0),
            per_packet=per_packet,
        )

    def _ethernet(self, found: Capabilities) -> bool:
        if found.ethernet is None:
            if self.ethernet is None and found.hardware_type is not None:
                raise UnsupportedOption(
                    f"the {found.title} has frames of hardware type {found.hardware_type} (ARPHRD_*), which linkrx does "
                    "not know: pass ethernet=True or ethernet=False to say how they start"
                )
            # A datagram or a pipe says nothing; QEMU, passt and VDE carry Ethernet over theirs.
            # A packet socket that is bound to no interface tells the link type of each frame.
            return (
                self.ethernet is True
                if found.kind in ("packet", "capture_file")
                else self.ethernet is not False
            )
        if self.ethernet not in (None, found.ethernet):
            raise UnsupportedOption(
                f"ethernet={self.ethernet} contradicts the source: frames of {found.a_title} "
                f"{'start' if found.ethernet else 'do not start'} with an Ethernet header"
            )
        return found.ethernet

    def _vnet_header_size(self, found: Capabilities) -> int:
        wanted, size = self.vnet_header, found.vnet_header_size
        if wanted is None:
            return size
        if found.kind == "capture_file" and wanted:
            raise UnsupportedOption(
                f"vnet_header={wanted} contradicts the source: no link type of a {found.title} has a virtio-net header"
            )
        if found.kind in ("tap", "tun", "packet", "packet_cooked"):
            if bool(wanted) != bool(size) or (wanted is not True and wanted is not False and wanted != size):
                raise UnsupportedOption(
                    f"vnet_header={wanted} contradicts the source: the {found.title} puts "
                    f"{f'a virtio-net header of {size} bytes' if size else 'no virtio-net header'} in front of frames"
                )
            return size
        return VNET_HEADER_BYTES if wanted is True else int(wanted)

    def _packet_info(self, found: Capabilities) -> bool:
        if found.packet_info is None:
            if self.packet_info is None:
                raise UnsupportedOption(
                    f"whether the {found.title} puts packet information (struct tun_pi) in front of frames cannot be "
                    "told: the kernel does not let this process ask for its device (CAP_NET_ADMIN in the device's "
                    "network namespace would do). Pass "
                    "packet_info=False if the queue was opened with IFF_NO_PI, else packet_info=True"
                )
            return self.packet_info
        if self.packet_info not in (None, found.packet_info):
            raise UnsupportedOption(
                f"packet_info={self.packet_info} contradicts the source: the {found.title} "
                f"{'sends' if found.packet_info else 'does not send'} struct tun_pi"
            )
        return found.packet_info


def _per_packet(found: Capabilities, ethernet: bool, packet_info: bool) -> int:
    """Whether packets of a source differ in what the kernel tells about each: Framing.per_packet."""
    if found.kind == "packet_cooked":
        return PER_PACKET_NO_HEADER
    if found.kind == "capture_file" or (found.kind == "packet" and not (ethernet and found.hardware_type)):
        return PER_PACKET_LINK_TYPE
    if found.kind == "tun" and (packet_info or found.hardware_type not in (None, *BARE_IP_TYPES)):
        return PER_PACKET_NO_HEADER
    return 0


_DEFAULTS = {field.name: field.default for field in fields(Options)}

# What each option may be, besides its default.
_KINDS: dict[str, tuple[type, ...]] = {
    "batch_size": (int,),
    "snaplen": (int,),
    "ethernet": (bool,),
    "vnet_header": (bool, int),
    "packet_info": (bool,),
    "segment": (bool,),
    "promiscuous": (bool,),
    "outgoing": (bool,),
    "timestamps": (bool,),
    "receive_buffer": (int,),
    "latency": (float, int),
    "protocol": (int,),
}
