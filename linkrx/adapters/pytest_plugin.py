"""The pytest plugin: real network devices for tests, in a private network for each test, without root.

pytest imports this in every run. It imports nothing else of linkrx until a test or an option asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from linkrx.testing.network import Bridge, End, Network, Tap

# Whether this process's parent entered a private network: nothing, or why it could not. For workers of pytest-xdist, which
# have a thread besides and could enter no user namespace, and for pytest inside of a test.
PRIVATE = "LINKRX_PYTEST_PRIVATE"

_before: pytest.StashKey[int] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, and the same as lines of an ini file."""
    group = parser.getgroup("linkrx", "real network devices (linkrx)")
    private = "enter a network namespace, and without root a user namespace, before anything else"
    group.addoption("--linkrx-private", action="store_true", default=None, help=private)
    parser.addini("linkrx_private", f"{private} (--linkrx-private)", type="bool", default=False)
    require = "fail tests that cannot have a network or a device, instead of skipping them"
    group.addoption("--linkrx-require", action="store_true", default=None, help=require)
    parser.addini("linkrx_require", f"{require} (--linkrx-require)", type="bool", default=False)


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

    with Network(unable=unable) as network:
        yield network


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
