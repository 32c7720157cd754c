"""What stands in front of a packet's data on one source."""

from __future__ import annotations

from dataclasses import dataclass, field

from linkrx.kernel.uapi import ETH_HEADER_BYTES, TUN_PI_BYTES


@dataclass(frozen=True)
class Framing:
    """The order on the wire from kernel to reader: packet information, virtio-net header, frame."""

    ethernet: bool
    vnet_header_size: int = 0
    packet_info: bool = False
    vnet_little_endian: bool = True

    # Bytes: of packet information, of all in front of the frame, and of the frame's link header.
    packet_info_size: int = field(init=False)
    prefix: int = field(init=False)
    link_header: int = field(init=False)
    # The ten bytes of struct virtio_net_hdr, for the struct module.
    vnet_format: str = field(init=False)

    def __post_init__(self) -> None:
        # Not properties: they are asked for with every packet.
        packet_info_size = TUN_PI_BYTES if self.packet_info else 0
        object.__setattr__(self, "packet_info_size", packet_info_size)
        object.__setattr__(self, "prefix", packet_info_size + self.vnet_header_size)
        object.__setattr__(self, "link_header", ETH_HEADER_BYTES if self.ethernet else 0)
        object.__setattr__(self, "vnet_format", "<BBHHHH" if self.vnet_little_endian else ">BBHHHH")
