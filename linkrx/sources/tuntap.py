"""Opens a queue of a TAP or TUN device."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import closing, suppress
from enum import IntFlag
from types import TracebackType
from typing import Self

from linkrx.errors import LinkrxError, MissingPrivilege, UnsupportedOption
from linkrx.kernel import remedies
from linkrx.kernel.ethtool import takes_super_packets
from linkrx.kernel.rtnetlink import Link, RouteSocket
from linkrx.kernel.sockets import device_of, interface_name
from linkrx.kernel.uapi import (
    IFF_MULTI_QUEUE,
    IFF_NO_PI,
    IFF_TAP,
    IFF_TUN,
    IFF_VNET_HDR,
    IFNAMSIZ,
    IFREQ_BYTES,
    TUNGETIFF,
    TUNSETFILTEREBPF,
    TUNSETIFF,
    TUNSETOFFLOAD,
    TUNSETSTEERINGEBPF,
    TUNSETTXFILTER,
    TUNSETVNETHDRSZ,
    VNET_HEADER_BYTES,
)

DEVICE = "/dev/net/tun"


class Offload(IntFlag):
    """The work that a device leaves to the reader of its queue: TUN_F_* in linux/if_tun.h."""

    CSUM = 0x01
    TSO4 = 0x02
    TSO6 = 0x04
    TSO_ECN = 0x08
    USO4 = 0x20
    USO6 = 0x40


_TSO = Offload.CSUM | Offload.TSO4 | Offload.TSO6 | Offload.TSO_ECN
_USO = Offload.USO4 | Offload.USO6  # since Linux 6.2; the kernel takes both or none


class TunTap:
    """One open queue of a TAP (Ethernet frames) or TUN (IP packets) device: what to give to `linkrx.open`.

    With an empty name the kernel chooses one. The device is made if it does not exist. It is deleted when its last queue is closed,
    unless it is persistent. Attaching to an existing device without open queues resets the settings of an earlier owner:
    offloads, the size of the virtio-net header, filters, and programs that steer packets to queues. A further queue changes
    nothing on the device. If the device does not have the wanted settings, the queue is refused with UnsupportedOption.

    `offload` is the `Offload` that the kernel accepted. It is empty without `offload=True`. The queue is non-blocking. Write a
    frame with `os.write(tap.fileno(), frame)`.
    """

    def __init__(
        self,
        name: str = "",
        mode: str = "tap",
        *,
        multi_queue: bool = False,
        vnet_header: bool = False,
        offload: bool = False,
    ) -> None:
        """Raises MissingPrivilege, ValueError for an invalid name or mode, UnsupportedOption, and the kernel's OSError."""
        self._fd = -1
        if mode not in ("tap", "tun"):
            raise ValueError(f"mode {mode!r}: give 'tap' or 'tun'")
        wanted = interface_name(name) if name else b""
        if offload and not vnet_header:
            raise ValueError("offload=True needs vnet_header=True: the header describes the super-packets")
        flags = IFF_NO_PI | (IFF_TAP if mode == "tap" else IFF_TUN)
        flags |= IFF_MULTI_QUEUE if multi_queue else 0
        flags |= IFF_VNET_HDR if vnet_header else 0
        self.mode = mode
        self.offload = Offload(0)
        self._fd = _open_device()
        try:
            self._name = _attach(self._fd, wanted, flags)
            device = _device(self.name)
            _check_headers(self._fd, self.name, vnet_header, device)
            # Offloads and filters belong to the device. If other queues are open, they are in use.
            if not multi_queue or device is None or device.queues == 1:
                _reset(self._fd, mode)
                self.offload = _set_offload(self._fd, offload)
            else:
                self.offload = _offload_of(self.name, offload)
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The present name of the device. After it was deleted, or the queue closed, the name at open."""
        return (self._fd >= 0 and device_of(self._fd)) or self._name

    def fileno(self) -> int:
        """The file descriptor of the queue; -1 after close."""
        return self._fd

    def close(self) -> None:
        """Close the queue. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        return f"<TunTap {self.mode} {self.name} {'closed' if self._fd < 0 else f'fd {self._fd}'}>"


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise MissingPrivilege(
            f"opening {DEVICE}",
            "access to the device",
            remedies.device_file(DEVICE),
            error.errno,
        ) from error
    except FileNotFoundError as error:
        raise LinkrxError(
            f"{DEVICE} does not exist: load the driver with `sudo modprobe tun`; in a container add "
            f"`--device {DEVICE}`"
        ) from error


def _attach(fd: int, wanted: bytes, flags: int) -> str:
    name = os.fsdecode(wanted)
    request = struct.pack(f"{IFNAMSIZ}sH22x", wanted, flags)
    try:
        answer = fcntl.ioctl(fd, TUNSETIFF, request)
    except PermissionError as error:
        raise MissingPrivilege(
            f"attaching to the device {name!r}" if name else "making a device",
            "CAP_NET_ADMIN",
            remedies.capability("CAP_NET_ADMIN"),
            error.errno,
        ) from error
    except OSError as error:
        why = {
            errno.EBUSY: "its only queue is open already; open all queues with multi_queue=True to share it",
            errno.EINVAL: "it exists as another kind of device, or with another mode or multi_queue setting",
        }.get(error.errno or 0, "the kernel refused TUNSETIFF")
        raise OSError(error.errno, f"attaching to the device {name!r}: {error.strerror}; {why}") from error
    return os.fsdecode(answer[:IFNAMSIZ].rstrip(b"\0"))


def _device(name: str) -> Link | None:
    with closing(RouteSocket()) as route:  # TUNSETIFF finds devices in this namespace only
        return route.link(name=name)


def _check_headers(fd: int, name: str, vnet_header: bool, device: Link | None) -> None:
    """Check the headers in front of frames. They belong to the device: TUNSETIFF on a second queue ignores the wanted flags."""
    answer = fcntl.ioctl(fd, TUNGETIFF, bytes(IFREQ_BYTES))
    has_header = bool(struct.unpack_from("H", answer, IFNAMSIZ)[0] & IFF_VNET_HDR)
    if has_header != vnet_header:
        raise UnsupportedOption(
            f"vnet_header={vnet_header} on {name}: its other queues {'have' if has_header else 'have no'} virtio-net headers, and "
            f"all queues of a device are alike. Open this one with vnet_header={has_header}"
        )
    if device is not None and device.packet_info:
        raise UnsupportedOption(
            f"{name}: its other queues have packet information (struct tun_pi) in front of frames, so this one would have it "
            "too, but TunTap opens queues without. Open the first queue with IFF_NO_PI"
        )


def _reset(fd: int, mode: str) -> None:
    """Reset the settings that a persistent device keeps after its queues are closed."""
    fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_BYTES))
    if mode == "tap":
        fcntl.ioctl(fd, TUNSETTXFILTER, bytes(4))  # struct tun_filter: no flags, no addresses; TAP only
    for what in (TUNSETFILTEREBPF, TUNSETSTEERINGEBPF):
        with suppress(OSError):  # EINVAL before Linux 4.16, which has no such programs
            fcntl.ioctl(fd, what, struct.pack("i", -1))


def _offload_of(name: str, wanted: bool) -> Offload:
    """The offloads that another queue has set. Raises UnsupportedOption if it has set none and they are wanted."""
    if takes_super_packets(name):
        return _TSO
    if wanted:
        raise UnsupportedOption(
            f"offload=True on {name}: its other queues were opened without, and all queues of a device share its offloads. Open "
            "the first queue with offload=True"
        )
    return Offload(0)


def _set_offload(fd: int, wanted: bool) -> Offload:
    """Set the offloads, or as many as the kernel supports. Returns those that it accepted."""
    for mask in (_TSO | _USO, _TSO, Offload.CSUM, Offload(0)) if wanted else (Offload(0),):
        try:
            fcntl.ioctl(fd, TUNSETOFFLOAD, int(mask))
        except OSError as error:
            if error.errno != errno.EINVAL or not mask:
                raise
        else:
            return mask
    raise AssertionError("the mask 0 is always accepted or raises")
