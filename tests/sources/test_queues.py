"""Queues of devices that have, or had, other queues: TunTap checks their settings, and removes programs. Also macvtap queues."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pyroute2 import IPRoute, NetlinkError
from support.run import that_take

import linkrx
from linkrx.kernel.ethtool import takes_super_packets
from linkrx.kernel.uapi import IFF_MULTI_QUEUE, IFF_TAP, TUNSETIFF, TUNSETSTEERINGEBPF
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import LOCAL, REMOTE, veth

pytestmark = pytest.mark.usefixtures("devices")

TUNSETPERSIST = 0x400454CB  # linux/if_tun.h


@pytest.mark.parametrize("has", [False, True])
def test_a_second_queue_with_another_header(has: bool) -> None:
    """A setting that TUNSETIFF ignores on a second queue raises an error that says what to request. The first queue is not changed."""
    with linkrx.TunTap("second", multi_queue=True, vnet_header=has) as first:
        with pytest.raises(linkrx.UnsupportedOption, match=f"Open this one with vnet_header={has}"):
            linkrx.TunTap("second", multi_queue=True, vnet_header=not has)
        assert linkrx.probe(first).vnet_header_size == (10 if has else 0)
        with linkrx.TunTap("second", multi_queue=True, vnet_header=has) as second:
            assert linkrx.probe(second).vnet_header_size == (10 if has else 0)


@pytest.mark.parametrize("offload", [False, True])
def test_a_second_queue_leaves_the_offloads_alone(offload: bool) -> None:
    """Offloads belong to the device. A second queue does not change them, and gives the current ones."""
    with linkrx.TunTap("second", multi_queue=True, vnet_header=True, offload=offload):
        before = takes_super_packets("second")
        assert before is offload
        if not offload:
            with pytest.raises(linkrx.UnsupportedOption, match="Open the first queue with offload=True"):
                linkrx.TunTap("second", multi_queue=True, vnet_header=True, offload=True)
        with linkrx.TunTap("second", multi_queue=True, vnet_header=True) as second:
            assert bool(second.offload) is offload
        assert takes_super_packets("second") is before


def test_a_second_queue_of_a_device_with_packet_information() -> None:
    """A second queue is refused if the device has packet information, because it would have it too."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"second", IFF_TAP | IFF_MULTI_QUEUE))
        with pytest.raises(linkrx.UnsupportedOption, match="have packet information"):
            linkrx.TunTap("second", multi_queue=True)
    finally:
        os.close(fd)


def _program_that_returns(number: int) -> int:
    """A loaded BPF program: bpf(2)."""
    code = struct.pack("=BBhiBBhi", 0xB7, 0, 0, number, 0x95, 0, 0, 0)  # r0 = number; exit
    instructions, terms = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    load, socket_filter = 5, 1
    attributes = struct.pack(
        "=IIQQ", socket_filter, 2, ctypes.addressof(instructions), ctypes.addressof(terms)
    ).ljust(128, b"\0")
    numbers = {"x86_64": 321, "aarch64": 280}
    loaded: int = ctypes.CDLL(None).syscall(numbers[os.uname().machine], load, attributes, len(attributes))
    return loaded


@pytest.mark.superuser
def test_a_program_that_steers_is_taken_off() -> None:
    """The only queue of a persistent device removes the steering program of an earlier owner."""
    program = _program_that_returns(1)
    if program < 0:
        pytest.skip("needs bpf(2)")
    try:
        with linkrx.TunTap("steered", multi_queue=True) as owner:
            fcntl.ioctl(owner, TUNSETPERSIST, 1)
            fcntl.ioctl(owner, TUNSETSTEERINGEBPF, struct.pack("i", program))
        with (
            linkrx.TunTap("steered", multi_queue=True) as first,
            linkrx.TunTap("steered", multi_queue=True) as second,
            injector_on("steered") as injector,
            linkrx.open(first) as one,
            linkrx.open(second) as other,
        ):
            fcntl.ioctl(first, TUNSETPERSIST, 0)
            Device("steered").set(state="up")
            for port in range(64):
                udp = struct.pack(
                    "!BBHHHBBH4s4sHHHH", 0x45, 0, 28, 0, 0, 9, 17, 0, b"1234", b"5678", port, 9, 8, 0
                )
                injector.send(LOCAL + REMOTE + b"\x08\x00" + udp)
            counts = [
                sum(p.protocol == 0x0800 for batch in rx.batches(0.05) for p in batch) for rx in (one, other)
            ]
        assert sum(counts) == 64
        assert min(counts) > 0
    finally:
        os.close(program)


@contextmanager
def macvtap(over: str, name: str) -> Iterator[int]:
    """A queue of a macvtap device. The number of its character device is in sysfs, which may belong to another namespace."""
    with IPRoute() as route:
        (over_index,) = route.link_lookup(ifname=over)
        try:
            route.link("add", ifname=name, kind="macvtap", link=over_index, macvtap_mode=4)
        except NetlinkError as error:
            pytest.skip(f"needs macvtap: {error}")
        route.link("set", index=route.link_lookup(ifname=name)[0], state="up")
    # The number is read and not tried, because opening the device of another namespace makes a queue of it.
    show = "mount -t sysfs none /sys; cat /sys/class/net/$1/macvtap/*/dev"
    shown = subprocess.run(
        ["unshare", "--mount", "sh", "-euc", show, "_", name], capture_output=True, text=True, check=True
    )
    major, minor = map(int, shown.stdout.split(":"))
    with tempfile.TemporaryDirectory() as folder:
        os.mknod(f"{folder}/queue", 0o20600, os.makedev(major, minor))
        fd = os.open(f"{folder}/queue", os.O_RDWR | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.superuser
@pytest.mark.parametrize("backend", that_take("tap"))
def test_a_macvtap_queue(backend: str) -> None:
    """A macvtap queue is a source like a TAP queue without packet information, and ends when its device is deleted."""
    with veth() as (near, far), injector_on(far) as injector, macvtap(near, "mvt0") as fd:
        found = linkrx.probe(fd)
        assert (found.kind, found.packet_info, found.interface) == ("tap", False, "mvt0")
        with linkrx.open(fd, backend=backend) as rx:
            injector.send(b"\xff" * 6 + REMOTE + b"\x88\xb5 for all")
            packet = rx.recv(10)
            while packet.protocol != 0x88B5:
                packet = rx.recv(10)
            assert bytes(packet.data)[:8] == b" for all"
            Device("mvt0").delete()
            assert list(rx) == []
            assert rx.end is linkrx.End.LINK_GONE
