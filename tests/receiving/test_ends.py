"""Ends, and events that are no end: peers that close, links that go down, devices that are deleted."""

from __future__ import annotations

import os
import socket

import pytest
from support.run import that_take

import linkrx
from linkrx.testing.devices import Device, injector_on
from linkrx.testing.rigs import LOCAL, REMOTE, veth
from linkrx.testing.waiting import collect

HEADER = LOCAL + REMOTE + b"\x08\x00"
PACKET_BACKENDS = that_take("packet")
QUEUE_BACKENDS = that_take("tap")


@pytest.fixture(params=that_take("unix_seqpacket"))
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that accepts sockets of all kinds."""
    name: str = request.param
    return name


def sizes(rx: linkrx.Dispatcher) -> list[int]:
    """The data length of every packet until the end."""
    return [len(packet.data) for packet in rx]


# Peers.


def test_a_peer_that_closes_is_eof_once_behind_its_data(
    backend: str, seqpacket: tuple[socket.socket, socket.socket]
) -> None:
    """After the peer closed, queued records come first, also behind an empty one. Then every call reports EOF."""
    receiver, sender = seqpacket
    with linkrx.open(receiver, lambda *_: None, backend=backend) as rx:
        for body in (b"a", b"bc"):
            sender.send(HEADER + body)
        sender.send(b"")
        sender.send(HEADER + b"def")
        sender.close()
        assert sizes(rx) == [1, 2, 3]
        assert rx.end is linkrx.End.EOF
        assert rx.dispatch() is False
        assert rx.stats().empty == 1
        with pytest.raises(EOFError, match="peer closed"):
            rx.recv()


def test_a_batch_that_ends_in_an_empty_record_is_no_end(
    backend: str, seqpacket: tuple[socket.socket, socket.socket]
) -> None:
    """An empty record at the end of a batch is counted if data follows it, also after the peer has closed."""
    receiver, sender = seqpacket
    with linkrx.open(receiver, backend=backend, batch_size=2) as rx:
        sender.send(HEADER + b"a")
        sender.send(b"")
        sender.send(HEADER + b"b")
        sender.close()
        assert sizes(rx) == [1, 1]
        assert rx.stats().empty == 1
        assert rx.end is linkrx.End.EOF


def test_an_empty_record_before_records_that_wait_for_room(
    backend: str, seqpacket: tuple[socket.socket, socket.socket]
) -> None:
    """Records that a backend holds are delivered before the end, also behind an empty record."""
    receiver, sender = seqpacket
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
    sizes_sent = [150_000] * 6 + [0, 150_000, 100]
    for size in sizes_sent:
        sender.send(bytes(size))
    sender.close()
    with linkrx.open(receiver, backend=backend) as rx:
        assert [len(packet) for packet in rx] == [size for size in sizes_sent if size]
        assert rx.stats().empty == 1
        assert rx.end is linkrx.End.EOF


def test_empty_records_alone_are_no_end(backend: str, seqpacket: tuple[socket.socket, socket.socket]) -> None:
    """While the peer is open, empty records are counted and reception continues."""
    receiver, sender = seqpacket
    with linkrx.open(receiver, lambda *_: None, backend=backend) as rx:
        for _ in range(5):
            sender.send(b"")
        assert rx.dispatch(1) is True
        assert rx.stats().empty == 5
        assert rx.end is None


def test_a_peer_that_closes_with_our_data_unread(
    backend: str, seqpacket: tuple[socket.socket, socket.socket]
) -> None:
    """If a peer closes with unread data, linkrx skips the ECONNRESET and delivers the peer's records, then EOF."""
    receiver, sender = seqpacket
    receiver.send(b"never read")
    sender.send(HEADER + b"last words")
    sender.close()
    with linkrx.open(receiver, backend=backend) as rx:
        assert sizes(rx) == [10]
        assert rx.end is linkrx.End.EOF


def test_a_datagram_peer_that_closes_is_no_end(backend: str) -> None:
    """The close of a datagram socket's peer does not end reception."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender, linkrx.open(receiver, lambda *_: None, backend=backend) as rx:
        sender.send(HEADER)
        sender.close()
        assert rx.dispatch(1) is True
        assert rx.dispatch(0.01) is True
        assert rx.end is None
        assert rx.stats().packets == 1


def test_a_pipe_whose_writer_closes_is_eof(backend: str) -> None:
    """A packet pipe ends after its last writing end was closed and its packets were delivered."""
    reader, writer = os.pipe2(os.O_DIRECT)
    try:
        if backend == "recvmmsg":
            with pytest.raises(linkrx.UnsupportedSource, match="sockets only"):
                linkrx.open(reader, backend=backend)
            os.close(writer)
            return
        with linkrx.open(reader, backend=backend) as rx:
            os.write(writer, HEADER + b"xy")
            os.close(writer)
            assert sizes(rx) == [2]
            assert rx.end is linkrx.End.EOF
    finally:
        os.close(reader)


@pytest.mark.usefixtures("devices")
def test_icmp_errors_on_udp_pass(backend: str) -> None:
    """ECONNREFUSED from an earlier send on the same UDP socket does not end reception."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(("127.0.0.1", 0))
        sender.bind(("127.0.0.1", 0))
        address = sender.getsockname()
        sender.close()
        receiver.connect(address)
        receiver.send(b"nobody listens")
        with linkrx.open(receiver, lambda *_: None, backend=backend) as rx:
            assert rx.dispatch(0.01) is True
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
                again.bind(address)
                again.sendto(HEADER + b"now", receiver.getsockname())
                assert len(rx.recv(10).data) == 3


# Links.


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", PACKET_BACKENDS)
def test_packets_queued_when_the_link_goes_down_are_delivered(backend: str) -> None:
    """The kernel reports that a link is down before it returns queued packets. None of these is lost."""
    with veth() as (near, far), injector_on(far) as injector, linkrx.open(near, backend=backend) as rx:
        device = Device(near, far)
        for _ in range(5):
            injector.send(HEADER)
        device.set_down()
        assert len(collect(rx, 5)) == 5
        assert list(rx.batches(0.01)) == []


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", PACKET_BACKENDS)
def test_packets_queued_when_the_interface_is_deleted_are_delivered(backend: str) -> None:
    """After an interface was deleted, queued packets are delivered before the end."""
    with veth() as (near, far), injector_on(far) as injector, linkrx.open(near, backend=backend) as rx:
        for _ in range(5):
            injector.send(HEADER)
        Device(near).delete()
        assert sum(1 for _ in rx) == 5
        assert rx.end is linkrx.End.LINK_GONE


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("backend", PACKET_BACKENDS)
def test_a_link_that_is_down_at_open(backend: str) -> None:
    """A dispatcher on an interface that is down at open receives once it is up, counts no link down, and notices its deletion."""
    with veth() as (near, far):
        device = Device(near, far)
        device.set_down()
        with linkrx.open(near, lambda *_: None, backend=backend) as rx, injector_on(far) as injector:
            assert rx.dispatch(0.03) is True
            assert rx.stats().link_downs == 0
            device.set_up()
            injector.send(HEADER)
            assert rx.recv(10)
            device.set_down()
            device.delete()
            assert rx.run() is linkrx.End.LINK_GONE
