"""TunTap: one open queue of a TAP or TUN device."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import linkrx
from linkrx.kernel import uapi
from linkrx.kernel.ethtool import takes_super_packets
from linkrx.kernel.uapi import IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_TUN, IFF_VNET_HDR
from linkrx.sources import tuntap
from linkrx.testing.devices import Device, injector_on

pytestmark = pytest.mark.usefixtures("devices")

TUNSETPERSIST = 0x400454CB  # linux/if_tun.h
TSO = tuntap.Offload.CSUM | tuntap.Offload.TSO4 | tuntap.Offload.TSO6


def exists(name: str) -> bool:
    """Whether an interface of that name exists."""
    return name in [interface for _, interface in socket.if_nameindex()]


def attach(name: str, flags: int) -> int:
    """Open a queue without linkrx."""
    fd = os.open(tuntap.DEVICE, os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, uapi.TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError:
        os.close(fd)
        raise
    return fd


@contextmanager
def persistent(name: str, flags: int, *, header: int = 10, offload: int = 0) -> Iterator[str]:
    """A persistent device, with the settings of an earlier owner."""
    fd = attach(name, flags)
    fcntl.ioctl(fd, TUNSETPERSIST, 1)
    if flags & IFF_VNET_HDR:
        fcntl.ioctl(fd, uapi.TUNSETVNETHDRSZ, struct.pack("i", header))
    fcntl.ioctl(fd, uapi.TUNSETOFFLOAD, offload)
    os.close(fd)
    try:
        yield name
    finally:
        fd = attach(name, flags)
        fcntl.ioctl(fd, TUNSETPERSIST, 0)
        os.close(fd)
        assert not exists(name)


def run_without_capabilities(program: str) -> str:
    """The output of a Python program without capabilities in this network namespace."""
    drop = (
        "import ctypes, struct\n"
        # linux/capability.h: _LINUX_CAPABILITY_VERSION_3, no pid; three empty sets of 64 bits
        "head = struct.pack('=Ii', 0x20080522, 0)\n"
        "assert ctypes.CDLL(None).capset(head, bytes(24)) == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", drop + program],
        cwd=Path(linkrx.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# A device of its own.


@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_open_and_close(mode: str) -> None:
    """While the queue is open the device exists with the given name and mode. After close it does not exist."""
    queue = linkrx.TunTap("lrxt0", mode)
    try:
        assert (queue.name, queue.mode) == ("lrxt0", mode)
        assert queue.fileno() >= 0
        assert exists("lrxt0")
        found = linkrx.probe(queue)
        assert (found.kind, found.interface, found.packet_info) == (mode, "lrxt0", False)
        assert found.vnet_header_size == 0
    finally:
        queue.close()
    assert not exists("lrxt0")


def test_tap_is_the_default() -> None:
    """Without a mode the device is a TAP."""
    with linkrx.TunTap() as queue:
        assert queue.mode == "tap"
        assert linkrx.probe(queue).kind == "tap"


@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_kernel_chooses_a_name(mode: str) -> None:
    """With an empty name, two queues get two devices, which the kernel names after their mode."""
    with linkrx.TunTap(mode=mode) as first, linkrx.TunTap(mode=mode) as second:
        assert first.name != second.name
        for queue in (first, second):
            assert queue.name.startswith(mode)
            assert exists(queue.name)


def test_name_pattern() -> None:
    """The kernel replaces %d, and `name` is the resulting name."""
    with linkrx.TunTap("lrxp%d") as queue:
        assert queue.name != "lrxp%d"
        assert exists(queue.name)


def test_longest_name() -> None:
    """A name of 15 bytes is accepted."""
    with linkrx.TunTap("lrx-fifteen-byt") as queue:
        assert queue.name == "lrx-fifteen-byt"
        assert exists("lrx-fifteen-byt")


def test_close_is_idempotent() -> None:
    """A second close does nothing, also if another file reuses the descriptor's number."""
    queue = linkrx.TunTap()
    number = queue.fileno()
    queue.close()
    assert queue.fileno() == -1
    reader, writer = os.pipe()
    try:
        assert number in (reader, writer)
        queue.close()
        os.write(writer, b"still open")
        assert os.read(reader, 20) == b"still open"
    finally:
        os.close(reader)
        os.close(writer)


def test_context_manager_closes_when_the_block_raises() -> None:
    """Leaving the block closes the queue, also if the block raises."""
    with pytest.raises(KeyError), linkrx.TunTap("lrxt1") as queue:
        raise KeyError
    assert queue.fileno() == -1
    assert not exists("lrxt1")


def test_repr() -> None:
    """The repr shows mode, name and descriptor, or that the queue is closed."""
    with linkrx.TunTap("lrxt2", "tun") as queue:
        assert repr(queue) == f"<TunTap tun lrxt2 fd {queue.fileno()}>"
    assert repr(queue) == "<TunTap tun lrxt2 closed>"


def test_descriptor_flags() -> None:
    """The queue's descriptor is non-blocking and close-on-exec."""
    with linkrx.TunTap() as queue:
        assert not os.get_blocking(queue.fileno())
        assert not os.get_inheritable(queue.fileno())
        with pytest.raises(BlockingIOError):
            os.read(queue.fileno(), 2048)


def test_collected_without_close() -> None:
    """A queue that was not closed is closed when it is collected, and its device is deleted."""
    queue = linkrx.TunTap("lrxt3")
    number = queue.fileno()
    queue_cycle: list[object] = [queue]
    queue_cycle.append(queue_cycle)
    del queue, queue_cycle
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    assert not exists("lrxt3")


@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_write_and_receive(mode: str) -> None:
    """A dispatcher on the queue receives frames that the device sends."""
    from pyroute2 import IPRoute

    sent = b"\x45\x00" + bytes(40) if mode == "tun" else bytes(12) + b"\x88\xb5" + bytes(46)
    with linkrx.TunTap("lrxt4", mode) as queue, linkrx.open(queue) as rx:
        with IPRoute() as route:
            route.link("set", index=socket.if_nametoindex("lrxt4"), state="up")
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as injector:
            injector.bind(("lrxt4", 0))
            injector.send(sent)
        assert bytes(rx.recv(10)) == sent


# Several queues.


def test_two_queues() -> None:
    """Two queues of one device have the same name and different descriptors. The device is deleted with the last queue."""
    with linkrx.TunTap("lrxm0", multi_queue=True) as first:
        with linkrx.TunTap("lrxm0", multi_queue=True) as second:
            assert first.name == second.name == "lrxm0"
            assert first.fileno() != second.fileno()
            assert linkrx.probe(first).multi_queue
            assert linkrx.probe(first).ifindex == linkrx.probe(second).ifindex
        assert exists("lrxm0")
    assert not exists("lrxm0")


def test_busy() -> None:
    """A second owner of a device with one queue gets EBUSY, with an error that names multi_queue."""
    with linkrx.TunTap("lrxm1"):
        with pytest.raises(OSError, match=r"'lrxm1'.*only queue is open already.*multi_queue=True") as caught:
            linkrx.TunTap("lrxm1")
        assert caught.value.errno == errno.EBUSY


@pytest.mark.parametrize("first_has_many", [False, True])
def test_multi_queue_mismatch(first_has_many: bool) -> None:
    """multi_queue= that differs from the device's setting gives EINVAL, and the message names the setting."""
    with linkrx.TunTap("lrxm2", multi_queue=first_has_many):
        with pytest.raises(OSError, match=r"'lrxm2'.*mode or multi_queue setting") as caught:
            linkrx.TunTap("lrxm2", multi_queue=not first_has_many)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(("mode", "other"), [("tap", "tun"), ("tun", "tap")])
def test_other_mode(mode: str, other: str) -> None:
    """Attaching to a device of the other mode gives EINVAL, and the message names the mode."""
    with linkrx.TunTap("lrxm3", mode):
        with pytest.raises(OSError, match=r"'lrxm3'.*another mode") as caught:
            linkrx.TunTap("lrxm3", other)
        assert caught.value.errno == errno.EINVAL


# Invalid arguments.


@pytest.mark.parametrize("mode", ["", "TAP", "veth"])
def test_bad_mode(mode: str) -> None:
    """A mode other than tap or tun raises ValueError, which quotes it and names the two."""
    with pytest.raises(ValueError, match=f"{mode!r}.*give 'tap' or 'tun'"):
        linkrx.TunTap(mode=mode)


@pytest.mark.parametrize("name", ["lrx-sixteen-byte", "x" * 100, "\N{LATIN SMALL LETTER E WITH ACUTE}" * 8])
def test_name_too_long(name: str) -> None:
    """A name of more than 15 bytes raises ValueError, which quotes it, and is not truncated."""
    before = socket.if_nameindex()
    with pytest.raises(ValueError, match="cannot be the name of an interface: 1 to 15 bytes") as caught:
        linkrx.TunTap(name)
    assert repr(name) in str(caught.value)
    assert socket.if_nameindex() == before


def test_offload_without_header() -> None:
    """offload=True without vnet_header=True raises ValueError, which names both arguments."""
    with pytest.raises(ValueError, match=r"offload=True needs vnet_header=True"):
        linkrx.TunTap(offload=True)


def test_failed_open_can_be_collected() -> None:
    """A TunTap that could not be opened is collected without a warning, and leaves no device."""
    with linkrx.TunTap("lrxm4"):
        pass
    with pytest.raises(ValueError, match="mode"):
        linkrx.TunTap("lrxm4", "neither")
    gc.collect()
    assert not exists("lrxm4")


# Header and offloads.


@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_vnet_header(mode: str) -> None:
    """With vnet_header=True frames have a header of ten bytes, and without offload=True there are no super-packets."""
    with linkrx.TunTap("lrxo0", mode, vnet_header=True) as queue:
        assert linkrx.probe(queue).vnet_header_size == 10
        assert queue.offload == 0
        assert not takes_super_packets("lrxo0")


def test_accepted_offloads() -> None:
    """With offload=True `offload` contains checksums and TCP, and these are switched on at the device."""
    with linkrx.TunTap("lrxo1", vnet_header=True, offload=True) as queue:
        assert queue.offload & TSO == TSO
        assert takes_super_packets("lrxo1")
        usos = tuntap.Offload.USO4 | tuntap.Offload.USO6
        assert queue.offload & usos in (0, usos)


@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_state_of_a_previous_owner(mode: str) -> None:
    """Attaching to a persistent device resets the offloads and header size of an earlier owner."""
    flags = IFF_NO_PI | IFF_VNET_HDR | (IFF_TAP if mode == "tap" else IFF_TUN)
    with persistent("lrxo2", flags, header=12, offload=TSO):
        assert takes_super_packets("lrxo2")
        by_hand = attach("lrxo2", flags)
        assert linkrx.probe(by_hand).vnet_header_size == 12  # the setting of the earlier owner
        os.close(by_hand)
        with linkrx.TunTap("lrxo2", mode, vnet_header=True) as queue:
            assert linkrx.probe(queue).vnet_header_size == 10
            assert queue.offload == 0
            assert not takes_super_packets("lrxo2")
        assert exists("lrxo2")


def test_no_super_packets_without_a_header() -> None:
    """Attaching without a header to a device with offloads switches them off."""
    flags = IFF_NO_PI | IFF_VNET_HDR | IFF_TAP
    with persistent("lrxo3", flags, header=12, offload=TSO), linkrx.TunTap("lrxo3") as queue:
        assert linkrx.probe(queue).vnet_header_size == 0
        assert not takes_super_packets("lrxo3")


@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_super_packets_without_a_header_are_reported(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """probe and open report a borrowed queue without a header of a device with offloads."""
    flags = IFF_NO_PI | (IFF_TAP if mode == "tap" else IFF_TUN)
    with persistent("lrxo5", flags | IFF_VNET_HDR, offload=TSO):
        fd = attach("lrxo5", flags)
        try:
            found = linkrx.probe(fd)
            assert (found.vnet_header_size, found.hardware_gso) == (0, True)
            linkrx.open(fd).close()
            assert "delivers super-packets without a virtio-net header" in caplog.text
            caplog.clear()
            fcntl.ioctl(fd, uapi.TUNSETOFFLOAD, 0)
            assert not linkrx.probe(fd).hardware_gso
            linkrx.open(fd).close()
            assert not caplog.text
        finally:
            os.close(fd)


def test_persistent_device_of_several_queues() -> None:
    """A persistent device exists after its queues are closed, and one of several queues resets its state too."""
    flags = IFF_NO_PI | IFF_VNET_HDR | IFF_TAP | IFF_MULTI_QUEUE
    with persistent("lrxo4", flags, header=24, offload=TSO):
        with linkrx.TunTap("lrxo4", multi_queue=True, vnet_header=True) as queue:
            assert linkrx.probe(queue).vnet_header_size == 10
            assert not takes_super_packets("lrxo4")
        assert exists("lrxo4")


# Privileges.


def test_missing_privilege() -> None:
    """Without CAP_NET_ADMIN, TunTap raises MissingPrivilege, a PermissionError that says what to type."""
    printed = run_without_capabilities(
        "import linkrx, os\n"
        "before = len(os.listdir('/proc/self/fd'))\n"
        "try:\n"
        "    linkrx.TunTap('lrxq0')\n"
        "except PermissionError as error:\n"
        "    print(type(error).__name__, error.errno, error.capability, error.remedy, error, sep='\\n')\n"
        "assert len(os.listdir('/proc/self/fd')) == before\n"
    )
    kind, code, capability, remedy, message = printed.split("\n")
    assert kind == "MissingPrivilege"
    assert int(code) in (errno.EPERM, errno.EACCES)
    # If not every user may open the device file, the error is about that.
    assert capability in ("CAP_NET_ADMIN", "access to the device")
    assert "sudo" in remedy
    assert capability in message
    assert remedy in message


def test_missing_privilege_for_an_interface() -> None:
    """Without CAP_NET_RAW opening an interface raises an error that names the capability, and leaves no descriptor."""
    printed = run_without_capabilities(
        "import linkrx, os\n"
        "before = len(os.listdir('/proc/self/fd'))\n"
        "try:\n"
        "    linkrx.open('lo')\n"
        "except linkrx.MissingPrivilege as error:\n"
        "    print(error)\n"
        "assert len(os.listdir('/proc/self/fd')) == before\n"
    )
    assert "packet socket on 'lo'" in printed
    assert "CAP_NET_RAW" in printed


@pytest.mark.parametrize("name", ["a/b", "a b", ".", "..", "a\0b", "a:b"])
def test_names_that_the_kernel_refuses(name: str) -> None:
    """An invalid interface name raises ValueError, which quotes it, before a file is opened."""
    with pytest.raises(ValueError, match="cannot be the name of an interface") as caught:
        linkrx.TunTap(name)
    assert repr(name) in str(caught.value)


def test_a_transmit_filter_of_a_previous_owner_is_removed() -> None:
    """Attaching to a persistent TAP removes the address filter that its previous owner left."""
    from pyroute2 import IPRoute

    fd = os.open(tuntap.DEVICE, os.O_RDWR)
    fcntl.ioctl(fd, uapi.TUNSETIFF, struct.pack("16sH22x", b"lrxfilter", 0x1002))
    fcntl.ioctl(fd, TUNSETPERSIST, 1)
    only_another = struct.pack("HH6s", 0, 1, b"\2\xff\xff\xff\xff\xff")
    fcntl.ioctl(fd, uapi.TUNSETTXFILTER, only_another)
    os.close(fd)
    with linkrx.TunTap("lrxfilter") as tap, linkrx.open(tap) as rx, IPRoute() as route:
        fcntl.ioctl(tap.fileno(), TUNSETPERSIST, 0)
        route.link("set", index=socket.if_nametoindex("lrxfilter"), state="up")
        with injector_on("lrxfilter") as sender:
            sender.send(bytes.fromhex("020000000001") + bytes(6) + b"\x88\xb5" + bytes(50))
        assert len(rx.recv(10)) == 64
        assert rx.stats().kernel_drops == 0


def test_a_second_queue_leaves_the_first_its_offloads() -> None:
    """Opening another queue of a device in use does not change the offloads of the first queue."""
    with (
        linkrx.TunTap("lrxmq", multi_queue=True, vnet_header=True, offload=True) as first,
        linkrx.TunTap("lrxmq", multi_queue=True, vnet_header=True),
    ):
        assert first.offload & tuntap.Offload.TSO4
        assert takes_super_packets("lrxmq")


def test_the_name_of_a_renamed_device() -> None:
    """A queue has the present name of its device. After the device is deleted, and after close, it has the name at open."""
    for delete in (True, False):
        with linkrx.TunTap("lrxr0") as queue:
            device = Device("lrxr0")
            device.rename("lrxr1")
            assert queue.name == "lrxr1"
            assert "lrxr1" in repr(queue)
            if delete:
                device.delete()
                assert queue.name == "lrxr0"
        assert queue.name == "lrxr0"
