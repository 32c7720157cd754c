"""The pytest plugin. It gives each test real network devices in a network namespace of its own, without root.

pytest imports this module in every run. The module imports the rest of linkrx only when a test or an option needs it.
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

# Set once this process or its parent tried to enter a private network: empty, or the reason why that failed. Workers of
# pytest-xdist inherit it. They have a second thread, and unshare(2) refuses a user namespace to a process with threads.
PRIVATE = "LINKRX_PYTEST_PRIVATE"

NAME_MOST = 200  # bytes of a file name without checksum and suffix; linux/limits.h: NAME_MAX is 255

_before: pytest.StashKey[int] = pytest.StashKey()  # a descriptor of the namespace that pytest started in
_folder: pytest.StashKey[Path] = pytest.StashKey()  # the folder for captures
_capture: pytest.StashKey[bytes] = pytest.StashKey()  # the capture of a test, after its network is closed
_failed: pytest.StashKey[bool] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, and the same as settings of the ini file."""
    group = parser.getgroup("linkrx", "real network devices (linkrx)")
    private = "enter a network namespace at the start (without root: and a user namespace)"
    group.addoption("--linkrx-private", action="store_true", default=None, help=private)
    parser.addini("linkrx_private", f"{private} (--linkrx-private)", type="bool", default=False)
    require = "fail tests that cannot get a network or a device, instead of skipping them"
    group.addoption("--linkrx-require", action="store_true", default=None, help=require)
    parser.addini("linkrx_require", f"{require} (--linkrx-require)", type="bool", default=False)
    capture = "write the packets of each failed test, in both directions, to a pcapng file in DIR"
    group.addoption("--linkrx-capture", metavar="DIR", help=capture)


def _asked(config: pytest.Config, name: str) -> bool:
    option = getattr(config.known_args_namespace, name, None)
    return bool(config.getini(name) if option is None else option)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """With --linkrx-private, enter the private network. Now, because unshare(2) refuses a user namespace to a process with threads."""
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
    """Make the folder for captures. Raises UsageError if that fails."""
    wanted = config.getoption("linkrx_capture")
    if wanted is None:
        return
    folder = config.invocation_params.dir / wanted  # absolute, because tests may change the directory
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(f"--linkrx-capture {wanted}: {error}") from error
    config.stash[_folder] = folder


def pytest_unconfigure(config: pytest.Config) -> None:
    """Return to the namespace that pytest started in. A process that entered a user namespace cannot return."""
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
    """Say whether tests run in a private network, if that was requested."""
    if PRIVATE not in os.environ:
        return None
    reason = os.environ[PRIVATE]
    return f"linkrx: no private network: {reason}" if reason else "linkrx: in a private network"


@pytest.fixture
def linkrx_network(request: pytest.FixtureRequest) -> Iterator[Network]:
    """A private network, in which this test runs. See linkrx.testing.network.Network."""
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
                    "or put `linkrx_private = true` into its ini file; neither needs root"
                )
        if _asked(request.config, "linkrx_require"):
            pytest.fail(f"linkrx is required here, but is unavailable: {reason}", pytrace=False)
        pytest.skip(reason)

    captures = _folder in request.config.stash
    with Network(records=captures, unable=unable) as network:
        yield network
        if captures:
            capture = BytesIO()
            network.write_capture(capture)
            request.node.stash[_capture] = capture.getvalue()


@pytest.fixture
def linkrx_tap(linkrx_network: Network) -> Tap:
    """A TAP device that is up. The program under test uses its queue, `linkrx_tap.queue`, or opens it by name."""
    return linkrx_network.tap()


@pytest.fixture
def linkrx_tun(linkrx_network: Network) -> Tap:
    """A TUN device that is up. Its frames are IP packets."""
    return linkrx_network.tun()


@pytest.fixture
def linkrx_veth(linkrx_network: Network) -> tuple[End, End]:
    """The two ends of a veth pair, both up. A packet injected at one end arrives at the other."""
    return linkrx_network.veth()


@pytest.fixture
def linkrx_bridge(linkrx_network: Network) -> Bridge:
    """A bridge that is up and has no ports. `linkrx_bridge.port()` adds one."""
    return linkrx_network.bridge()


def _capture_of(item: pytest.Item) -> Path:
    """The path of a test's capture: the folders of its node id, and a quoted name, because artifact stores refuse some characters."""
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
    """With --linkrx-capture, write the packets of a failed test after its teardown. Its report names the file."""
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
