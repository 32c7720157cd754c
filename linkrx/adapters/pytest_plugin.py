"""The pytest plugin: real network devices for tests, in a private network for each test, without root.

pytest imports this in every run. It imports nothing else of linkrx until a test or an option asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import quote
from zlib import crc32

import pytest

if TYPE_CHECKING:
    from linkrx.testing.network import Bridge, End, Network, Tap

# Whether this process's parent entered a private network: nothing, or why it could not. For workers of pytest-xdist, which
# have a thread besides and could enter no user namespace, and for pytest inside of a test.
PRIVATE = "LINKRX_PYTEST_PRIVATE"

NAME_MOST = 200  # of a file, without what is added; linux/limits.h: NAME_MAX is 255 bytes

_before: pytest.StashKey[int] = pytest.StashKey()
_folder: pytest.StashKey[Path] = pytest.StashKey()  # for captures
_capture: pytest.StashKey[bytes] = pytest.StashKey()  # of a test, once its network is over
_failed: pytest.StashKey[bool] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, and the same as lines of an ini file."""
    group = parser.getgroup("linkrx", "real network devices (linkrx)")
    private = "enter a network namespace, and without root a user namespace, before anything else"
    group.addoption("--linkrx-private", action="store_true", default=None, help=private)
    parser.addini("linkrx_private", f"{private} (--linkrx-private)", type="bool", default=False)
    require = "fail tests that cannot have a network or a device, instead of skipping them"
    group.addoption("--linkrx-require", action="store_true", default=None, help=require)
    parser.addini("linkrx_require", f"{require} (--linkrx-require)", type="bool", default=False)
    capture = (
        "write what the ends of each test that fails have seen, in both directions, to a pcapng file in DIR"
    )
    group.addoption("--linkrx-capture", metavar="DIR", help=capture)


def _asked(config: pytest.Config, name: str) -> bool:
    option = getattr(config.known_args_namespace, name, None)
    return bool(config.getini(name) if option is None else option)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """With --linkrx-private: now, for a process of several threads may enter no user namespace."""
    if PRIVATE in os.environ or not _asked(early_config, "linkrx_private"):
        return
    from linkrx.errors import LinkrxError
    from linkrx.kernel import namespace

    before = namespace.open_here()
    try:
        namespace.enter_private_network()
    except LinkrxError as error:
        os.close(before)
        os.environ[PRIVATE] = str(error)
    else:
        early_config.stash[_before] = before
        os.environ[PRIVATE] = ""


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder for captures. Raises UsageError where that cannot be done."""
    wanted = config.getoption("linkrx_capture")
    if wanted is None:
        return
    folder = config.invocation_params.dir / wanted  # tests may go to another one
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(f"--linkrx-capture {wanted}: {error}") from error
    config.stash[_folder] = folder


def pytest_unconfigure(config: pytest.Config) -> None:
    """Go back, where there is a way: who entered a user namespace stays there, and ends with pytest."""
    before = config.stash.get(_before, None)
    if before is None:
        return
    from linkrx.kernel import namespace

    del config.stash[_before]
    os.environ.pop(PRIVATE, None)
    try:
        namespace.go_to(before)
    except PermissionError:
        os.environ[PRIVATE] = ""
    finally:
        os.close(before)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Where tests run, if that was asked for."""
    if PRIVATE not in os.environ:
        return None
    reason = os.environ[PRIVATE]
    return f"linkrx: no private network: {reason}" if reason else "linkrx: in a private network"


@pytest.fixture
def linkrx_network(request: pytest.FixtureRequest) -> Iterator[Network]:
    """A private network for this test, in which the test runs; see linkrx.testing.network.Network."""
    from linkrx.errors import MissingPrivilege
    from linkrx.testing.network import Network

    def unable(error: Exception) -> NoReturn:
        __tracebackhide__ = True
        reason = str(error)
        if isinstance(error, MissingPrivilege) and error.capability.startswith("CAP_SYS_ADMIN"):
            reason = os.environ.get(PRIVATE) or reason
            if PRIVATE not in os.environ:
                reason = (
                    f"this process may make no network namespace ({error.__cause__}): run pytest with --linkrx-private, "
                    "or put `linkrx_private = true` into its ini file, which takes no root"
                )
        if _asked(request.config, "linkrx_require"):
            pytest.fail(f"linkrx is required here, and cannot: {reason}", pytrace=False)
        pytest.skip(reason)

    captures = _folder in request.config.stash
    with Network(records=captures, unable=unable) as network:
        yield network
        if captures:
            kept = BytesIO()
            network.write_capture(kept)
            request.node.stash[_capture] = kept.getvalue()


@pytest.fixture
def linkrx_tap(linkrx_network: Network) -> Tap:
    """A TAP device that is up. The program under test has its queue: `linkrx_tap.queue`, or opened by name."""
    return linkrx_network.tap()


@pytest.fixture
def linkrx_tun(linkrx_network: Network) -> Tap:
    """The same with a TUN device, whose frames are IP packets."""
    return linkrx_network.tun()


@pytest.fixture
def linkrx_veth(linkrx_network: Network) -> tuple[End, End]:
    """The two ends of a cable, both up: what is injected at one comes in at the other."""
    return linkrx_network.veth()


@pytest.fixture
def linkrx_bridge(linkrx_network: Network) -> Bridge:
    """A bridge that is up, without ports: `linkrx_bridge.port()` plugs an end in."""
    return linkrx_network.bridge()


def _capture_of(item: pytest.Item) -> Path:
    """The file for a test: as many folders as its node id has, with no character that artifact stores refuse."""
    path, _, names = item.nodeid.partition("::")
    folders = [part for part in PurePosixPath(path).parts if part not in ("..", "/")]
    name = quote(names.replace("::", "."), safe="[]=,+ ")
    if len(name) > NAME_MOST:
        name = f"{name[:NAME_MOST]}-{crc32(names.encode()):08x}"
    return item.config.stash[_folder].joinpath(*folders, f"{name}.pcapng")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With --linkrx-capture: say in the report of a test that fails where its packets are, and write them behind it."""
    report = yield
    if _folder not in item.config.stash or "linkrx_network" not in getattr(item, "fixturenames", ()):
        return report
    path = _capture_of(item)
    if report.failed:
        item.stash[_failed] = True
        report.sections.append(("linkrx capture", str(path)))
    if report.when == "teardown" and item.stash.get(_failed, False) and _capture in item.stash:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item.stash[_capture])
    return report
