"""Sockets for scapy: `conf.L2listen = L2ListenSocket` and `conf.L2socket = L2Socket` have it receive and send through linkrx.

Needs scapy (`pip install scapy`). Nothing else of linkrx imports this.
"""

from __future__ import annotations

import errno
import time
from typing import Any, NoReturn

import linkrx
from linkrx.kernel.uapi import ARPHRD_ETHER, ETH_P_ALL
from linkrx.sources.capabilities import AnySource

try:
    import scapy.layers.inet6  # noqa: F401  # it and what it imports teach scapy Ethernet, ARP, IPv4 and IPv6
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

# scapy's Packet.direction, as pcapng has it in epb_flags.
INBOUND, OUTBOUND = 1, 2

VLAN_TAG_BYTES = 4
SEND_AGAIN = 0.0005  # seconds until the kernel is asked again whether its queue has room
ANY = "any"


class L2Socket(SuperSocket):
    """Sends, and receives what others send, on an interface or another source of linkrx's.

    `iface`: what scapy takes, a name or a NetworkInterface, by default conf.iface; or "any"; or a source that is borrowed: a
    `linkrx.TunTap`, a socket, a descriptor. `type`, `promisc`, `filter` and `nofilter` are as of scapy's own sockets; promisc
    is for interfaces only. Every other keyword is an option of `linkrx.open`, so `sniff(iface="eth0", receive_buffer=2**28)`
    works. `rx` is the dispatcher: `rx.stats()`, `rx.choice.explain()`, `rx.set_filter("arp")`.

    Raises Scapy_Exception for a filter that is wrong, and what `linkrx.open` raises: a ValueError for an interface that is not
    there, as scapy's own sockets do.
    """

    desc = "send and receive at layer 2 through linkrx"
    sends = True
    rx: linkrx.Dispatcher

    # sendp and srp1 open a socket for each call. A ring takes several times as long to open, and holds packets back.
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
                "monitor=True: linkrx does not change the mode of a device. Type `iw dev wlan0 set type monitor` before"
            )
        iface = conf.iface if iface is None else iface
        if isinstance(iface, str | NetworkInterface):
            self.iface = str(iface)
            options = self._of_interface(type, promisc) | options
            source: AnySource = self.iface
        else:
            source = iface
            self.iface = getattr(iface, "name", None) or repr(iface)
            # What a source of the caller's own cannot have, linkrx refuses.
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
        """The options for an interface by name, unless the caller says otherwise."""
        everything = protocol == ETH_P_ALL
        return {
            "backend": self._backend,
            "timestamps": True,
            "outgoing": everything and not self.sends,  # of one protocol the kernel shows only what comes in
            "protocol": None if everything else protocol,
            "promiscuous": self.iface != ANY and bool(conf.sniff_promisc if promisc is None else promisc),
        }

    def fileno(self) -> int:
        """What to poll. Whoever has polled does not want to wait: the next `recv` returns None where nothing is there."""
        self._polled = True
        return self.rx.fileno()

    def set_nonblock(self, set: bool = True) -> None:
        """From now on `recv` never waits: it returns None where nothing is there."""
        self._nonblocking = set

    def recv_raw(self, x: int = MTU) -> tuple[type[Packet] | None, bytes | None, float | None]:
        """The class of the next packet, its bytes with the VLAN tag, and its time, exact to the nanosecond (EDecimal) or None.

        Waits for it, unless the descriptor was polled since the last call, or `set_nonblock`; (None, None, None) where nothing
        is there. Cuts what is longer than `x` bytes, if less than MTU is asked for.

        Raises linkrx.Ended, an EOFError and OSError, when the device is gone: that ends scapy's loops. A link that goes
        down is no end.
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
        """The next packet, with `time`, `wirelen` and `direction`; None where `recv_raw` has nothing."""
        packet = super().recv(x, **kwargs)
        if packet is not None:
            packet.wirelen, packet.direction = self._seen
        return packet

    def send(self, x: Packet) -> int:
        """Send one packet, and wait where the kernel's queue is full. Returns how many bytes it has.

        A frame that the kernel finds too short is sent with zeroes behind it. Raises OSError as the kernel has it.
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
        """Release what linkrx opened; a source that was borrowed stays open. Idempotent."""
        self.closed = True
        if hasattr(self, "rx"):
            self.rx.close()


class L2ListenSocket(L2Socket):
    """Receives, what this host sends included. Reads a ring in shared memory where the source is an interface."""

    desc = "receive at layer 2 through linkrx, own transmissions too"
    sends = False
    _backend = "auto"

    def send(self, x: Packet) -> NoReturn:
        """Raises Scapy_Exception."""
        raise Scapy_Exception("L2ListenSocket cannot send: L2Socket can")


def _except_filtered(filter: str | None) -> str | None:
    """The filter, and not what conf.except_filter keeps out of every one."""
    kept_out = conf.except_filter
    if not kept_out:
        return filter
    return f"({filter}) and not ({kept_out})" if filter else f"not ({kept_out})"


def _layer(link_type: int, protocol: int, *, ethernet: bool) -> type[Packet]:
    """What scapy dissects a frame with: of Ethernet and of what has no EtherType by its link type (ARPHRD_*)."""
    if ethernet:
        layer = conf.l2types.num2layer.get(link_type or ARPHRD_ETHER, conf.raw_layer)
    elif protocol:
        layer = conf.l3types.num2layer.get(protocol, conf.raw_layer)
    else:
        layer = conf.l2types.num2layer.get(link_type, conf.raw_layer)
    return layer
