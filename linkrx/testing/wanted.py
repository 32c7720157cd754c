"""The frames that a test sends, the packets that it expects, and the message when an expected packet does not come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import SupportsBytes, TypeAlias, TypeGuard, cast

from linkrx.kernel import bpf
from linkrx.packets import Packet
from linkrx.sources import filters
from linkrx.sources.capabilities import Capabilities
from linkrx.testing import differences

# A frame: bytes, or an object that bytes() accepts, such as a packet of linkrx, scapy or dpkt.
Frame: TypeAlias = bytes | bytearray | memoryview | SupportsBytes
# An expected packet: a frame, a predicate of a packet, or an expression in tcpdump's language.
Wanted: TypeAlias = Frame | Callable[[Packet], object] | str


def is_frame(thing: object) -> TypeGuard[Frame]:
    """Whether an object is one frame."""
    return isinstance(thing, bytes | bytearray | memoryview | Packet) or hasattr(thing, "__bytes__")


def frames_of(frames: Frame | Iterable[Frame]) -> Iterator[bytes]:
    """The bytes of each frame. A packet of scapy counts as one frame, although it is iterable."""
    several = [frames] if is_frame(frames) else cast(Iterable[Frame], frames)
    for frame in several:
        if not is_frame(frame):
            raise TypeError(
                f"a frame is bytes, or an object that bytes() accepts, not {type(frame).__name__}"
            )
        yield bytes(frame)


def matcher_of(wanted: Wanted, found: Capabilities, ethernet: bool) -> Callable[[Packet], object]:
    """A predicate for wanted packets. `found` describes the interface that they come from.

    Raises ValueError for an invalid expression, and UnsupportedOption if libpcap is missing.
    """
    if isinstance(wanted, str):
        return _filter(wanted, found, ethernet)
    if is_frame(wanted):
        frame = bytes(wanted)
        return lambda packet: packet.tagged() == frame
    if callable(wanted):
        return wanted
    raise TypeError(
        f"expect a frame, a predicate of a packet, or an expression as in 'udp port 53', not {type(wanted).__name__}"
    )


def _filter(expression: str, found: Capabilities, ethernet: bool) -> Callable[[Packet], object]:
    """A predicate for packets that pass an expression of `linkrx.open(filter=)`."""
    filters.checked(expression)
    program = filters.compiled(expression, found, ethernet=ethernet)

    def passes(packet: Packet) -> bool:
        asked = bpf.Filtered(
            frame=packet.frame,
            wire_length=packet.wire_length,
            link_header=len(packet.link_header),
            interface=packet.interface,
            outgoing=packet.outgoing,
            vlan=packet.vlan,
        )
        return bpf.kept(program.instructions, asked, tags=program.tags) > 0

    return passes


def title_of(wanted: Wanted) -> str:
    """A description of the wanted packet."""
    if isinstance(wanted, str):
        return f"packet that passes {wanted!r}"
    if callable(wanted):
        return f"packet for which {getattr(wanted, '__name__', repr(wanted))} is true"
    return "frame like the one given"


def failure(
    wanted: Wanted, packets: Sequence[Packet], when: str, interface: str, ethernet: bool
) -> Iterator[str]:
    """The lines of a failure message: the packet that an interface did not get, and the packets that it got."""
    came = [packet.tagged() for packet in packets]
    frame = bytes(wanted) if is_frame(wanted) else None
    if frame is None:
        yield f"{interface} did not get a {title_of(wanted)} {when}."
    else:
        yield f"{interface} did not get this frame {when}:"
        yield f"  {differences.line_of(frame, ethernet)}"
    if not came:
        yield "Nothing came at all."
        return
    yield "What came instead:"
    yield from differences.listed(came, ethernet)
    if frame is not None:
        near = differences.most_similar(frame, came)
        yield f"Where number {near + 1} (+) is not what was expected (-):"
        yield from differences.difference(frame, came[near])
        if packets[near].checksum_unfinished:
            yield "Its checksum is unfinished, because the sender left it to a device: call set_offloads(False) on the sender."
