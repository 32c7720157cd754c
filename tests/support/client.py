"""A typed program that uses every public name of linkrx. Type checkers must accept it. It is not run."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import linkrx


def refused(source: int | str | linkrx.HasFileno) -> str | None:
    """The reason why linkrx cannot receive from a source, or None."""
    try:
        found: linkrx.Capabilities = linkrx.probe(source)
        choice: linkrx.Choice = linkrx.choose(
            source, backend="auto", timestamps=True, fanout=("auto", "hash"), protocol=0x88CC
        )
    except (linkrx.UnsupportedSource, linkrx.UnsupportedOption, linkrx.BackendUnavailable) as error:
        return str(error)
    except linkrx.MissingPrivilege as error:
        return f"{error.capability}: {error.remedy}"
    verdicts: tuple[linkrx.Verdict, ...] = choice.verdicts
    return None if found.mtu or choice.backend else verdicts[0].reason + choice.explain()


def up() -> list[str]:
    """The interfaces that are set up."""
    found: tuple[linkrx.Interface, ...] = linkrx.interfaces()
    return [one.name for one in found if one.up and one.state != "down" and one.link_type == 1]


def names() -> list[str]:
    """The backends of this host."""
    infos: tuple[linkrx.BackendInfo, ...] = linkrx.backends()
    return [info.name for info in infos if info.supported and "latency" in info.honours]


def describe(packet: linkrx.Packet) -> Iterator[str]:
    """The metadata of a packet, as text."""
    vlan: linkrx.Vlan | None = packet.vlan
    if vlan is not None:
        yield f"{vlan.tci} {vlan.tpid}"
    vnet: linkrx.VnetHeader | None = packet.vnet
    if vnet is not None and vnet.gso == linkrx.Gso.TCPV4:
        yield f"{vnet.gso_size}"
    yield f"{packet.protocol:#x} {packet.data.nbytes} {packet.timestamp_ns} {bytes(packet.copy())!r}"


def outgoing(batch: linkrx.Batch) -> int:
    """How many packets of a batch this host sent."""
    return sum(bool(flags & linkrx.Flags.OUTGOING) for flags in batch.flags)


def deliver(remote: bytes | None, local: bytes | None, protocol: int, packet: linkrx.Packet) -> None:
    """Show one packet."""
    print(remote, local, protocol, *describe(packet))


async def watch(rx: linkrx.Dispatcher) -> None:
    """Both kinds of asynchronous iteration."""
    async for batch in rx.batches(timeout=1.0):
        print(outgoing(batch))
    async for packet in rx:
        print(*describe(packet))


def receive(source: socket.socket | linkrx.TunTap, options: linkrx.OpenOptions) -> linkrx.End | None:
    """Receive with every call."""
    call: linkrx.Deliver = deliver
    with linkrx.open(source, call, backend="recvmmsg", **options) as rx:
        try:
            rx.run()
            limited: linkrx.End | None = rx.run(count=10, duration=1.5)
            print(limited, [len(batch) for batch in rx.batches(1, duration=0.5)])
            rx.send(b"frame")
            print(rx.send_batch([bytearray(b"frame"), rx.recv()]), rx.send_batch(next(iter(rx.batches()))))
            rx.stop(flush=True)
            batches: linkrx.Batches = rx.batches()
            frames = [batch.memory[batch.starts[0] :] for batch in batches]
            print(frames, rx.recv(0.1), rx.drain(), rx.dispatch(1), rx.fileno())
        except linkrx.Ended as error:
            print(error.errno, rx.end)
        except (linkrx.Busy, linkrx.Closed, linkrx.LinkrxError):
            rx.stop()
        wanted: linkrx.FilterLike = linkrx.parse_ddd("1\n6 0 0 262144\n")
        rx.set_filter(wanted)
        stats: linkrx.Stats = rx.stats()
        print(stats.kernel_drops, rx.choice.explain(), rx.capabilities.kind)
        asyncio.run(watch(rx))
        return rx.end


def recorded(path: Path, file: linkrx.BinaryFile) -> list[bytes]:
    """The packets of capture files."""
    try:
        with linkrx.open(path) as rx, linkrx.open(linkrx.CaptureFile(file)) as other:
            return [packet.tobytes() for packet in (*rx, *other)]
    except linkrx.DamagedCapture as error:
        print(error.offset)
        return []


def record(rx: linkrx.Dispatcher, path: Path, file: linkrx.WritableFile) -> int:
    """Record received packets twice."""
    with linkrx.PcapWriter(path, source=rx) as out, linkrx.PcapWriter(file, format="pcap") as other:
        for batch in rx.batches(1):
            out.write(batch)
            other.write(batch[0])
        try:
            out.close()
        except linkrx.RecordingFailed as error:
            print(error.packets, error.torn, error.errno)
        return out.packets + other.packets


def main() -> None:
    """Use a device and a buffer ladder."""
    buffer = linkrx.IovecBuffer(linkrx.BUFFER_SIZES)
    with linkrx.TunTap("tap7", vnet_header=True, offload=True) as tap:
        print(tap.offload & linkrx.Offload.TSO4, tap.name, buffer.next_iovecs(), refused(tap))
        receive(tap, {"batch_size": 64, "latency": 0.5, "segment": True})
