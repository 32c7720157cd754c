"""Probing: the capabilities of every kind of source, refused sources, and options that contradict the probe."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import linkrx
from linkrx.kernel import libc, uapi
from linkrx.kernel.uapi import IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_TUN, IFF_VNET_HDR
from linkrx.sources.capabilities import probe

devices = pytest.mark.usefixtures("devices")

# linux/if_tun.h, asm-generic/socket.h, linux/if_ether.h
TUNATTACHFILTER = 0x401054D5
SOCK_STREAM_KINDS = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
ETH_P_ALL = 0x0003
ARPHRD_ETHER, ARPHRD_LOOPBACK, ARPHRD_NONE = 1, 772, 0xFFFE

_numbers = count()


def fresh(prefix: str = "lrxb") -> str:
    """A new interface name."""
    return f"{prefix}{next(_numbers)}"


@contextmanager
def queue_by_hand(name: str, flags: int, *, header: int | None = None, opened: int = 0) -> Iterator[int]:
    """A TAP or TUN queue opened without linkrx. `opened` are flags of open(2)."""
    fd = os.open("/dev/net/tun", os.O_RDWR | opened)
    try:
        fcntl.ioctl(fd, uapi.TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        if header is not None:
            fcntl.ioctl(fd, uapi.TUNSETVNETHDRSZ, struct.pack("i", header))
        yield fd
    finally:
        os.close(fd)


def attach_filter(queue: int) -> None:
    """Attach a socket filter that lets everything pass."""
    accept_all = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0xFFFFFFFF))
    program = struct.pack("HP", 1, ctypes.addressof(accept_all))  # struct sock_fprog
    fcntl.ioctl(queue, TUNATTACHFILTER, program)


def set_link(name: str, **settings: Any) -> None:
    """Configure a device of this namespace."""
    from pyroute2 import IPRoute

    with IPRoute() as route:
        route.link("set", index=socket.if_nametoindex(name), **settings)


@contextmanager
def veth() -> Iterator[str]:
    """One end of a veth pair that is up."""
    from pyroute2 import IPRoute

    near, far = fresh("lrxv"), fresh("lrxv")
    with IPRoute() as route:
        route.link("add", ifname=near, kind="veth", peer=far)
    try:
        set_link(near, state="up", mtu=1400)
        set_link(far, state="up")
        yield near
    finally:
        with IPRoute() as route:
            route.link("del", index=socket.if_nametoindex(near))


@contextmanager
def other_network() -> Iterator[int]:
    """A descriptor of a new network namespace, which exists only as long as the descriptor."""
    made: list[int] = []

    def enter() -> None:
        libc.unshare(uapi.CLONE_NEWNET)
        made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    try:
        yield made[0]
    finally:
        os.close(made[0])


@contextmanager
def packet_socket(kind: socket.SocketKind, interface: str | None = None) -> Iterator[socket.socket]:
    """An AF_PACKET socket, bound or not."""
    with socket.socket(socket.AF_PACKET, kind, 0) as opened:
        if interface is not None:
            opened.bind((interface, ETH_P_ALL))
        yield opened


@contextmanager
def pipe(flags: int = 0) -> Iterator[tuple[int, int]]:
    """The reading and the writing end of a pipe."""
    reader, writer = os.pipe2(flags)
    with ExitStack() as stack:
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        yield reader, writer


# TAP and TUN queues.


@devices
@pytest.mark.parametrize("mode", ["tap", "tun"])
@pytest.mark.parametrize("vnet_header", [False, True])
@pytest.mark.parametrize("multi_queue", [False, True])
def test_own_queue(mode: str, vnet_header: bool, multi_queue: bool) -> None:
    """The probe of a queue that TunTap opened gives kind, header, packet information and device."""
    with linkrx.TunTap(fresh(), mode, vnet_header=vnet_header, multi_queue=multi_queue) as queue:
        set_link(queue.name, mtu=1234)
        found = probe(queue)
        index = socket.if_nametoindex(queue.name)
    assert (found.kind, found.ethernet, found.socket) == (mode, mode == "tap", False)
    assert found.vnet_header_size == (10 if vnet_header else 0)
    assert found.hardware_gso == vnet_header
    assert found.packet_info is False
    assert found.multi_queue == multi_queue
    assert (found.interface, found.ifindex, found.mtu) == (queue.name, index, 1234)
    assert found.hardware_type == (ARPHRD_ETHER if mode == "tap" else ARPHRD_NONE)
    assert found.local is True
    assert (found.nonblocking, found.owned) == (True, False)
    assert found.largest_frame >= 65_535 + 14
    assert found.title == f"{mode.upper()} queue on {queue.name}"


@devices
@pytest.mark.parametrize("mode", [IFF_TAP, IFF_TUN])
@pytest.mark.parametrize("packet_info", [False, True])
def test_packet_information(mode: int, packet_info: bool) -> None:
    """The probe detects packet information, although TUNGETIFF sets the bit for "off" in both cases."""
    with queue_by_hand(fresh(), mode | (0 if packet_info else IFF_NO_PI)) as fd:
        answer = fcntl.ioctl(fd, uapi.TUNGETIFF, bytes(40))
        assert struct.unpack_from("H", answer, 16)[0] & IFF_NO_PI
        assert probe(fd).packet_info is packet_info


@devices
@pytest.mark.parametrize("packet_info", [False, True])
def test_packet_information_under_a_filter(packet_info: bool) -> None:
    """With a socket filter attached, when TUNGETIFF's bit is correct, the probe gives the same answer."""
    with queue_by_hand(fresh(), IFF_TAP | (0 if packet_info else IFF_NO_PI)) as fd:
        attach_filter(fd)
        answer = fcntl.ioctl(fd, uapi.TUNGETIFF, bytes(40))
        assert bool(struct.unpack_from("H", answer, 16)[0] & IFF_NO_PI) is not packet_info
        assert probe(fd).packet_info is packet_info


@devices
@pytest.mark.parametrize("header", [10, 12, 24])
def test_virtio_net_header_size(header: int) -> None:
    """The size of the virtio-net header is read from the queue."""
    with queue_by_hand(fresh(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, header=header) as fd:
        assert probe(fd).vnet_header_size == header
        assert probe(fd).hardware_gso


@devices
def test_header_size_without_a_header() -> None:
    """The probe of a queue without a virtio-net header gives no header, although the kernel reports a size."""
    with queue_by_hand(fresh(), IFF_TAP | IFF_NO_PI) as fd:
        assert struct.unpack("i", fcntl.ioctl(fd, uapi.TUNGETVNETHDRSZ, bytes(4)))[0] == 10
        assert probe(fd).vnet_header_size == 0
        assert not probe(fd).hardware_gso


@devices
@pytest.mark.parametrize("opened", [0, os.O_NONBLOCK])
def test_blocking_or_not(opened: int) -> None:
    """The probe gives whether the queue blocks, also after a change."""
    with queue_by_hand(fresh(), IFF_TAP | IFF_NO_PI, opened=opened) as fd:
        assert probe(fd).nonblocking == bool(opened)
        os.set_blocking(fd, bool(opened))
        assert probe(fd).nonblocking != bool(opened)


@devices
@pytest.mark.parametrize("flags", [0, IFF_MULTI_QUEUE])
def test_multi_queue_by_hand(flags: int) -> None:
    """The probe gives whether the device may have several queues."""
    with queue_by_hand(fresh(), IFF_TAP | IFF_NO_PI | flags) as fd:
        assert probe(fd).multi_queue == bool(flags)


@devices
def test_descriptor_or_object() -> None:
    """A descriptor and an object with fileno() give the same answer."""
    with linkrx.TunTap(fresh()) as queue:
        assert probe(queue) == probe(queue.fileno())


@devices
@pytest.mark.parametrize("mode", [IFF_TAP, IFF_TUN])
@pytest.mark.parametrize("packet_info", [False, True])
def test_device_in_another_namespace(mode: int, packet_info: bool) -> None:
    """The probe describes the queue's own device in another namespace, not a device of the same name in this namespace."""
    name = fresh()
    flags = mode | (0 if packet_info else IFF_NO_PI)
    with other_network() as network, queue_by_hand(name, flags) as fd:
        set_link(name, mtu=1111)
        set_link(name, net_ns_fd=network)
        with queue_by_hand(name, mode | (IFF_NO_PI if packet_info else 0)) as local:
            set_link(name, mtu=2222)
            moved, here = probe(fd), probe(local)
    assert (moved.interface, moved.mtu, moved.packet_info, moved.local) == (name, 1111, packet_info, False)
    assert (here.interface, here.mtu, here.packet_info, here.local) == (name, 2222, not packet_info, True)


@devices
def test_device_in_another_namespace_alone() -> None:
    """The probe describes a device that was moved to another namespace, although this namespace has no device of its name."""
    name = fresh()
    with other_network() as network, linkrx.TunTap(name) as queue:
        set_link(name, mtu=1111)
        set_link(name, net_ns_fd=network)
        assert name not in [interface for _, interface in socket.if_nameindex()]
        found = probe(queue)
    assert (found.mtu, found.packet_info, found.local) == (1111, False, False)


@devices
def test_renamed_device() -> None:
    """After a rename the probe gives the device's new name."""
    with linkrx.TunTap(fresh()) as queue:
        other = fresh()
        set_link(queue.name, ifname=other)
        assert probe(queue).interface == other
        assert probe(queue).mtu == 1500


def without_capabilities(fd: int, program: str) -> str:
    """The output of a program that gets a descriptor as `fd` and drops all capabilities."""
    drop = (
        "import ctypes, struct\n"
        # linux/capability.h: _LINUX_CAPABILITY_VERSION_3, no pid; three empty sets of 64 bits
        "assert ctypes.CDLL(None).capset(struct.pack('=Ii', 0x20080522, 0), bytes(24)) == 0\n"
        f"import linkrx\nfd = {fd}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", drop + program],
        cwd=Path(linkrx.__file__).parents[1],
        pass_fds=[fd],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@devices
@pytest.mark.parametrize("packet_info", [False, True])
def test_tap_in_the_hands_of_a_process_without_privileges(packet_info: bool) -> None:
    """Without capabilities, the probe describes a TAP in the same namespace."""
    name = fresh()
    with queue_by_hand(name, IFF_TAP | (0 if packet_info else IFF_NO_PI)) as fd:
        set_link(name, mtu=1300)
        message = without_capabilities(
            fd,
            "found = linkrx.probe(fd)\n"
            "print(found.interface, found.mtu, found.packet_info, found.local)\n"
            "linkrx.open(fd).close()\n",
        )
    assert message == f"{name} 1300 {packet_info} True"


@devices
def test_tun_in_the_hands_of_a_process_without_privileges() -> None:
    """Without capabilities, the device of a TUN cannot be identified by an address, so the caller must give the options."""
    with linkrx.TunTap(fresh(), "tun") as queue:
        message = without_capabilities(
            queue.fileno(),
            "print(linkrx.probe(fd).packet_info)\n"
            "try:\n"
            "    linkrx.open(fd)\n"
            "except linkrx.UnsupportedOption as error:\n"
            "    print(error)\n"
            "linkrx.open(fd, packet_info=False).close()\n",
        )
    known, message = message.split("\n")
    assert known == "None"
    assert "packet_info=False" in message
    assert f"TUN queue on {queue.name}" in message


@devices
@pytest.mark.parametrize("filtered", [False, True])
def test_flags_that_prove_packet_information(filtered: bool) -> None:
    """If the device cannot be queried, the flags of a TAP with a filter prove packet information."""
    name = fresh()
    with other_network() as network, queue_by_hand(name, IFF_TAP) as fd:
        set_link(name, net_ns_fd=network)
        if filtered:
            attach_filter(fd)
        message = without_capabilities(fd, "print(linkrx.probe(fd).packet_info)\n")
    assert message == ("True" if filtered else "None")


@devices
def test_namesake_in_the_hands_of_a_process_without_privileges() -> None:
    """Without capabilities, a TAP in another namespace is not mistaken for a device of the same name in this namespace."""
    name = fresh()
    with other_network() as network, linkrx.TunTap(name) as queue:
        set_link(name, net_ns_fd=network)
        with linkrx.TunTap(name):
            message = without_capabilities(
                queue.fileno(),
                "found = linkrx.probe(fd)\n"
                "print(found.interface, found.mtu, found.packet_info)\n"
                "try:\n"
                "    linkrx.open(fd)\n"
                "except linkrx.UnsupportedOption as error:\n"
                "    print(error)\n"
                "linkrx.open(fd, packet_info=False).close()\n",
            )
    facts, message = message.split("\n")
    assert facts == f"{name} None None"
    assert "packet_info=False" in message
    assert f"TAP queue on {name}" in message


# Packet sockets and interfaces.


@devices
def test_packet_socket_on_veth() -> None:
    """The probe of a raw packet socket on a veth gives Ethernet frames and the device."""
    with veth() as near, packet_socket(socket.SOCK_RAW, near) as opened:
        found = probe(opened)
        index = socket.if_nametoindex(near)
    assert (found.kind, found.socket, found.ethernet) == ("packet", True, True)
    assert (found.interface, found.ifindex, found.mtu) == (near, index, 1400)
    assert found.hardware_type == ARPHRD_ETHER
    assert (found.vnet_header_size, found.hardware_gso, found.packet_info) == (0, False, False)
    assert found.owned is False


@devices
def test_packet_socket_on_lo() -> None:
    """The loopback device has Ethernet headers, despite its hardware type."""
    with packet_socket(socket.SOCK_RAW, "lo") as opened:
        found = probe(opened)
    assert (found.ethernet, found.interface, found.ifindex) == (True, "lo", 1)
    assert found.hardware_type == ARPHRD_LOOPBACK


@devices
def test_packet_socket_on_a_tun_device() -> None:
    """On a TUN device, which has no Ethernet, a raw packet socket has none either."""
    with linkrx.TunTap(fresh(), "tun") as queue, packet_socket(socket.SOCK_RAW, queue.name) as opened:
        found = probe(opened)
        assert (found.kind, found.ethernet, found.interface) == ("packet", False, queue.name)
        assert found.hardware_type == ARPHRD_NONE
        assert probe(queue.name).ethernet is False


@devices
def test_cooked_packet_socket() -> None:
    """A cooked packet socket has no link headers, on an Ethernet device or unbound."""
    with packet_socket(socket.SOCK_DGRAM, "lo") as opened:
        found = probe(opened)
        assert (found.kind, found.ethernet, found.interface) == ("packet_cooked", False, "lo")
    with packet_socket(socket.SOCK_DGRAM) as opened:
        found = probe(opened)
        assert (found.kind, found.ethernet, found.interface) == ("packet_cooked", False, None)


@devices
def test_unbound_packet_socket() -> None:
    """The probe of an unbound raw packet socket gives neither a device nor a link header."""
    with packet_socket(socket.SOCK_RAW) as opened:
        found = probe(opened)
    assert (found.kind, found.ethernet) == ("packet", None)
    assert (found.interface, found.ifindex, found.mtu, found.hardware_type) == (None, None, None, None)


@devices
@pytest.mark.parametrize(
    ("option", "value", "size"),
    [
        (uapi.PACKET_VNET_HDR, 1, 10),
        (uapi.PACKET_VNET_HDR_SZ, 10, 10),
        (uapi.PACKET_VNET_HDR_SZ, 12, 12),
    ],
)
def test_packet_socket_with_virtio_net_header(option: int, value: int, size: int) -> None:
    """The probe gives PACKET_VNET_HDR, and the size that PACKET_VNET_HDR_SZ set."""
    with packet_socket(socket.SOCK_RAW, "lo") as opened:
        try:
            opened.setsockopt(uapi.SOL_PACKET, option, value)
        except OSError:
            if option == uapi.PACKET_VNET_HDR:
                raise
            pytest.skip("the kernel is older than PACKET_VNET_HDR_SZ, Linux 6.6")
        found = probe(opened)
    assert (found.vnet_header_size, found.hardware_gso) == (size, True)


@devices
def test_packet_socket_whose_interface_was_deleted() -> None:
    """A packet socket whose interface was deleted counts as unbound."""
    with ExitStack() as stack, veth() as near:
        opened = stack.enter_context(packet_socket(socket.SOCK_RAW, near))
        assert probe(opened).interface == near
        stack = stack.pop_all()
    with stack:
        assert probe(opened).interface is None


@devices
def test_interface_by_name() -> None:
    """The probe of an interface name gives the capabilities of the socket that linkrx opens on it."""
    with veth() as near:
        found = probe(near)
        index = socket.if_nametoindex(near)
        with linkrx.open(near) as rx:
            assert rx.capabilities == found
    assert (found.kind, found.socket, found.ethernet, found.owned) == ("packet", True, True, True)
    assert (found.interface, found.ifindex, found.mtu) == (near, index, 1400)
    assert found.hardware_type == ARPHRD_ETHER
    assert (found.local, found.nonblocking) == (True, True)
    assert found.title == f"AF_PACKET socket on {near}"


# Datagram sockets and pipes.


@pytest.mark.parametrize(
    ("kind", "name"), [(socket.SOCK_DGRAM, "unix_dgram"), (socket.SOCK_SEQPACKET, "unix_seqpacket")]
)
@pytest.mark.parametrize("blocking", [False, True])
def test_unix_socket(kind: socket.SocketKind, name: str, blocking: bool) -> None:
    """The probe of an AF_UNIX socket gives its type and whether it blocks, but not the link header."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, kind)
    with receiver, sender:
        receiver.setblocking(blocking)
        found = probe(receiver)
    assert (found.kind, found.socket, found.nonblocking) == (name, True, not blocking)
    assert (found.ethernet, found.interface, found.vnet_header_size) == (None, None, 0)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_udp_socket(family: socket.AddressFamily) -> None:
    """A UDP socket of either family is a source, bound or not."""
    with socket.socket(family, socket.SOCK_DGRAM) as opened:
        found = probe(opened)
    assert (found.kind, found.socket, found.ethernet) == ("udp", True, None)
    assert found.title == "UDP socket"


def test_packet_pipe() -> None:
    """A pipe in packet mode is recognised by its writing end, because the reading end does not show it."""
    with pipe(os.O_DIRECT) as (reader, _):
        assert not fcntl.fcntl(reader, fcntl.F_GETFL) & os.O_DIRECT
        found = probe(reader)
    assert (found.kind, found.socket, found.ethernet, found.nonblocking) == ("pipe", False, None, False)


def test_packet_pipe_by_declaration() -> None:
    """A pipe whose writer is in another process is accepted only if O_DIRECT is set on the reading end."""
    reader, writer = os.pipe2(os.O_DIRECT)
    try:
        os.close(writer)
        with pytest.raises(linkrx.UnsupportedSource, match=r"another process.*F_SETFL"):
            probe(reader)
        fcntl.fcntl(reader, fcntl.F_SETFL, fcntl.fcntl(reader, fcntl.F_GETFL) | os.O_DIRECT)
        assert probe(reader).kind == "pipe"
    finally:
        os.close(reader)


def test_pipe_with_one_plain_writer() -> None:
    """A pipe is no packet pipe when one of its writing ends is not in packet mode."""
    with pipe(os.O_DIRECT) as (reader, writer):
        other = os.open(f"/proc/self/fd/{writer}", os.O_WRONLY)
        try:
            with pytest.raises(linkrx.UnsupportedSource, match="without packet boundaries"):
                probe(reader)
        finally:
            os.close(other)
        assert probe(reader).kind == "pipe"


# Probing changes nothing.


def test_datagrams_stay() -> None:
    """Probing receives no datagram and changes no flag, with or without a default timeout for new sockets."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender:
        sender.send(b"still here")
        for timeout in (None, 5.0):
            socket.setdefaulttimeout(timeout)
            try:
                before = fcntl.fcntl(receiver, fcntl.F_GETFL)
                probe(receiver)
                assert fcntl.fcntl(receiver, fcntl.F_GETFL) == before
            finally:
                socket.setdefaulttimeout(None)
        assert receiver.recv(100, socket.MSG_DONTWAIT) == b"still here"


def test_packets_in_a_pipe_stay() -> None:
    """Probing receives no packet of a pipe and does not change the flags of its ends."""
    with pipe(os.O_DIRECT) as ends:
        os.write(ends[1], b"still here")
        before = [fcntl.fcntl(end, fcntl.F_GETFL) for end in ends]
        probe(ends[0])
        assert [fcntl.fcntl(end, fcntl.F_GETFL) for end in ends] == before
        assert os.read(ends[0], 100) == b"still here"


@devices
@pytest.mark.parametrize("opened", [0, os.O_NONBLOCK])
def test_packets_of_a_queue_stay(opened: int) -> None:
    """Probing receives no packet of a TAP queue and does not change its flags."""
    name = fresh()
    frame = bytes(12) + b"\x88\xb5" + bytes(50)
    with queue_by_hand(name, IFF_TAP | IFF_NO_PI, opened=opened) as fd:
        set_link(name, state="up")
        with packet_socket(socket.SOCK_RAW) as injector:
            injector.bind((name, 0))
            injector.send(frame)
        before = fcntl.fcntl(fd, fcntl.F_GETFL)
        probe(fd)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == before
        assert os.read(fd, 2048) == frame


@devices
def test_packet_socket_stays_bound() -> None:
    """Probing receives no packet of a packet socket and changes neither its address nor its flags."""
    with packet_socket(socket.SOCK_RAW, "lo") as opened, packet_socket(socket.SOCK_RAW) as injector:
        injector.bind(("lo", 0))
        injector.send(bytes(12) + b"\x88\xb5" + bytes(50))
        before = (opened.getsockname(), fcntl.fcntl(opened, fcntl.F_GETFL))
        probe(opened)
        assert (opened.getsockname(), fcntl.fcntl(opened, fcntl.F_GETFL)) == before
        assert opened.recv(2048, socket.MSG_DONTWAIT)[12:14] == b"\x88\xb5"


# Refused sources.


def refusal(source: Any) -> str:
    """The error message of probe and of open for a source, which is the same."""
    with pytest.raises(linkrx.UnsupportedSource) as by_probe:
        probe(source)
    with pytest.raises(linkrx.UnsupportedSource) as by_open:
        linkrx.open(source)
    assert str(by_probe.value) == str(by_open.value)
    assert isinstance(by_probe.value, ValueError)
    return str(by_probe.value)


@pytest.mark.parametrize("family", SOCK_STREAM_KINDS)
def test_stream_socket(family: socket.AddressFamily) -> None:
    """A stream socket of any family is refused, because it has no packet boundaries."""
    with socket.socket(family, socket.SOCK_STREAM) as opened:
        message = refusal(opened)
    assert "SOCK_STREAM" in message
    assert "without packet boundaries" in message


def test_socket_of_another_family() -> None:
    """A netlink socket is refused with an error that has its family and the accepted families."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as opened:
        message = refusal(opened)
    assert f"family {int(socket.AF_NETLINK)}" in message
    assert "AF_PACKET, AF_UNIX (datagram, seqpacket) and UDP" in message


def test_plain_pipe() -> None:
    """A plain pipe is refused with an error that says how to make one in packet mode, and how to read a capture file from it."""
    with pipe() as (reader, _):
        message = refusal(reader)
    assert "pipe, a byte stream without packet boundaries" in message
    assert "os.O_DIRECT" in message
    assert "linkrx.CaptureFile(file)" in message


@pytest.mark.parametrize("flags", [0, os.O_DIRECT])
def test_writing_end_of_a_pipe(flags: int) -> None:
    """The writing end of a pipe is refused with an error that names the other end."""
    with pipe(flags) as (_, writer):
        assert "writing only: give the reading end" in refusal(writer)


def test_regular_file(tmp_path: Path) -> None:
    """A regular file is refused as such, with an error that says how to read a capture file."""
    path = tmp_path / "capture"
    path.write_bytes(b"no packets")
    with path.open("rb") as opened:
        message = refusal(opened)
        assert opened.tell() == 0
    assert "is a regular file" in message
    assert "TAP and TUN queues" in message
    assert "linkrx.CaptureFile(file)" in message


def test_directory(tmp_path: Path) -> None:
    """A directory is refused as such."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert "is a directory" in refusal(fd)
    finally:
        os.close(fd)


def test_closed_descriptor() -> None:
    """A closed descriptor is refused with its number and the kernel's error."""
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    assert re.fullmatch(rf"file descriptor {reader} is not open: Bad file descriptor", refusal(reader))


def test_closed_socket() -> None:
    """A closed socket object is refused as closed."""
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    opened.close()
    assert "is closed: its file descriptor is -1" in refusal(opened)


@devices
def test_closed_queue() -> None:
    """A closed TunTap is refused as closed, by its name."""
    with linkrx.TunTap(fresh()) as queue:
        pass
    message = refusal(queue)
    assert queue.name in message
    assert "is closed" in message


def test_closed_file(tmp_path: Path) -> None:
    """An object whose fileno() raises is refused with the message of that exception."""
    with (tmp_path / "file").open("w") as opened:
        pass
    assert "has no file descriptor: I/O operation on closed file" in refusal(opened)


@pytest.mark.parametrize("fd", [-1, -100])
def test_negative_descriptor(fd: int) -> None:
    """A negative descriptor is refused with its number."""
    assert refusal(fd) == f"{fd} is no file descriptor"


@pytest.mark.parametrize("source", [None, 1.5, b"lo", ["lo"], object()])
def test_object_without_fileno(source: object) -> None:
    """An object that is no source is refused with an error that lists the kinds of sources."""
    message = refusal(source)
    assert repr(source) in message
    assert "a file descriptor, an object with fileno(), or an interface name" in message


@devices
def test_queue_before_it_has_a_device() -> None:
    """An open /dev/net/tun without a device is refused with an error that says so."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    try:
        message = refusal(fd)
    finally:
        os.close(fd)
    assert "/dev/net/tun" in message
    assert "TUNSETIFF is still to come" in message
    assert "linkrx.TunTap" in message


@devices
def test_queue_whose_device_was_deleted() -> None:
    """A queue whose device was deleted is refused with that reason."""
    from pyroute2 import IPRoute

    with linkrx.TunTap(fresh()) as queue:
        with IPRoute() as route:
            route.link("del", index=socket.if_nametoindex(queue.name))
        assert "its device was deleted" in refusal(queue)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_other_character_device(path: str) -> None:
    """A character device that is no queue is refused as such."""
    fd = os.open(path, os.O_RDONLY)
    try:
        assert "character device that is no TAP or TUN queue" in refusal(fd)
    finally:
        os.close(fd)


def test_unknown_interface() -> None:
    """An interface that does not exist is refused with its name, and the error says how to list interfaces."""
    message = refusal("lrx-no-such-if")
    assert "'lrx-no-such-if'" in message
    assert "ip link" in message


@pytest.mark.parametrize("name", ["", "lo\0x", "n" * 128, "a/b", ".", "\udcff\udcff\udcff\udcff" * 32])
def test_invalid_interface_names(name: str) -> None:
    """An invalid interface name is refused, and not truncated to a shorter name."""
    assert refusal(name).startswith(f"{name!r} cannot be the name of an interface")


@pytest.mark.parametrize("source", [True, 2**40, None, 1.5, b"lo"])
def test_objects_that_are_no_source(source: Any) -> None:
    """Objects that are neither a descriptor, nor have one, nor name an interface are refused."""
    assert refusal(source).startswith(f"{source!r} is no source")


def test_fileno_that_gives_none() -> None:
    """An object whose fileno() does not return a number is refused."""

    class Odd:
        def fileno(self) -> Any:
            return None

    assert "is no source" in refusal(Odd())


def test_a_message_larger_than_any_default() -> None:
    """A datagram of half a megabyte is received whole with default options."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        body = os.urandom(min(524_000, sender.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - 1024))
        sender.send(body)
        with linkrx.open(receiver) as rx:
            got = rx.recv(10)
            assert bytes(got) == body
            assert not got.truncated


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", "64"),
        ("batch_size", 2.5),
        ("ethernet", 0),
        ("ethernet", "no"),
        ("vnet_header", "x"),
        ("vnet_header", 10.5),
        ("receive_buffer", "a"),
        ("latency", "a"),
        ("promiscuous", 1),
    ],
)
def test_options_of_the_wrong_type(option: str, value: Any) -> None:
    """An option of the wrong type raises TypeError, which quotes it and says what is valid."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    wrong: Any = {option: value}
    with receiver, sender, pytest.raises(TypeError, match=re.escape(f"{option}={value!r}: give ")):
        linkrx.open(receiver, **wrong)


@pytest.mark.parametrize("size", [-1, 1, 9, 4097, 2**33])
def test_a_virtio_net_header_of_no_possible_size(size: int) -> None:
    """An invalid virtio-net header size raises ValueError, which lists the valid sizes."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender, pytest.raises(ValueError, match=f"vnet_header={size}: .* 10 to 4096 bytes"):
        linkrx.open(receiver, vnet_header=size)


def test_no_virtio_net_header_can_be_said_with_0() -> None:
    """vnet_header=0 means no header, as in Capabilities.vnet_header_size."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender, linkrx.open(receiver, vnet_header=0) as rx:
        sender.send(bytes(20))
        assert rx.recv(10).vnet is None


# Options that contradict the source.


def contradiction(source: Any, error: type[Exception] = linkrx.UnsupportedOption, **options: Any) -> str:
    """The error message for these options on a source."""
    with pytest.raises(error) as caught:
        linkrx.open(source, **options)
    return str(caught.value)


@devices
@pytest.mark.parametrize(("mode", "ethernet"), [("tun", True), ("tap", False)])
def test_ethernet_contradicts_a_queue(mode: str, ethernet: bool) -> None:
    """ethernet= that contradicts a TUN or TAP queue raises an error that names the option and the source."""
    with linkrx.TunTap(fresh(), mode) as queue:
        message = contradiction(queue, ethernet=ethernet)
        assert f"ethernet={ethernet} contradicts" in message
        assert f"{mode.upper()} queue on {queue.name}" in message
        linkrx.open(queue, ethernet=not ethernet).close()


@devices
def test_ethernet_contradicts_a_cooked_socket() -> None:
    """ethernet=True on a cooked packet socket raises an error that names the option and the source."""
    with packet_socket(socket.SOCK_DGRAM, "lo") as opened:
        message = contradiction(opened, ethernet=True)
    assert "ethernet=True contradicts" in message
    assert "cooked AF_PACKET socket on lo" in message


@devices
@pytest.mark.parametrize("header", [True, 10, 12])
def test_vnet_header_on_a_queue_without_one(header: bool | int) -> None:
    """vnet_header=True on a TAP without a virtio-net header raises an error that names the option and the source."""
    with linkrx.TunTap(fresh()) as queue:
        message = contradiction(queue, vnet_header=header)
        assert f"vnet_header={header} contradicts" in message
        assert f"TAP queue on {queue.name} puts no virtio-net header" in message
        linkrx.open(queue, vnet_header=False).close()


@devices
@pytest.mark.parametrize("header", [False, 10, 24])
def test_vnet_header_of_another_size(header: bool | int) -> None:
    """vnet_header=False or another size on a queue with a virtio-net header raises an error with the true size."""
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    with queue_by_hand(fresh(), flags, header=12) as fd:
        message = contradiction(fd, vnet_header=header)
        assert f"vnet_header={header} contradicts" in message
        assert "a virtio-net header of 12 bytes" in message
        for agreeing in (None, True, 12):
            linkrx.open(fd, vnet_header=agreeing).close()


@devices
@pytest.mark.parametrize("packet_info", [False, True])
def test_packet_info_contradicts_a_queue(packet_info: bool) -> None:
    """packet_info= that contradicts the device raises an error that names the option and the source."""
    with queue_by_hand(fresh(), IFF_TAP | (0 if packet_info else IFF_NO_PI)) as fd:
        message = contradiction(fd, packet_info=not packet_info)
        assert f"packet_info={not packet_info} contradicts" in message
        assert "TAP queue" in message
        linkrx.open(fd, packet_info=packet_info).close()


def test_packet_info_on_a_socket(datagram: socket.socket) -> None:
    """packet_info=True on a socket raises an error that names the option and the source."""
    message = contradiction(datagram, packet_info=True)
    assert "packet_info=True contradicts" in message
    assert "AF_UNIX datagram socket" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [("promiscuous", True), ("outgoing", True), ("timestamps", True), ("fanout", 1)],
)
def test_packet_option_on_a_unix_socket(datagram: socket.socket, name: str, value: object) -> None:
    """An option of packet sockets on another socket raises an error that names the option and the source."""
    options: dict[str, Any] = {name: value}
    message = contradiction(datagram, **options)
    assert f"{name}={value!r} needs an AF_PACKET socket" in message
    assert "AF_UNIX datagram socket" in message


@devices
def test_promiscuous_without_an_interface() -> None:
    """promiscuous=True without an interface is refused, and the socket is not changed."""
    with packet_socket(socket.SOCK_RAW) as opened:
        before = opened.getsockopt(uapi.SOL_PACKET, 23)
        message = contradiction(opened, promiscuous=True)
        assert opened.getsockopt(uapi.SOL_PACKET, 23) == before
    assert "promiscuous=True" in message
    assert "bound to no interface" in message


@devices
def test_receive_buffer_on_a_queue() -> None:
    """receive_buffer= on a TAP raises an error that names both, and says how to make the queue longer."""
    with linkrx.TunTap(fresh()) as queue:
        message = contradiction(queue, receive_buffer=1 << 20)
        assert "receive_buffer=1048576 needs a socket" in message
        assert f"TAP queue on {queue.name}" in message
        assert f"ip link set {queue.name} txqueuelen" in message


def test_receive_buffer_on_a_pipe() -> None:
    """receive_buffer= on a pipe raises an error without advice about an interface."""
    with pipe(os.O_DIRECT) as (reader, _):
        message = contradiction(reader, receive_buffer=1 << 20)
    assert "needs a socket; the source is a packet pipe" in message
    assert "txqueuelen" not in message


@devices
@pytest.mark.parametrize("backend", ["readv", "os_readv"])
@pytest.mark.parametrize("name", ["timestamps", "outgoing"])
def test_option_that_a_backend_cannot_honour(backend: str, name: str) -> None:
    """An option that a named backend cannot honour raises an error that names option, backend and source."""
    if next(info for info in linkrx.backends() if info.name == backend).reason is not None:
        pytest.skip(f"{backend} needs the compiled core, which was not built")
    options: dict[str, Any] = {name: True}
    with packet_socket(socket.SOCK_RAW, "lo") as opened:
        message = contradiction(opened, backend=backend, **options)
    assert f"{backend} cannot honour {name}=True" in message
    assert "AF_PACKET socket on lo" in message


def test_backend_that_does_not_take_the_source() -> None:
    """A named backend that refuses the source raises an error that names both."""
    if next(info for info in linkrx.backends() if info.name == "recvmmsg").reason is not None:
        pytest.skip("recvmmsg needs the compiled core, which was not built")
    with pipe(os.O_DIRECT) as (reader, _):
        message = contradiction(reader, linkrx.UnsupportedSource, backend="recvmmsg")
    assert "recvmmsg does not take this source" in message
    assert "packet pipe" in message


def test_unknown_backend(datagram: socket.socket) -> None:
    """An unknown backend raises an error that lists the backends."""
    message = contradiction(datagram, linkrx.BackendUnavailable, backend="nonesuch")
    assert "'nonesuch'" in message
    assert "os_readv" in message


def test_unknown_option(datagram: socket.socket) -> None:
    """An unknown option raises TypeError, which names it and lists the options."""
    message = contradiction(datagram, TypeError, promiscous=True, batch_size=8)
    assert "no option 'promiscous'; it has" in message
    assert "promiscuous" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", -1),
        ("batch_size", 1025),
        ("receive_buffer", 0),
        ("latency", -1.0),
        ("vnet_header", 9),
    ],
)
def test_an_invalid_value(datagram: socket.socket, name: str, value: float) -> None:
    """A value that is invalid for every source raises ValueError, which quotes it, and not UnsupportedOption."""
    options: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=re.escape(f"{name}={value}")) as caught:
        linkrx.open(datagram, **options)
    assert not isinstance(caught.value, linkrx.LinkrxError)


@pytest.mark.parametrize("sizes", [(), (0,), (1,) * 65])
def test_an_invalid_ladder(datagram: socket.socket, sizes: tuple[int, ...]) -> None:
    """A ladder that IovecBuffer refuses raises ValueError in open too."""
    with pytest.raises(ValueError, match="buffer_sizes"):
        linkrx.open(datagram, buffer_sizes=sizes)


def test_values_at_the_limits(datagram: socket.socket) -> None:
    """The smallest and the largest valid values are accepted."""
    for options in (
        {"batch_size": 1},
        {"batch_size": 1024},
        {"vnet_header": 10},
        {"buffer_sizes": (1,) * 64},
        {"latency": 0},
    ):
        with linkrx.open(datagram, **options) as rx:
            assert rx.end is None


@pytest.mark.parametrize(("vnet_header", "size"), [(True, 10), (False, 0), (12, 12), (24, 24)])
def test_options_define_the_headers_on_a_datagram_socket(vnet_header: bool | int, size: int) -> None:
    """On a datagram socket, the options of the caller define the headers in front of a packet."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender, linkrx.open(receiver, vnet_header=vnet_header, ethernet=False) as rx:
        sender.send(b"\x45" * size + b"\x60packet")
        received = rx.recv(10)
        assert bytes(received) == b"\x60packet"
        assert received.protocol == 0x86DD
        assert (received.vnet is not None) == bool(size)
