"""What stands in front of a packet's data on one source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from linkrx.packet import ETH_HEADER_BYTES

TUN_PI_BYTES = 4  # linux/if_tun.h struct tun_pi
VNET_HEADER_BYTES = 10  # linux/virtio_net.h struct virtio_net_hdr: the least and the usual size


@dataclass(frozen=True)
class Framing:
    """The order on the wire from kernel to reader: packet information, virtio-net header, frame."""

    ethernet: bool
    vnet_header_size: int = 0
    packet_info: bool = False
    vnet_little_endian: bool = True

    @cached_property
    def packet_info_size(self) -> int:
        """4 or 0."""
        return TUN_PI_BYTES if self.packet_info else 0

    @cached_property
    def prefix(self) -> int:
        """Bytes in front of the frame."""
        return self.packet_info_size + self.vnet_header_size

    @cached_property
    def link_header(self) -> int:
        """Bytes of the frame that are its link header."""
        return ETH_HEADER_BYTES if self.ethernet else 0

    @cached_property
    def vnet_format(self) -> str:
        """The ten bytes of struct virtio_net_hdr, for the struct module."""
        return "<BBHHHH" if self.vnet_little_endian else ">BBHHHH"
