"""The headers in front of a packet's data, for one source."""

from __future__ import annotations

from dataclasses import dataclass, field

from linkrx.kernel.uapi import (
    ARPHRD_ETHER,
    ARPHRD_LOOPBACK,
    ARPHRD_NONE,
    ARPHRD_RAWIP,
    ARPHRD_SIT,
    ARPHRD_TUNNEL,
    ARPHRD_TUNNEL6,
    ETH_HEADER_BYTES,
    TUN_PI_BYTES,
)

# Link types whose frames start with an Ethernet header, and those whose frames start with the IP header.
ETHERNET_TYPES = frozenset({ARPHRD_ETHER, ARPHRD_LOOPBACK})
BARE_IP_TYPES = frozenset({ARPHRD_RAWIP, ARPHRD_TUNNEL, ARPHRD_TUNNEL6, ARPHRD_SIT, ARPHRD_NONE})

# _core/report.h LRX_PER_PACKET_*: protocol, link type and link address differ from packet to packet, and the kernel reports
# them. The frames have no link header, or the one of their link type.
PER_PACKET_NO_HEADER, PER_PACKET_LINK_TYPE = 1, 2
NO_LINK_HEADER = 255  # _core/report.h LRX_NO_LINK_HEADER

# _core/report.h: a file's link type, as packets of the file have it.
OF_FILE, FILE_SWAPPED, FILE_LINK_TYPE = 0x10000, 0x20000, 0xFFFF


# The headers of a TUN or TAP queue: tun_put_user() in drivers/net/tun.c. One read(2) gives, in this order:
#
#   packet information   struct tun_pi, 4 bytes: flags, and the EtherType in network byte order. Missing with IFF_NO_PI.
#   virtio-net header    with IFF_VNET_HDR, TUNGETVNETHDRSZ bytes. The first 10 are struct virtio_net_hdr; its numbers have the byte
#                        order of the host, unless TUNSETVNETLE or TUNSETVNETBE chose one.
#   frame                with its Ethernet header on TAP; an IP packet on TUN.
#
# If the buffer is too short, the kernel cuts the frame. It says so only in the packet information, with TUN_PKT_STRIP. Without it
# linkrx reads into one byte more than it keeps: a packet that fills that byte was cut.
#
# TUNGETIFF reports packet information only with a clear bit, because IFF_NO_PI and IFF_NOFILTER are the same bit: a set one may
# mean either. Then linkrx reads rtnetlink's IFLA_TUN_PI, whose meaning is reversed. Without the privilege for that, the caller
# must give packet_info=.
#
# A packet socket with PACKET_VNET_HDR puts only the virtio-net header in front.
@dataclass(frozen=True)
class Framing:
    """The headers that the kernel writes in front of a frame: packet information, then virtio-net header.

    `link_type` is the ARPHRD_* number of packets for which the kernel reports none; 0 means the one that `ethernet` implies.
    `per_packet` is one of PER_PACKET_*, or 0 where all packets have the same framing. With PER_PACKET_LINK_TYPE `ethernet`
    applies to the link types that linkrx does not know.
    """

    ethernet: bool
    vnet_header_size: int = 0
    packet_info: bool = False
    vnet_little_endian: bool = True
    link_type: int = 0
    per_packet: int = 0

    # Sizes in bytes: the packet information, everything in front of the frame, the frame's link header.
    packet_info_size: int = field(init=False)
    prefix: int = field(init=False)
    link_header: int = field(init=False)
    # The ten bytes of struct virtio_net_hdr, for the struct module.
    vnet_format: str = field(init=False)

    def __post_init__(self) -> None:
        # Not properties, because they are read for every packet.
        packet_info_size = TUN_PI_BYTES if self.packet_info else 0
        object.__setattr__(self, "packet_info_size", packet_info_size)
        object.__setattr__(self, "prefix", packet_info_size + self.vnet_header_size)
        object.__setattr__(self, "link_header", ETH_HEADER_BYTES if self.ethernet else 0)
        if not self.link_type:
            object.__setattr__(self, "link_type", ARPHRD_ETHER if self.ethernet else ARPHRD_NONE)
        object.__setattr__(self, "vnet_format", "<BBHHHH" if self.vnet_little_endian else ">BBHHHH")

    def link_header_of(self, link_type: int) -> int:
        """The size in bytes of the link header of a packet of this link type. 0: the backend does not report the link type."""
        link_type = link_type or self.link_type
        if not self.per_packet:
            return self.link_header
        if self.per_packet == PER_PACKET_NO_HEADER or link_type in BARE_IP_TYPES:
            return 0
        return ETH_HEADER_BYTES if link_type in ETHERNET_TYPES else self.link_header
