"""The pytest plugin in other projects: each test runs a suite in its own process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.documents import programs
from support.paths import ROOT, TESTS
from support.unprivileged import as_unprivileged

import linkrx
from linkrx import _core

DOWNSTREAM = TESTS / "downstream"
PATIENCE = 120.0  # seconds after which a suite counts as hanging

pytestmark = pytest.mark.usefixtures("devices")

Suite = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may read and write."""
    with tempfile.TemporaryDirectory(prefix="linkrx-plugin-") as made:
        path = Path(made)
        path.chmod(0o777)
        yield path


def inherited(**environment: str) -> dict[str, str]:
    """The environment, without the variables of this test run."""
    own = ("LINKRX_", "PYTEST_", "PYTHON")
    return {name: value for name, value in os.environ.items() if not name.startswith(own)} | environment


def pytest_command(*arguments: str, python: str = sys.executable) -> list[str]:
    """The pytest command. It writes nothing to the folder, and does not load slow plugins that are not needed."""
    without = [f"-pno:{name}" for name in ("cacheprovider", "hypothesispytest", "benchmark")]
    return [python, "-B", "-m", "pytest", *without, "-ra", *arguments]


@pytest.fixture
def suite(folder: Path) -> Suite:
    """Runs pytest on the source of a test file, as the current user, or with `unprivileged` without privileges."""
    (folder / "hold").mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")

    def run(
        source: str,
        *arguments: str,
        unprivileged: bool = False,
        before: tuple[str, ...] = (),
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        (folder / "test_suite.py").write_text(source)
        command = pytest_command("test_suite.py", *arguments)
        done = subprocess.run(
            [*before, *(as_unprivileged(folder / "hold", command) if unprivileged else command)],
            cwd=folder,
            env=inherited(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        print(done.stdout)
        return done

    return run


def outcome(done: subprocess.CompletedProcess[str]) -> str:
    """The last line without the time, like "2 passed, 1 skipped"."""
    return re.sub(r"^=* ?| in [\d.]+s.*$", "", (done.stdout.splitlines() or [""])[-1])


def interfaces() -> set[str]:
    """The interfaces in the namespace of these tests."""
    return {name for _, name in socket.if_nameindex()}


WHERE = """
import os, socket
from pathlib import Path

def here():
    return os.readlink("/proc/thread-self/ns/net")

def names():
    return {name for _, name in socket.if_nameindex()}

START = here()
"""

EXCHANGE = (
    WHERE
    + """
FRAME = bytes.fromhex("ffffffffffff 020000000001 88b5") + bytes(50)

def test_exchange(linkrx_veth):
    near, far = linkrx_veth
    near.inject(FRAME)
    far.expect(FRAME)
"""
)

ALL_KINDS = (
    EXCHANGE
    + """
def test_tap(linkrx_tap):
    assert linkrx_tap.queue.name == linkrx_tap.name

def test_tun(linkrx_tun):
    assert linkrx_tun.queue.mode == "tun"

def test_bridge(linkrx_bridge):
    linkrx_bridge.port().inject(FRAME)
    linkrx_bridge.expect(FRAME)
"""
)


def test_it_imports_nothing(suite: Suite) -> None:
    """A suite without the fixtures loads the plugin, and no other module of linkrx."""
    done = suite(
        "import sys\n"
        "def test_nothing():\n"
        "    found = {name for name in sys.modules if name.split('.')[0] in ('linkrx', 'pyroute2', 'cffi')}\n"
        "    assert found == {'linkrx', 'linkrx.adapters', 'linkrx.adapters.pytest_plugin'}\n"
    )
    assert outcome(done) == "1 passed"


def test_each_test_has_a_network_of_its_own(suite: Suite) -> None:
    """A test sees no device of another test, and after each test the process is in its old namespace."""
    done = suite(
        WHERE
        + """
import subprocess
import pytest

seen = set()

@pytest.mark.parametrize("number", range(3))
def test_own(linkrx_network, number):
    assert here() != START
    seen.add(here())
    assert names() == {"lo"}
    subprocess.run(["ip", "link", "add", "left", "type", "bridge"], check=True)  # left behind
    linkrx_network.tap()
    assert names() == {"lo", "left", "tap0"}

def test_back():
    assert here() == START
    assert not names() & {"left", "tap0"}
"""
    )
    assert outcome(done) == "4 passed"
    assert not interfaces() & {"left", "tap0"}


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_without_root(suite: Suite, workers: tuple[str, ...]) -> None:
    """With --linkrx-private no privilege is needed, and tests keep the user ID."""
    more = f"\ndef test_who():\n    assert os.getuid() == {os.getuid() or 65534}\n"
    closed = "\ndef test_closed(tmp_path):\n    (tmp_path / 'x').touch(mode=0)\n    with pytest.raises(PermissionError):\n        (tmp_path / 'x').open()\n"
    done = suite(
        "import pytest\n" + ALL_KINDS + more + closed, "--linkrx-private", *workers, unprivileged=True
    )
    assert outcome(done) == "6 passed"


def test_the_ini_line(suite: Suite, folder: Path) -> None:
    """A line of the ini file has the same effect as the option."""
    (folder / "pytest.ini").write_text("[pytest]\nlinkrx_private = true\n")
    done = suite(EXCHANGE, unprivileged=True)
    assert outcome(done) == "1 passed"
    assert "linkrx: in a private network" in done.stdout


def test_without_the_option(suite: Suite) -> None:
    """Without privileges and option a test is skipped, and the reason says what to type. With --linkrx-require it fails."""
    skipped = suite(EXCHANGE, unprivileged=True)
    assert outcome(skipped) == "1 skipped"
    assert "run pytest with --linkrx-private, or put `linkrx_private = true` into its ini" in skipped.stdout
    failed = suite(EXCHANGE, "--linkrx-require", unprivileged=True)
    assert outcome(failed) == "1 error"
    assert (
        "linkrx is required here, but is unavailable: this process may make no network namespace"
        in failed.stdout
    )


NO_DRIVER = 'mount -t tmpfs none /dev/net; exec "$@"'


def test_no_tap_driver(suite: Suite) -> None:
    """Without /dev/net/tun, tests with TAP devices are skipped with a remedy, also if they make the device themselves. Others run."""
    hidden = ("unshare", "--mount", "bash", "-euc", NO_DRIVER, "_")
    source = ALL_KINDS + "\ndef test_by_hand(linkrx_network):\n    linkrx_network.tap()\n"
    done = suite(source, before=hidden)
    assert outcome(done) == "2 passed, 3 skipped"
    assert done.stdout.count("/dev/net/tun does not exist: load the driver with `sudo modprobe tun`") == 3
    assert outcome(suite(source, "--linkrx-require", before=hidden)) == "1 failed, 2 passed, 2 errors"


@pytest.mark.superuser
def test_a_closed_tap_driver(suite: Suite) -> None:
    """If this user may not open /dev/net/tun, the reason says so and what to type."""
    if os.getuid():
        pytest.skip("only root can make a device file")
    closed = 'mount -t tmpfs none /dev/net; mknod -m 600 /dev/net/tun c 10 200; exec "$@"'
    # Root without the privilege to open files of other users.
    closed = closed.replace("exec", "chown 1 /dev/net/tun; exec setpriv --bounding-set=-dac_override")
    done = suite(ALL_KINDS, before=("unshare", "--mount", "bash", "-euc", closed, "_"))
    assert outcome(done) == "2 passed, 2 skipped"
    assert "opening /dev/net/tun needs access to the device; `sudo chgrp GROUP /dev/net/tun" in done.stdout


# An outer user namespace, which has its own limit of inner user namespaces.
NO_USER_NAMESPACES = (
    *("unshare", "--user", "--map-root-user", "bash", "-euc"),
    'echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-all --inh-caps=-all "$@"',
    "_",
)


def test_no_user_namespaces(suite: Suite) -> None:
    """If the kernel allows no user namespace, tests are skipped with that reason. Tests without devices run."""
    done = suite(EXCHANGE + "\ndef test_other(): pass\n", "--linkrx-private", before=NO_USER_NAMESPACES)
    assert outcome(done) == "1 passed, 1 skipped"
    assert "user.max_user_namespaces is 0" in done.stdout


def test_no_pyroute2(suite: Suite, folder: Path) -> None:
    """Without pyroute2, tests with devices are skipped, and the reason has the command that installs it."""
    (folder / "hidden").mkdir()
    (folder / "hidden" / "pyroute2.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'pyroute2'\")\n"
    )
    alone = "\ndef test_alone(linkrx_network):\n    assert names() == {'lo'}\n"
    done = suite(ALL_KINDS + alone, PYTHONPATH=str(folder / "hidden"))
    assert outcome(done) == "1 passed, 4 skipped"
    assert "(No module named 'pyroute2'): python3 -m pip install 'linkrx[pytest]'" in done.stdout


THREAD = """
import threading
over = threading.Event()
thread = threading.Thread(target=over.wait, name="the one that waits", daemon=True)
thread.start()
"""


def test_threads_before_the_fixture(suite: Suite) -> None:
    """Threads that run before a test stay in their namespace and do not prevent the fixture. Threads that a test starts are in its network."""
    done = suite(
        WHERE
        + THREAD
        + """
from concurrent.futures import ThreadPoolExecutor

def test_threads(linkrx_network):
    assert os.readlink(f"/proc/self/task/{thread.native_id}/ns/net") == START != here()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(here).result() == here()
        near, far = pool.submit(linkrx_network.veth).result()
    assert names() == {"lo", near.name, far.name}

def test_end():
    over.set()
"""
    )
    assert outcome(done) == "2 passed"


def test_threads_before_pytest(suite: Suite, folder: Path) -> None:
    """If a thread prevents a user namespace, tests are skipped and the reason has its name."""
    (folder / "threaded.py").write_text(THREAD)
    done = suite(EXCHANGE, "-p", "threaded", "--linkrx-private", unprivileged=True, PYTHONPATH=str(folder))
    assert outcome(done) == "1 skipped"
    assert "in a process of 2 threads (MainThread, the one that waits)" in done.stdout


def test_a_test_that_kills_its_worker(suite: Suite) -> None:
    """A worker that is killed during a test fails only that test, and leaves nothing in the outer namespace."""
    source = ALL_KINDS + "\ndef test_killed(linkrx_network, linkrx_tap):\n    os.kill(os.getpid(), 9)\n"
    before = interfaces()
    done = suite(source, "-n", "2", "--linkrx-private", unprivileged=True)
    assert outcome(done) == "1 failed, 4 passed"
    assert interfaces() == before


def networks() -> set[str]:
    """The network namespaces of all processes that this one may read."""
    found = set()
    for process in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(str(process.readlink()))
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


def test_pytest_is_killed(folder: Path) -> None:
    """pytest that is killed during a test with devices leaves no process, namespace or interface."""
    (folder / "test_suite.py").write_text(
        WHERE
        + "\ndef test_hang(linkrx_tap, linkrx_bridge):\n"
        + "    linkrx_tap.queue\n"
        + "    Path('network').write_text(here())\n"
        + "    os.read(linkrx_bridge.port()._injector.fileno(), 1)\n"
    )
    before = interfaces()
    with (
        subprocess.Popen(
            pytest_command("-s", "test_suite.py"), cwd=folder, env=inherited(), stdout=subprocess.PIPE
        ) as process,
        ExitStack() as stack,
    ):
        while not (folder / "network").exists() or not (folder / "network").read_text():
            assert process.poll() is None
            os.sched_yield()
        network = (folder / "network").read_text()
        assert network in networks()
        # While this is open the kernel gives the number to no other namespace, as other processes of this run make them all the time.
        stack.callback(os.close, os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY))
        assert str(Path(f"/proc/{process.pid}/ns/net").readlink()) == network
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
        assert network not in networks()
    assert interfaces() == before


@pytest.mark.parametrize("unprivileged", [False, True], ids=["as_caller", "without_privileges"])
def test_nested(suite: Suite, unprivileged: bool) -> None:
    """A nested network, and pytest inside a test, do not change the outer network."""
    done = suite(
        WHERE
        + """
import subprocess, sys
from linkrx.testing.network import Network

INNER = '''
def test_inner(linkrx_tap):
    linkrx_tap.queue
'''

def test_network(linkrx_network):
    outer = here()
    linkrx_network.tap("outer")
    with Network() as inner:
        assert here() not in (outer, START)
        assert names() == {"lo"}
        inner.tap("inner")
    assert here() == outer
    assert names() == {"lo", "outer"}

def test_pytest(linkrx_tap, tmp_path):
    (tmp_path / "test_inner.py").write_text(INNER)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "--linkrx-private", "--linkrx-require", tmp_path])
    assert done.returncode == 0
    assert names() == {"lo", "tap0"}

pytest_plugins = "pytester"

def test_pytest_in_process(pytester, linkrx_tap):
    outer = here()
    pytester.makepyfile(INNER)
    pytester.inline_run("--linkrx-private").assertoutcome(passed=1)
    assert here() == outer
    assert names() == {"lo", "tap0"}
""",
        *(["--linkrx-private"] if unprivileged else []),
        unprivileged=unprivileged,
    )
    assert outcome(done) == "3 passed"


def test_two_suites_at_once(folder: Path) -> None:
    """Two suites that run at the same time use the same device names without a conflict."""
    (folder / "test_suite.py").write_text(
        "import os\n"
        "from pathlib import Path\n"
        "def test_meeting(linkrx_tap):\n"
        "    Path(os.environ['ME']).write_text(linkrx_tap.name)\n"
        "    while not Path(os.environ['OTHER']).exists():\n"
        "        os.sched_yield()\n"
        "    linkrx_tap.inject(b'x' * 60) if linkrx_tap.queue else None\n"
        "    assert os.read(linkrx_tap.queue.fileno(), 100) == b'x' * 60\n"
    )
    suites = [
        subprocess.Popen(
            pytest_command("-q", "test_suite.py"),
            cwd=folder,
            env=inherited(ME=me, OTHER=other),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for me, other in (("one", "other"), ("other", "one"))
    ]
    outputs = [one.communicate(timeout=PATIENCE)[0] for one in suites]
    assert [one.returncode for one in suites] == [0, 0], outputs
    assert (folder / "one").read_text() == (folder / "other").read_text() == "tap0"


WAYS = {
    "as_caller": (False, ()),
    "without_privileges": (True, ()),
    "xdist": (True, ("-n", "2")),
}


@pytest.mark.parametrize("way", WAYS)
def test_downstream(folder: Path, way: str) -> None:
    """tests/downstream tests its program on TAP devices as root, as an ordinary user, and in several processes."""
    unprivileged, arguments = WAYS[way]
    project = folder / "project"
    shutil.copytree(DOWNSTREAM, project, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "hold").mkdir()
    command = pytest_command(*arguments)
    done = subprocess.run(
        as_unprivileged(folder / "hold", command) if unprivileged else command,
        cwd=project,
        env=inherited(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    print(done.stdout)
    assert re.fullmatch(r"\d+ passed", outcome(done))


FAILING = (
    EXCHANGE
    + """
import pytest
from linkrx.testing.waiting import patiently

def all_came(ends, count):
    for _ in patiently(lambda: all(len(end.recorded) >= count for end in ends)):
        for end in ends:
            end.record_the_rest()

@pytest.mark.parametrize("case", ["a/b", "a b"])
def test_wrong(linkrx_veth, case):
    near, far = linkrx_veth
    near.inject(FRAME)
    far.inject(FRAME + case.encode())
    all_came(linkrx_veth, 2 if KNOWS_DIRECTION else 1)
    os.chdir("/")
    far.expect(FRAME + b"!", timeout=0)

@pytest.fixture
def late(linkrx_veth):
    yield
    linkrx_veth[0].inject(FRAME)
    all_came(linkrx_veth if KNOWS_DIRECTION else linkrx_veth[1:], 1)
    raise RuntimeError

def test_late(late):
    pass

def test_without():
    assert False
"""
)


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_captures(suite: Suite, folder: Path, workers: tuple[str, ...]) -> None:
    """Each failing test, in any phase, has a file with the packets of its ends, which the report names. Other tests have none."""
    # os_readv does not get the direction, and does not receive frames that an end sent.
    knows_direction = _core.reason is None
    program = f"KNOWS_DIRECTION = {knows_direction}\n{FAILING}"
    done = suite(program, "--linkrx-private", "--linkrx-capture", "captures", *workers, unprivileged=True)
    assert outcome(done) == "3 failed, 2 passed, 1 error"
    written = sorted(path for path in (folder / "captures").rglob("*") if path.is_file())
    names = ["test_late.pcapng", "test_wrong[a b].pcapng", "test_wrong[a%2Fb].pcapng"]
    assert [path.name for path in written] == names
    assert all(str(path) in done.stdout for path in written)
    frame = bytes.fromhex("ffffffffffff 020000000001 88b5") + bytes(50)
    for path, frames in zip(
        written, [[frame], [frame, frame + b"a b"], [frame, frame + b"a/b"]], strict=True
    ):
        with linkrx.open(linkrx.CaptureFile(path)) as rx:
            seen = list(rx)
            ends = [rx.interface_name(packet.interface) for packet in seen]
        assert sorted(map(bytes, seen)) == sorted(frames * (2 if knows_direction else 1))
        if knows_direction:
            found = {(name, packet.outgoing) for name, packet in zip(ends, seen, strict=True)}
            both = {("veth0", False), ("veth1", True)} if len(frames) > 1 else set()
            assert found == {("veth0", True), ("veth1", False)} | both


def test_a_folder_for_captures_that_cannot_be_made(suite: Suite, folder: Path) -> None:
    """If the folder for captures cannot be made, pytest says so and runs no test."""
    (folder / "file").write_text("")
    done = suite(EXCHANGE, "--linkrx-capture", "file/captures")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--linkrx-capture file/captures: [Errno 20] Not a directory" in done.stdout


DOCUMENT = ROOT / "docs" / "testing.md"


def documented(title: str) -> str:
    """The program of that title."""
    (program,) = [one for one in programs(DOCUMENT) if one.startswith(f'"""{title}."""')]
    return program


def test_the_first_test(suite: Suite) -> None:
    """The documented first test has less than twenty lines, and passes without root."""
    beginning = DOCUMENT.read_text().partition("## The first test")[2].partition("\n## ")[0]
    typed = [block.strip() for block in re.findall(r"```(?:sh|python)\n(.*?)```", beginning, re.DOTALL)]
    assert len("\n".join(typed).splitlines()) < 20
    assert typed[1] == documented("A first test").strip()
    assert typed[2] == ".venv/bin/pytest --linkrx-private"
    assert outcome(suite(typed[1], "--linkrx-private", unprivileged=True)) == "1 passed"


def test_the_failing_expect(suite: Suite) -> None:
    """The document shows a failing `expect` as pytest prints it."""
    (shown,) = re.findall(r"```text\n(>  .*?)```", DOCUMENT.read_text(), re.DOTALL)
    done = suite(
        f"import sys\nsys.path.insert(0, {str(DOWNSTREAM)!r})\nsys.path.insert(0, {str(DOWNSTREAM / 'tests')!r})\n"
        "import os\n"
        "from test_arp_responder import reply\n"
        "def test_wrong(linkrx_tap):\n"
        "    os.write(linkrx_tap.queue.fileno(), reply('10.0.0.3'))\n"
        '    linkrx_tap.expect(reply("10.0.0.2"))\n'
    )
    assert outcome(done) == "1 failed"
    found = [line for line in done.stdout.splitlines() if line.startswith((">  ", "E  "))]
    assert found == shown.splitlines()


@pytest.mark.parametrize(
    ("title", "pattern"),
    [
        ("A network", r"<Packet 0x88b5 02:00:5e:00:00:01 > 02:00:5e:00:00:02 19 bytes>\n"),
        ("Rigs", r"(\w+ 64\n){7}"),
        ("Conformance", r"(os_readv-unix_dgram-\w+ (supported|inapplicable)\n)+"),
    ],
)
def test_the_other_programs(title: str, pattern: str) -> None:
    """The documented programs without pytest run to their end, and print the expected output."""
    done = subprocess.run(
        [sys.executable, "-c", documented(title)],
        env=inherited(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(pattern, done.stdout)
