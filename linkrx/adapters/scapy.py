"""Sockets for scapy. With `conf.L2listen = L2ListenSocket` and `conf.L2socket = L2Socket`, scapy receives and sends through linkrx.

Needs scapy (`pip install scapy`). No other module of linkrx imports this one.
"""

from __future__ import annotations

import errno
import time
from typing import Any, NoReturn

import linkrx
from linkrx.kernel.uapi import ARPHRD_ETHER, ETH_P_ALL
from linkrx.sources.capabilities import AnySource

try:
    import scapy.layers.inet6  # noqa: F401  # registers Ethernet, ARP, IPv4 and IPv6 with scapy
    from scapy.config import conf
    from scapy.data import MTU
    from scapy.error import Scapy_Exception
    from scapy.interfaces import NetworkInterface
    from scapy.packet import Packet
    from scapy.supersocket import SuperSocket
    from scapy.utils import EDecimal
except ModuleNotFoundError as error:
    if error.name != "scapy":
        raise
    raise ModuleNotFoundError(
        "linkrx.adapters.scapy needs scapy, which is not installed: pip install scapy", name="scapy"
    ) from error

# Values of scapy's Packet.direction, the same as in epb_flags of pcapng.
INBOUND, OUTBOUND = 1, 2

VLAN_TAG_BYTES = 4
SEND_AGAIN = 0.0005  # seconds between two attempts to send while the kernel's queue is full
ANY = "any"


class L2Socket(SuperSocket):
    """Sends packets, and receives packets that other hosts send, on an interface or on another source.

    `iface` is an interface as scapy takes it (a name or a NetworkInterface; the default is conf.iface), "any", or a borrowed
    source: a `linkrx.TunTap`, a socket or a descriptor. `type`, `promisc`, `filter` and `nofilter` mean the same as for
    scapy's own sockets. `promisc` is for interfaces only. Every other keyword is an option of `linkrx.open`, so
    `sniff(iface="eth0", receive_buffer=2**28)` works. `rx` is the dispatcher: `rx.stats()`, `rx.choice.explain()`,
    `rx.set_filter("arp")`.

    Raises Scapy_Exception for an invalid filter or option. Raises the LinkrxErrors of `linkrx.open`. For an unknown interface
    that is a ValueError, as with scapy's own sockets.
    """

    desc = "send and receive at layer 2 through linkrx"
    sends = True
    rx: linkrx.Dispatcher

    # sendp and srp1 open a socket for each call. A ring takes several times as long to open, and delays packets.
    _backend = "recvmmsg"

    def __init__(
        self,
        iface: AnySource | NetworkInterface | None = None,
        type: int = ETH_P_ALL,
        promisc: bool | None = None,
        filter: str | None = None,
        nofilter: bool = False,
        monitor: bool | None = None,
        **options: Any,
    ) -> None:
        if monitor:
            raise Scapy_Exception(
                "monitor=True: linkrx does not change the mode of a device. Run `iw dev wlan0 set type monitor` first"
            )
        iface = conf.iface if iface is None else iface
        if isinstance(iface, str | NetworkInterface):
            self.iface = str(iface)
            options = self._of_interface(type, promisc) | options
            source: AnySource = self.iface
        else:
            source = iface
            self.iface = getattr(iface, "name", None) or repr(iface)
            # linkrx refuses options that a borrowed source cannot honour.
            if promisc:
                options["promiscuous"] = True
            if type != ETH_P_ALL:
                options["protocol"] = type
        self.promisc = options.get("promiscuous", False)
        wanted = None if nofilter else _except_filtered(filter)
        self._polled = False
        self._nonblocking = False
        self._seen: tuple[int | None, int | None] = (None, None)
        try:
            self.rx = linkrx.open(source, filter=wanted, **options)
        except linkrx.LinkrxError:
            raise
        except ValueError as error:
            raise Scapy_Exception(str(error)) from error

    def _of_interface(self, protocol: int, promisc: bool | None) -> dict[str, Any]:
        """The default options for an interface given by name."""
        everything = protocol == ETH_P_ALL
        return {
            "backend": self._backend,
            "timestamps": True,
            "outgoing": everything
            and not self.sends,  # bound to one protocol, a socket sees incoming packets only
            "protocol": None if everything else protocol,
            "promiscuous": self.iface != ANY and bool(conf.sniff_promisc if promisc is None else promisc),
        }

    def fileno(self) -> int:
        """The descriptor to poll. The next `recv` does not wait: it returns None if no packet is queued."""
        self._polled = True
        return self.rx.fileno()

    def set_nonblock(self, set: bool = True) -> None:
        """From now on `recv` never waits: it returns None if no packet is queued."""
        self._nonblocking = set

    def recv_raw(self, x: int = MTU) -> tuple[type[Packet] | None, bytes | None, float | None]:
        """The next packet: its class, its bytes with the VLAN tag, and its time in seconds (EDecimal, exact to the nanosecond) or None.

        Waits for a packet, unless `set_nonblock` was called, or `fileno` since the last call. Then it returns
        (None, None, None) if no packet is queued. Cuts the frame to `x` bytes if `x` is less than MTU.

        Raises linkrx.Ended, an EOFError and OSError, when the device is deleted. That ends scapy's loops. A link that goes
        down raises nothing.
        """
        waits = not (self._polled or self._nonblocking)
        self._polled = False
        try:
            packet = self.rx.recv(None if waits else 0)
        except TimeoutError:
            return None, None, None
        frame = packet.tagged()
        tag = VLAN_TAG_BYTES if packet.vlan is not None else 0
        self._seen = packet.wire_length + tag, OUTBOUND if packet.outgoing else INBOUND
        layer = _layer(packet.link_type, packet.protocol, ethernet=packet.local is not None)
        stamp = packet.timestamp_ns
        when: Any = None if stamp is None else EDecimal(f"{stamp // 10**9}.{stamp % 10**9:09}")
        return layer, frame if x >= MTU else frame[:x], when

    def recv(self, x: int = MTU, **kwargs: Any) -> Packet | None:
        """The next packet, with `time`, `wirelen` and `direction`. None if `recv_raw` returns none."""
        packet = super().recv(x, **kwargs)
        if packet is not None:
            packet.wirelen, packet.direction = self._seen
        return packet

    def send(self, x: Packet) -> int:
        """Send one packet. Returns the number of bytes sent. Waits while the kernel's queue is full.

        A frame that the kernel refuses as too short is padded with zeroes to conf.min_pkt_size. Raises the kernel's OSError.
        """
        frame = bytes(x)
        if isinstance(x, Packet):
            x.sent_time = time.time()
        while True:
            try:
                self.rx.send(frame)
            except BlockingIOError:
                time.sleep(SEND_AGAIN)
            except OSError as error:
                if error.errno != errno.EINVAL or len(frame) >= conf.min_pkt_size:
                    raise
                frame = frame.ljust(conf.min_pkt_size, b"\0")
            else:
                return len(frame)

    def close(self) -> None:
        """Close the dispatcher. A borrowed source stays open. Idempotent."""
        self.closed = True
        if hasattr(self, "rx"):
            self.rx.close()


class L2ListenSocket(L2Socket):
    """Receives packets, including those that this host sends. On an interface it reads a ring in shared memory."""

    desc = "receive at layer 2 through linkrx, own transmissions too"
    sends = False
    _backend = "auto"

    def send(self, x: Packet) -> NoReturn:
        """Raises Scapy_Exception."""
        raise Scapy_Exception("an L2ListenSocket cannot send: use L2Socket")


def _except_filtered(filter: str | None) -> str | None:
    """The filter without the packets of conf.except_filter."""
    excepted = conf.except_filter
    if not excepted:
        return filter
    return f"({filter}) and not ({excepted})" if filter else f"not ({excepted})"


def _layer(link_type: int, protocol: int, *, ethernet: bool) -> type[Packet]:
    """scapy's class for a frame: by EtherType, or by ARPHRD_* for Ethernet frames and frames without an EtherType."""
    if ethernet:
        layer = conf.l2types.num2layer.get(link_type or ARPHRD_ETHER, conf.raw_layer)
    elif protocol:
        layer = conf.l3types.num2layer.get(protocol, conf.raw_layer)
    else:
        layer = conf.l2types.num2layer.get(link_type, conf.raw_layer)
    return layer
