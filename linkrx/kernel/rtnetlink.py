"""The attributes of network devices, from rtnetlink(7).

pyroute2 forks to enter another network namespace. Here a thread enters the namespace, makes a socket there, and ends. The socket
stays in that namespace.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from linkrx.kernel.namespace import inside
from linkrx.kernel.uapi import (
    BR_STATE_FORWARDING,
    IFF_UP,
    IFLA_ADDRESS,
    IFLA_ALT_IFNAME,
    IFLA_BRPORT_STATE,
    IFLA_IFNAME,
    IFLA_INFO_DATA,
    IFLA_INFO_KIND,
    IFLA_INFO_SLAVE_DATA,
    IFLA_LINK,
    IFLA_LINK_NETNSID,
    IFLA_LINKINFO,
    IFLA_MTU,
    IFLA_OPERSTATE,
    IFLA_PROP_LIST,
    IFLA_STATS64,
    IFLA_TARGET_NETNSID,
    IFLA_TUN_NUM_QUEUES,
    IFLA_TUN_PI,
    IFLA_TXQLEN,
    IFNAMSIZ,
    NLA_TYPE_MASK,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    RTM_GETLINK,
    RTM_NEWLINK,
    TX_DROPPED,
)

# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h
# IFLA_GSO_MAX_SIZE, IFLA_GRO_MAX_SIZE, and those for IPv4, which are separate since Linux 6.3.
SUPER_PACKETS = (41, 58, 63, 64)

_MESSAGE = struct.Struct("=IHHII")  # struct nlmsghdr
_INTERFACE = struct.Struct("=BxHiII")  # struct ifinfomsg
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
# linux/if.h: IF_OPER_*, as `ip link` names them.
_STATES = dict(enumerate(("unknown", "notpresent", "down", "lowerlayerdown", "testing", "dormant", "up")))
_ANSWER_MOST = 65_536  # larger than any message of the kernel
_TIMEOUT = 2.0  # the kernel answers at once; this limits the wait for a lost answer


@dataclass(frozen=True)
class Link:
    """A network device. `packet_info` and `queues`, the number of open ones, are known of TUN and TAP only.

    `super_packet` is the largest size in bytes of a packet before it is split, or after merging. `queue_length` is the
    txqueuelen. `peer` is the index of the other end, or of the device below, and `peer_namespace` the number of its namespace if
    that is another one. `up` is IFF_UP, and `state` the operational state (RFC 2863). `forwards` is whether the bridge of this
    port forwards its frames.
    """

    index: int
    name: str
    hardware_type: int
    mtu: int | None
    address: bytes
    kind: str | None
    packet_info: bool | None
    queues: int
    tx_dropped: int | None
    forwards: bool
    super_packet: int
    queue_length: int | None
    up: bool
    state: str
    alternative_names: tuple[str, ...]
    peer: int | None
    peer_namespace: int | None


class RouteSocket:
    """A netlink socket in one network namespace."""

    def __init__(self, namespace: int | None = None) -> None:
        """In this thread's namespace, or in the one of the descriptor `namespace`, which needs CAP_SYS_ADMIN."""
        self._sequence = 0
        self._socket = _socket_here() if namespace is None else inside(namespace, _socket_here)
        try:
            self._socket.settimeout(_TIMEOUT)
        except BaseException:
            self._socket.close()
            raise

    def links(self) -> list[Link]:
        """All devices of the namespace."""
        while True:
            found, whole = [], True
            self._ask(_INTERFACE.pack(socket.AF_UNSPEC, 0, 0, 0, 0), NLM_F_DUMP)
            for kind, flags, body in self._answers():
                whole = whole and not flags & NLM_F_DUMP_INTR
                if kind == NLMSG_ERROR:
                    code = -struct.unpack_from("=i", body)[0]
                    raise OSError(code, f"listing interfaces, RTM_GETLINK: {os.strerror(code)}")
                if kind == NLMSG_DONE:
                    break
                found.append(_parse(body))
            if whole:  # or a device has come or gone meanwhile
                return found

    def _ask(self, body: bytes, flags: int = 0) -> None:
        self._sequence += 1
        head = _MESSAGE.pack(_MESSAGE.size + len(body), RTM_GETLINK, NLM_F_REQUEST | flags, self._sequence, 0)
        self._socket.send(head + body)

    def _answers(self) -> Iterator[tuple[int, int, bytes]]:
        """Type, flags and body of each message in answer to the latest request. The caller recognises the last one."""
        while True:
            answer = self._socket.recv(_ANSWER_MOST)
            offset = 0
            while offset + _MESSAGE.size <= len(answer):
                length, kind, flags, sequence, _ = _MESSAGE.unpack_from(answer, offset)
                if length < _MESSAGE.size:
                    break
                if sequence == self._sequence:  # a late answer to a request that timed out
                    yield kind, flags, answer[offset + _MESSAGE.size : offset + length]
                offset += (length + 3) & ~3

    def link(self, *, name: str | None = None, index: int = 0, namespace: int | None = None) -> Link | None:
        """The device of that name or index. None if there is none, or the kernel does not answer for it.

        `namespace` is the number of another namespace in this one, as in `Link.peer_namespace`.
        """
        body = _INTERFACE.pack(socket.AF_UNSPEC, 0, index, 0, 0)
        if name is not None:
            value = os.fsencode(name) + b"\0"
            kind = IFLA_IFNAME if len(value) <= IFNAMSIZ else IFLA_ALT_IFNAME
            body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value
            body += bytes(-len(body) % 4)
        if namespace is not None:
            body += _ATTRIBUTE.pack(_ATTRIBUTE.size + 4, IFLA_TARGET_NETNSID) + struct.pack("=i", namespace)
        self._ask(body)
        for kind, _, answer in self._answers():
            if kind == NLMSG_ERROR:
                return None
            if kind == RTM_NEWLINK:
                return _parse(answer)
        return None

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()


def _socket_here() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            return
        yield kind & NLA_TYPE_MASK, data[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3


def _parse(message: bytes) -> Link:
    _, hardware_type, index, flags, _ = _INTERFACE.unpack_from(message)
    found = dict(_attributes(message[_INTERFACE.size :]))
    info = dict(_attributes(found.get(IFLA_LINKINFO, b"")))
    kind = info[IFLA_INFO_KIND].rstrip(b"\0").decode() if IFLA_INFO_KIND in info else None
    data = dict(_attributes(info.get(IFLA_INFO_DATA, b""))) if kind == "tun" else {}
    # The kernel reports !(flags & IFF_NO_PI): 1 means that packet information is on.
    packet_info = bool(data[IFLA_TUN_PI][0]) if IFLA_TUN_PI in data else None
    stats = found.get(IFLA_STATS64, b"")
    port = dict(_attributes(info.get(IFLA_INFO_SLAVE_DATA, b"")))
    return Link(
        index=index,
        name=os.fsdecode(found.get(IFLA_IFNAME, b"").rstrip(b"\0")),
        hardware_type=hardware_type,
        mtu=struct.unpack("=I", found[IFLA_MTU])[0] if IFLA_MTU in found else None,
        address=found.get(IFLA_ADDRESS, b""),
        kind=kind,
        packet_info=packet_info,
        # Reported of multi-queue devices only. Others have one.
        queues=struct.unpack("=I", data[IFLA_TUN_NUM_QUEUES])[0] if IFLA_TUN_NUM_QUEUES in data else 1,
        tx_dropped=(
            struct.unpack_from("=Q", stats, 8 * TX_DROPPED)[0] if len(stats) >= 8 * (TX_DROPPED + 1) else None
        ),
        forwards=port.get(IFLA_BRPORT_STATE, b"\0")[0] == BR_STATE_FORWARDING,
        super_packet=max(
            struct.unpack("=I", found[kind])[0] if kind in found else 0 for kind in SUPER_PACKETS
        ),
        queue_length=struct.unpack("=I", found[IFLA_TXQLEN])[0] if IFLA_TXQLEN in found else None,
        peer=struct.unpack("=I", found[IFLA_LINK])[0] if IFLA_LINK in found else None,
        peer_namespace=(
            struct.unpack("=i", found[IFLA_LINK_NETNSID])[0] if IFLA_LINK_NETNSID in found else None
        ),
        up=bool(flags & IFF_UP),
        state=_STATES.get(found.get(IFLA_OPERSTATE, b"\0")[0], "unknown"),
        alternative_names=tuple(
            os.fsdecode(value.rstrip(b"\0"))
            for kind, value in _attributes(found.get(IFLA_PROP_LIST, b""))
            if kind == IFLA_ALT_IFNAME
        ),
    )


def same_namespace(namespace: int) -> bool:
    """Whether a descriptor is of this thread's network namespace."""
    here = Path("/proc/thread-self/ns/net").stat()
    there = os.fstat(namespace)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
