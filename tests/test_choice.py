"""The choice of a backend: a pure function of backends and capabilities, and the environment variables."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support.run import that_take

import linkrx
from linkrx import _core
from linkrx.backend import Backend
from linkrx.backends.os_readv import OsReadv
from linkrx.backends.packet_mmap import PacketMmap
from linkrx.backends.readv import Readv
from linkrx.backends.recvmmsg import Recvmmsg
from linkrx.choice import decide
from linkrx.factory import from_environment
from linkrx.sources.capabilities import Capabilities
from linkrx.sources.options import Options
from linkrx.testing.resources import settings_of
from linkrx.testing.rigs import veth

TAP = Capabilities("tap", socket=False, largest_frame=65_664, ethernet=True, interface="tap0")
DATAGRAM = Capabilities("unix_dgram", socket=True, largest_frame=262_144)
PACKET = Capabilities("packet", socket=True, largest_frame=262_144, interface="eth0", owned=True)
BORROWED = replace(PACKET, owned=False)


def info(backend: type[Backend], reason: str | None = None) -> linkrx.BackendInfo:
    """The BackendInfo of a backend on some host."""
    return linkrx.BackendInfo(backend.name, reason is None, reason, backend.rank, backend.honours, backend)


ALL = [info(PacketMmap), info(Recvmmsg), info(Readv), info(OsReadv)]
NO_CORE = [*(info(backend, "no core") for backend in (PacketMmap, Recvmmsg, Readv)), info(OsReadv)]


class OnlyWhenNamed(OsReadv):
    """A backend of the highest rank that auto does not take for borrowed sources."""

    name = "only_when_named"
    rank = 100

    @classmethod
    def discouraged(cls, capabilities: Capabilities) -> str | None:
        """Discouraged, unless linkrx opened the source."""
        return None if capabilities.owned else "it changes the socket"


@pytest.mark.parametrize(
    ("capabilities", "infos", "ladder"),
    [
        (TAP, ALL, ("readv", "os_readv")),
        (DATAGRAM, ALL, ("recvmmsg", "readv", "os_readv")),
        (PACKET, ALL, ("packet_mmap", "recvmmsg", "readv", "os_readv")),
        (BORROWED, ALL, ("recvmmsg", "readv", "os_readv")),
        (TAP, NO_CORE, ("os_readv",)),
        (DATAGRAM, NO_CORE, ("os_readv",)),
        (
            PACKET,
            [info(OnlyWhenNamed), *ALL],
            ("only_when_named", "packet_mmap", "recvmmsg", "readv", "os_readv"),
        ),
        (DATAGRAM, [info(OnlyWhenNamed), *ALL], ("recvmmsg", "readv", "os_readv")),
    ],
)
def test_auto(capabilities: Capabilities, infos: list[linkrx.BackendInfo], ladder: tuple[str, ...]) -> None:
    """The ladder has all backends that accept the source, best first, and the first is chosen."""
    choice = decide(capabilities, infos, Options())
    assert choice.ladder == ladder
    assert choice.backend == ladder[0]
    assert choice == decide(capabilities, infos, Options())


def test_it_explains_itself() -> None:
    """explain() has one line per backend: chosen, accepted, or refused with the reason."""
    assert decide(TAP, ALL, Options()).explain().splitlines() == [
        "packet_mmap  refused   packet_mmap puts a ring on AF_PACKET sockets only, and the source is a TAP queue on tap0",
        "recvmmsg     refused   recvmmsg reads sockets only, and the source is a TAP queue on tap0",
        "readv        chosen    the best that takes the source",
        "os_readv     accepted  would do, but readv is better",
    ]
    assert decide(DATAGRAM, [info(OnlyWhenNamed), *NO_CORE], Options()).explain() == (
        "only_when_named  accepted  only when named: it changes the socket\n"
        "packet_mmap      refused   no core\n"
        "recvmmsg         refused   no core\n"
        "readv            refused   no core\n"
        "os_readv         chosen    the best that takes the source"
    )


def test_a_named_backend_is_that_one() -> None:
    """A named backend that accepts the source is chosen, without a fallback, and the others have the verdict that they were not named."""
    choice = decide(DATAGRAM, ALL, Options(), "os_readv")
    assert choice.ladder == ("os_readv",)
    assert [(v.backend, v.outcome) for v in choice.verdicts] == [
        ("packet_mmap", "refused"),
        ("recvmmsg", "accepted"),
        ("readv", "accepted"),
        ("os_readv", "chosen"),
    ]
    assert "os_readv was named" in choice.verdicts[1].reason
    assert decide(DATAGRAM, [info(OnlyWhenNamed)], Options(), "only_when_named").backend == "only_when_named"


@pytest.mark.parametrize(
    ("capabilities", "infos", "name", "error", "said"),
    [
        (DATAGRAM, NO_CORE, "recvmmsg", linkrx.BackendUnavailable, "recvmmsg is not available here: no core"),
        (
            TAP,
            ALL,
            "recvmmsg",
            linkrx.UnsupportedSource,
            "recvmmsg does not take this source: .* TAP queue on tap0",
        ),
        (
            TAP,
            ALL,
            "nonesuch",
            linkrx.BackendUnavailable,
            "no backend 'nonesuch': there are packet_mmap, recvmmsg, readv, os_readv",
        ),
    ],
)
def test_a_named_backend_that_cannot(
    capabilities: Capabilities, infos: list[linkrx.BackendInfo], name: str, error: type[Exception], said: str
) -> None:
    """A named backend that refuses the source raises an error with the reason. No other backend is taken."""
    with pytest.raises(error, match=said):
        decide(capabilities, infos, Options(), name)


@pytest.mark.parametrize("option", ["timestamps", "outgoing"])
def test_options_that_no_backend_honours(option: str) -> None:
    """An option that no backend can honour is refused with each backend's reason, for a named backend and for auto."""
    infos = [info(Readv), info(OsReadv)]
    wanted: Any = {option: True}
    with pytest.raises(
        linkrx.UnsupportedOption, match=f"(?s)with {option}=True.*readv cannot honour {option}=True"
    ):
        decide(PACKET, infos, Options(**wanted))
    with pytest.raises(linkrx.UnsupportedOption, match=f"readv cannot honour {option}=True.* on eth0"):
        decide(PACKET, infos, Options(**wanted), "readv")


def test_auto_passes_over_what_cannot_honour_an_option() -> None:
    """The ladder only has backends that honour all given options."""
    choice = decide(PACKET, ALL, Options(timestamps=True))
    assert choice.ladder == ("packet_mmap", "recvmmsg")
    assert "readv cannot honour timestamps=True" in choice.explain()


def test_avoid() -> None:
    """Avoided backends are refused for auto. An unknown name in LINKRX_AVOID has no effect."""
    choice = decide(DATAGRAM, ALL, Options(), avoid=["recvmmsg"])
    assert choice.ladder == ("readv", "os_readv")
    assert choice.verdicts[1].reason == "LINKRX_AVOID names it"
    with pytest.raises(linkrx.UnsupportedSource, match="no backend receives"):
        decide(DATAGRAM, ALL, Options(), avoid=["recvmmsg", "readv", "os_readv"])
    assert decide(DATAGRAM, ALL, Options(), avoid=["typo"]).backend == "recvmmsg"


def test_demotion() -> None:
    """A demoted choice is the next backend of the ladder, and has the reason."""
    choice = decide(DATAGRAM, ALL, Options()).demoted("the kernel said no")
    assert choice.ladder == ("readv", "os_readv")
    assert [(v.backend, v.outcome) for v in choice.verdicts] == [
        ("packet_mmap", "refused"),
        ("recvmmsg", "refused"),
        ("readv", "chosen"),
        ("os_readv", "accepted"),
    ]
    assert choice.verdicts[1].reason == "the kernel said no"


def test_the_environment(
    datagram: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """LINKRX_BACKEND replaces "auto", but no named backend. LINKRX_AVOID narrows "auto", and an unknown name logs a warning."""
    supported = that_take("unix_dgram")
    monkeypatch.setenv("LINKRX_BACKEND", "os_readv")
    with linkrx.open(datagram) as rx:
        assert rx.backend == "os_readv"
    with linkrx.open(datagram, backend=supported[0]) as rx:
        assert rx.backend == supported[0]
    monkeypatch.setenv("LINKRX_BACKEND", "nonesuch")
    with pytest.raises(
        linkrx.BackendUnavailable, match=r"^LINKRX_BACKEND=nonesuch: there is no backend 'nonesuch'"
    ):
        linkrx.open(datagram)
    with pytest.raises(linkrx.BackendUnavailable, match=r"^there is no backend 'typo'"):
        linkrx.open(datagram, backend="typo")
    monkeypatch.setenv("LINKRX_BACKEND", "")
    monkeypatch.setenv("LINKRX_AVOID", "recvmmsg, readv, typo,")
    assert from_environment() == ("auto", ("recvmmsg", "readv", "typo"))
    with linkrx.open(datagram) as rx:
        assert rx.backend == "os_readv"
        assert rx.choice.ladder == ("os_readv",)
    missing = (
        [] if _core.reason is None else [line for line in caplog.messages if "without its C core" in line]
    )
    assert caplog.messages == ["LINKRX_AVOID names 'typo', and there is no such backend", *missing]


def test_backends_are_listed() -> None:
    """linkrx.backends() lists every backend, best first, with the reason if one is not supported."""
    found = linkrx.backends()
    assert [one.rank for one in found] == sorted((one.rank for one in found), reverse=True)
    assert all((one.reason is None) == one.supported for one in found)
    assert replace(found[-2], supported=True).name == "os_readv"


def outcome(call: Callable[..., linkrx.Choice | linkrx.Dispatcher], *arguments: Any, **options: Any) -> Any:
    """The choice of a call, or the type and text of its error."""
    try:
        made = call(*arguments, **options)
    except (linkrx.LinkrxError, TypeError, ValueError) as error:
        return type(error), str(error).replace("choose()", "open()")
    if isinstance(made, linkrx.Choice):
        return made
    with made:
        return made.choice


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backend": "os_readv"},
        {"backend": "packet_mmap"},
        {"backend": "nonesuch"},
        {"ethernet": False, "vnet_header": True, "segment": True},
        {"segment": True},
        {"timestamps": True},
        {"latency": 0.5},
        {"latency": float("nan")},
        {"packet_info": True},
        {"batchsize": 3},
    ],
)
def test_choose_is_the_same_as_open(datagram: socket.socket, options: dict[str, Any]) -> None:
    """linkrx.choose gives the same choice or error as linkrx.open, for any options."""
    assert outcome(linkrx.choose, datagram, **options) == outcome(linkrx.open, datagram, **options)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    "options",
    [{}, {"segment": True}, {"vnet_header": True}, {"timestamps": True}, {"fanout": 3}, {"latency": 0}],
)
@pytest.mark.parametrize("environment", [{}, {"LINKRX_BACKEND": "recvmmsg"}, {"LINKRX_AVOID": "packet_mmap"}])
def test_choose_is_the_same_as_open_for_an_interface(
    options: dict[str, Any], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an interface, with environment variables, linkrx.choose gives the same choice or error as linkrx.open."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with veth() as (near, _):
        assert outcome(linkrx.choose, near, **options) == outcome(linkrx.open, near, **options)


# The audit events of sockets.
_made: list[int] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.__new__" and _made is not None:
        _made.append(arguments[1])


sys.addaudithook(_audit)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    "options",
    [
        {"backend": "nonesuch"},
        {"backend": "capture_file"},
        {"ethernet": False},
        {"filter": "no such word"},
        {"filter": [(0xFFFF, 0, 0, 0)]},
        {"backend": "os_readv", "timestamps": True},
    ],
)
def test_open_opens_nothing_that_it_cannot_use(options: dict[str, Any]) -> None:
    """If linkrx.open refuses, it does so before it opens a packet socket."""
    global _made
    _made = []
    try:
        with pytest.raises((linkrx.LinkrxError, ValueError)):
            linkrx.open("lo", **options)
        made = set(_made)
        linkrx.open("lo").close()
        assert socket.AF_PACKET in _made
    finally:
        _made = None
    assert socket.AF_PACKET not in made


def test_choose_reads_nothing_and_changes_nothing(datagram: socket.socket) -> None:
    """choose receives no packet, and does not change the source's flags and buffer."""
    before = settings_of(datagram.fileno())
    linkrx.choose(datagram, receive_buffer=100_000)
    assert settings_of(datagram.fileno()) == before
    with pytest.raises(linkrx.UnsupportedSource, match="'nowhere0'"):
        linkrx.choose("nowhere0")
