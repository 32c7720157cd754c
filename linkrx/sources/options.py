"""The keyword options of `open`, and their checks."""

from __future__ import annotations

import sys
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

VNET_HEADER_MOST = 4096  # longer than any that a kernel writes
PACKET_VNET_SIZES = (10, 12)  # the sizes that packet_setsockopt() accepts for PACKET_VNET_HDR_SZ

# Options for packet sockets only, and options that not every backend honours.
_PACKET_OPTIONS = ("promiscuous", "outgoing", "fanout", "timestamps")
_BACKEND_OPTIONS = ("buffer_sizes", "snaplen", "outgoing", "timestamps", "fanout")


class OpenOptions(TypedDict, total=False):
    """The keyword options of `open` and `choose`, with their types. `help(linkrx.open)` describes them."""

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
    """The options that the caller gave. None and the other defaults request nothing."""

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
        """Raise TypeError or ValueError for values that are invalid for every source."""
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if value is not _DEFAULTS[name] and type(value) not in kinds:
                raise TypeError(f"{name}={value!r}: give {' or '.join(kind.__name__ for kind in kinds)}")
        if self.batch_size is not None and not 1 <= self.batch_size <= BATCH_SIZE_MAX:
            raise ValueError(f"batch_size={self.batch_size}: give 1 to {BATCH_SIZE_MAX} packets")
        if self.receive_buffer is not None and not 1 <= self.receive_buffer < 2**31:
            raise ValueError(f"receive_buffer={self.receive_buffer}: give a size in bytes, below 2 GiB")
        if self.latency is not None and not 0 <= self.latency <= sys.float_info.max:  # also refuses nan
            raise ValueError(f"latency={self.latency}: give a time in seconds, 0 for none")
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
                f"outgoing=True and protocol=0x{self.protocol:04x} exclude each other: the kernel gives outgoing frames only to "
                "sockets that are bound to all protocols"
            )
        if self.snaplen is not None and not ETH_HEADER_BYTES <= self.snaplen <= CAPACITY_MAX:
            raise ValueError(
                f"snaplen={self.snaplen}: give {ETH_HEADER_BYTES} bytes, the length of an Ethernet header, to {CAPACITY_MAX}"
            )
        if self.snaplen is not None and (self.buffer_sizes is not None or self.segment):
            other = "segment=True" if self.segment else f"buffer_sizes={self.buffer_sizes!r}"
            raise ValueError(
                f"snaplen={self.snaplen} and {other} exclude each other: both set how much of a frame is kept"
            )
        if self.filter is not None:
            filters.checked(self.filter)

    @property
    def coalescing(self) -> float:
        """Seconds that the receiver waits for more packets after the first."""
        return self.latency or 0.0

    def layout(self, found: Capabilities, prefix: int) -> Layout:
        """How packets lie in memory, and how much of each is kept."""
        longest = found.largest_frame if self.snaplen is None else min(self.snaplen, found.largest_frame)
        return Layout.of(longest, prefix, self.buffer_sizes)

    def needed(self) -> tuple[str, ...]:
        """The given options that not every backend honours."""
        return tuple(name for name in _BACKEND_OPTIONS if getattr(self, name) != _DEFAULTS[name])

    def check_source(self, capabilities: Capabilities) -> None:
        """Raise UnsupportedOption for an option that no backend can honour on this source, and UnsupportedSource for a socket with
        a ring.
        """
        if capabilities.has_ring:
            raise UnsupportedSource(
                f"the {capabilities.title} has a ring, such as libpcap makes: the kernel puts all packets into the ring, and no "
                "other reader gets them. Give linkrx a socket without a ring, or the name of the interface"
            )
        if capabilities.kind not in ("packet", "packet_cooked"):
            for name in _PACKET_OPTIONS:
                if getattr(self, name) != _DEFAULTS[name]:
                    raise UnsupportedOption(
                        f"{name}={getattr(self, name)!r} needs an AF_PACKET socket; the source is {capabilities.a_title}"
                    )
        if self.fanout is not None and not capabilities.owned:
            raise UnsupportedOption(
                f"fanout={self.fanout!r} on a borrowed socket cannot be undone: a socket leaves its group only when it is "
                "closed. Give the name of the interface"
            )
        if self.protocol is not None and capabilities.kind == "capture_file":
            raise UnsupportedOption(
                f"protocol=0x{self.protocol:04x} is for packet sockets that linkrx opens, but the source is {capabilities.a_title}: "
                f"give filter='ether proto 0x{self.protocol:04x}'"
            )
        if self.protocol is not None and not capabilities.owned:
            raise UnsupportedOption(
                f"protocol=0x{self.protocol:04x} is for packet sockets that linkrx opens, but the source is "
                f"{capabilities.a_title} of yours: give the name of the interface, or bind the socket to the protocol yourself"
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
        """Raise UnsupportedOption if the source has no virtio-net header, which marks super-packets."""
        if self.buffer_sizes is not None:
            raise UnsupportedOption(
                f"segment=True and buffer_sizes={self.buffer_sizes!r} exclude each other: super-packets must be received whole"
            )
        if self.vnet_header is not None and not self.vnet_header:
            raise UnsupportedOption(
                f"segment=True and vnet_header={self.vnet_header!r} on the {found.title} contradict each other: the header "
                "marks super-packets. Leave out vnet_header"
            )
        if self.vnet_header or (
            self.vnet_header is None and (found.vnet_header_size or found.kind == "packet")
        ):
            return
        advice = "pass vnet_header=True if its peer sends one"
        if found.kind in ("tap", "tun"):
            advice = f"open it with linkrx.TunTap({found.interface!r}, {found.kind!r}, vnet_header=True, offload=True)"
        elif found.kind == "capture_file":
            advice = "there, a super-packet is one long packet"
        elif found.kind == "packet_cooked":
            advice = "use a socket of type SOCK_RAW, which can have one"
        raise UnsupportedOption(
            f"segment=True needs a virtio-net header in front of frames, and the {found.title} has none: {advice}"
        )

    def vnet_header_to_set(self, found: Capabilities) -> int:
        """The size in bytes of the virtio-net header to set on a packet socket; 0 changes nothing."""
        if found.kind != "packet" or found.vnet_header_size:
            return 0
        if self.vnet_header is True or (self.vnet_header is None and self.segment):
            return VNET_HEADER_BYTES
        return self.vnet_header if self.vnet_header in PACKET_VNET_SIZES else 0

    def framing(self, capabilities: Capabilities) -> Framing:
        """The headers in front of the data: what probing found, and the options where it found nothing.

        Raises UnsupportedOption if the two contradict each other, or if neither says it.
        """
        ethernet, packet_info = self._ethernet(capabilities), self._packet_info(capabilities)
        per_packet = _per_packet(capabilities, ethernet, packet_info)
        return Framing(
            ethernet=ethernet,
            vnet_header_size=self._vnet_header_size(capabilities),
            packet_info=packet_info,
            vnet_little_endian=capabilities.vnet_little_endian,
            # Ethernet, if the backend does not report the link type of each packet.
            link_type=capabilities.hardware_type
            or (ARPHRD_ETHER if per_packet == PER_PACKET_LINK_TYPE else 0),
            per_packet=per_packet,
        )

    def _ethernet(self, found: Capabilities) -> bool:
        unbound = found.kind == "packet" and found.ifindex is None
        if self.ethernet is not None and (unbound or found.kind == "capture_file"):
            raise UnsupportedOption(
                f"ethernet={self.ethernet} is for sources whose frames all start alike, but each packet of {found.a_title} has its "
                "own link type. Leave out ethernet"
            )
        if found.ethernet is None:
            if self.ethernet is None and found.hardware_type is not None:
                raise UnsupportedOption(
                    f"the {found.title} has frames of hardware type {found.hardware_type} (ARPHRD_*), which linkrx does "
                    "not know: pass ethernet=True or ethernet=False to say how they start"
                )
            # Datagram sockets and pipes do not say. QEMU, passt and VDE send Ethernet on them.
            # A packet socket that is bound to no interface reports the link type of each frame.
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
                    f"linkrx cannot find out whether the {found.title} puts packet information (struct tun_pi) in front of "
                    "frames: that needs CAP_NET_ADMIN in the network namespace of its device. Pass packet_info=False if the "
                    "queue was opened with IFF_NO_PI, else packet_info=True"
                )
            return self.packet_info
        if self.packet_info not in (None, found.packet_info):
            raise UnsupportedOption(
                f"packet_info={self.packet_info} contradicts the source: the {found.title} "
                f"{'sends' if found.packet_info else 'does not send'} struct tun_pi"
            )
        return found.packet_info


def _per_packet(found: Capabilities, ethernet: bool, packet_info: bool) -> int:
    """Framing.per_packet: which of protocol, link type and link address the kernel reports for each packet of a source."""
    if found.kind == "packet_cooked":
        return PER_PACKET_NO_HEADER
    if found.kind == "capture_file" or (found.kind == "packet" and not (ethernet and found.hardware_type)):
        return PER_PACKET_LINK_TYPE
    if found.kind == "tun" and (packet_info or found.hardware_type not in (None, *BARE_IP_TYPES)):
        return PER_PACKET_NO_HEADER
    return 0


_DEFAULTS = {field.name: field.default for field in fields(Options)}

# The types of each option, besides its default.
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
