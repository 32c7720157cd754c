"""`linkrx demo` and `linkrx doctor`, run in a process of their own, whose namespaces the demo may change."""

from __future__ import annotations

import os
import platform
import re
import resource
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

import pytest
from support.command_line import ESCAPE, PATIENCE, WITHOUT_CORE, in_terminal, linkrx_command, run
from support.run import that_take

import linkrx
import linkrx.cli
from linkrx.testing import rigs

SUPPORTED = that_take("packet")


def packet_lines(output: str, backend: str) -> list[tuple[str, str, str, int]]:
    """Protocol, remote, local and length of each packet that the demo prints for a backend."""
    mac = "((?:[0-9a-f]{2}:){5}[0-9a-f]{2})"
    found = re.findall(rf"^ *\d+\.\d{{6}}  {backend} +(\w+) +{mac} > {mac} +(\d+)$", output, re.MULTILINE)
    return [(protocol, remote, local, int(length)) for protocol, remote, local, length in found]


def summary_line(output: str, backend: str) -> list[str]:
    """Packets, bytes, answered and status of a backend in the demo's summary, or the words there instead."""
    table = output[output.index("\nbackend ") :]
    line = next(line for line in table.splitlines() if line.split()[:1] == [backend])
    return line.split(maxsplit=4)[1:]


@pytest.mark.usefixtures("devices")
def test_demo_shows_every_packet_of_every_backend() -> None:
    """Every supported backend delivers the ARP packet and each echo once, and all its pings are answered."""
    done = linkrx_command("demo", "--count", "4")
    assert (done.returncode, done.stderr) == (0, "")
    assert ESCAPE not in done.stdout
    for name in SUPPORTED:
        lines = packet_lines(done.stdout, name)
        assert [protocol for protocol, *_ in lines] == ["ARP", "IPv4", "IPv4", "IPv4", "IPv4"]
        assert [length for *_, length in lines] == [42, 98, 98, 98, 98]
        *counted, status = summary_line(done.stdout, name)
        assert counted == ["5", str(42 + 4 * 98), "4/4"]
        assert status.startswith("ok")


@pytest.mark.usefixtures("devices")
def test_demo_watches_by_name_for_a_backend_of_sockets() -> None:
    """In the demo recvmmsg, which refuses a TAP queue, receives the replies on the interface; os_readv receives the requests."""
    done = linkrx_command("demo", "--count", "1")
    answers = packet_lines(done.stdout, "recvmmsg")
    questions = packet_lines(done.stdout, "os_readv")
    assert {local for _, _, local, _ in questions} == {"ff:ff:ff:ff:ff:ff", "02:00:00:00:00:02"}
    if "recvmmsg" in SUPPORTED:
        assert {remote for _, remote, _, _ in answers} == {"02:00:00:00:00:02"}


@pytest.mark.usefixtures("devices")
def test_demo_in_a_terminal() -> None:
    """In a terminal the demo answers all pings too, and styles its output if rich is installed."""
    code, output = in_terminal("demo", "--count", "1")
    assert code == 0
    assert (ESCAPE in output) == (find_spec("rich") is not None)
    for name in SUPPORTED:
        assert re.search(rf"{name} .*1/1", output)


@pytest.mark.usefixtures("devices")
def test_demo_without_the_core() -> None:
    """Without the C core the demo works on os_readv, and gives the reason for the other backends."""
    done = run("-c", WITHOUT_CORE, "demo", "--count", "2")
    assert done.returncode == 0
    assert summary_line(done.stdout, "os_readv")[2] == "2/2"
    for name in ("readv", "recvmmsg"):
        assert not packet_lines(done.stdout, name)
        assert re.search(rf"^{name} .* unavailable: the C core cannot be loaded", done.stdout, re.MULTILINE)


@pytest.mark.usefixtures("devices")
def test_demo_is_not_swayed_by_the_environment() -> None:
    """LINKRX_BACKEND and LINKRX_AVOID do not affect the demo, because it names each backend."""
    done = linkrx_command("demo", "--count", "1", LINKRX_BACKEND="recvmmsg", LINKRX_AVOID="readv,os_readv")
    assert done.returncode == 0
    assert all(summary_line(done.stdout, name)[2] == "1/1" for name in SUPPORTED)


MANY = """
import os, resource, sys
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
for _ in range(1100):
    os.dup(0)
from linkrx.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("arguments", [("demo", "--count", "1"), ("doctor", "lo")])
def test_with_more_descriptors_than_select_knows(arguments: tuple[str, ...]) -> None:
    """Demo and doctor work with descriptors above 1024, which select(2) does not support."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2048:
        pytest.skip("the hard limit of descriptors is below 2048")
    done = run("-c", MANY, *arguments)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("devices")
def test_demo_leaves_nothing_behind() -> None:
    """The demo leaves no device, thread or descriptor."""
    program = """
import os, socket, sys, threading
import pyroute2
from linkrx.cli.main import main
before = os.listdir("/proc/self/fd")
code = main(["demo", "--count", "1"])
assert os.listdir("/proc/self/fd") == before, os.listdir("/proc/self/fd")
assert [name for _, name in socket.if_nameindex()] == ["lo"], socket.if_nameindex()
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
sys.exit(code)
"""
    done = run("-W", "error", "-X", "dev", "-c", program)
    assert (done.returncode, done.stderr) == (0, "")


SILENT = """
import sys
from linkrx.cli import main as cli
from linkrx.cli import demo
from linkrx.cli import responder
demo.PATIENCE = 0.01
responder.Responder.answer = lambda *call: None
sys.exit(cli.main(["demo", "--count", "2"]))
"""


@pytest.mark.usefixtures("devices")
def test_demo_fails_when_pings_are_not_answered() -> None:
    """If the responder answers no ping, each backend is reported as failed and the exit code is 1."""
    done = run("-c", SILENT)
    assert (done.returncode, done.stderr) == (1, "")
    for name in SUPPORTED:
        *_, answered, status = summary_line(done.stdout, name)
        assert (answered, status) == ("0/2", "failed: 2 pings were not answered")


BROKEN = """
import sys
from linkrx.cli import main as cli
from linkrx.cli import demo
from linkrx.backends.os_readv import OsReadv
def fill(self, arena, room):
    raise OSError(5, "Input/output error")
OsReadv.fill = fill
sys.exit(cli.main(["demo", "--count", "1"]))
"""


@pytest.mark.usefixtures("devices")
def test_demo_reports_a_backend_that_breaks() -> None:
    """A backend that raises is reported with its error, and the demo runs the others."""
    done = run("-c", BROKEN)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"^os_readv .*failed: receiving .*Input/output error$", done.stdout, re.MULTILINE)
    for name in set(SUPPORTED) - {"os_readv"}:
        assert summary_line(done.stdout, name)[2] == "1/1"


REFUSED = """
import sys
from linkrx.cli import main as cli
from linkrx.cli import demo
from linkrx.errors import MissingPrivilege
def refuse():
    raise MissingPrivilege("a network namespace", "CAP_SYS_ADMIN", "run with sudo", 1)
demo.enter_private_network = refuse
sys.exit(cli.main(["demo"]))
"""


def test_demo_where_it_cannot_run() -> None:
    """Without the privilege the exit code is 3, and stderr is one line that says what to type."""
    done = run("-c", REFUSED)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "linkrx: a network namespace needs CAP_SYS_ADMIN; run with sudo\n"


# A parent that ignores SIGINT, like a shell for background jobs, would pass that on.
INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from linkrx.cli import run
sys.exit(run())
"""


@pytest.mark.usefixtures("devices")
def test_demo_interrupted() -> None:
    """Ctrl-C during the demo ends it with exit code 130 and nothing on stderr."""
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "demo", "--count", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        # Its output is larger than the pipe, and is not read further, so the demo cannot have ended.
        assert any(b"IPv4" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (130, b"")


# Sends itself SIGINT when Python imports the module of the first argument.
INTERRUPTED_IMPORT = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(name, path, target=None):
        if name == sys.argv[1]:
            del sys.argv[1]
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder)
runpy.run_module("linkrx", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["linkrx.cli.main", "argparse", "linkrx._core._native", "linkrx.cli.dump"])
def test_interrupted_while_python_imports(module: str) -> None:
    """Ctrl-C while Python imports the command ends it with exit code 130 and without output."""
    done = run("-c", INTERRUPTED_IMPORT, module, "doctor")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_installed_command_is_the_same() -> None:
    """The script that pip installs runs what `python -m linkrx` runs."""
    (script,) = entry_points(group="console_scripts", name="linkrx")
    assert script.load() is linkrx.cli.run


@pytest.mark.usefixtures("devices")
def test_reader_that_goes_away() -> None:
    """If the reader of its output closes the pipe, the demo ends with exit code 141 and nothing on stderr."""
    with subprocess.Popen(
        [sys.executable, "-m", "linkrx", "demo", "--count", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        assert (process.wait(PATIENCE), errors) == (141, b"")


def test_doctor_on_the_host() -> None:
    """The doctor prints versions, kernel, privileges and every backend, and exits with 0."""
    done = linkrx_command("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert ESCAPE not in done.stdout
    for finding in (linkrx.__version__, platform.python_version(), platform.release(), platform.machine()):
        assert finding in done.stdout
    for subject in ("C core", "CAP_NET_RAW", "CAP_NET_ADMIN", "/dev/net/tun"):
        assert re.search(rf"^{subject} +(yes|no: .+)$", done.stdout, re.MULTILINE)
    for info in linkrx.backends():
        verdict = "supported" if info.supported else f"unavailable +{re.escape(str(info.reason))}"
        assert re.search(rf"^{info.name} +{verdict}", done.stdout, re.MULTILINE)


@pytest.mark.usefixtures("devices")
def test_doctor_on_an_interface() -> None:
    """For an interface, the doctor prints the probed capabilities and the choice of open."""
    with rigs.veth() as (near, _):
        found = linkrx.probe(near)
        with linkrx.open(near) as rx:
            explained = rx.choice.explain()
        done = linkrx_command("doctor", near)
    assert (done.returncode, done.stderr) == (0, "")
    assert explained in done.stdout
    for name in ("kind", "interface", "ifindex", "mtu", "ethernet"):
        assert re.search(rf"^{name} +{getattr(found, name)}$", done.stdout, re.MULTILINE)


@pytest.mark.usefixtures("devices")
def test_doctor_on_an_interface_whose_name_is_not_utf8() -> None:
    """The doctor prints an interface name that is not valid text as its bytes, in any locale."""
    name = b"l\xff\xe9x7"
    subprocess.run([b"ip", b"link", b"add", b"name", name, b"type", b"bridge"], check=True)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "linkrx", "doctor", name],
            capture_output=True,
            check=False,
            env={**os.environ, "LINKRX_BACKEND": "", "PYTHONIOENCODING": "utf-8:strict"},
        )
    finally:
        subprocess.run([b"ip", b"link", b"del", name], check=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"on " + name in done.stdout


@pytest.mark.usefixtures("devices")
def test_doctor_on_every_interface_and_one_protocol() -> None:
    """The doctor accepts `any` and --protocol as linkrx.open does. An invalid EtherType is wrong usage."""
    done = linkrx_command("doctor", "any", "--protocol", "0x88cc")
    assert (done.returncode, done.stderr) == (0, "")
    assert "what linkrx.open('any', protocol=0x88cc) would take, and why" in done.stdout
    assert linkrx.choose("any", protocol=0x88CC).explain() in done.stdout
    for wrong in ("0x10000", "0", "LLDP"):
        done = linkrx_command("doctor", "lo", "-p", wrong)
        assert done.returncode == 2
        assert f"{wrong}: give an EtherType, 1 to 0xffff" in done.stderr


@pytest.mark.usefixtures("devices")
def test_doctor_in_a_terminal() -> None:
    """In a terminal the doctor prints the same, styled if rich is installed."""
    code, output = in_terminal("doctor", "lo")
    assert code == 0
    assert (ESCAPE in output) == (find_spec("rich") is not None)
    assert re.search(r"\w+ +chosen", output)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"LINKRX_BACKEND": "os_readv"}, "os_readv  chosen    it was named"),
        ({"LINKRX_AVOID": "packet_mmap, recvmmsg, readv"}, "recvmmsg  refused   LINKRX_AVOID names it"),
        (
            {"LINKRX_AVOID": "packet_mmap, recvmmsg, readv"},
            "os_readv  chosen    the best that takes the source",
        ),
    ],
)
def test_doctor_honours_the_environment(environment: dict[str, str], line: str) -> None:
    """LINKRX_BACKEND and LINKRX_AVOID affect the doctor's choice as they affect open."""
    if not {"readv", "recvmmsg"} <= set(SUPPORTED):
        pytest.skip("needs the C core")
    done = linkrx_command("doctor", "lo", **environment)
    assert done.returncode == 0
    widths = [re.escape(part) for part in line.split(maxsplit=2)]
    assert re.search("^" + " +".join(widths), done.stdout, re.MULTILINE)


def test_doctor_with_an_unknown_backend_named() -> None:
    """An unknown backend in LINKRX_BACKEND gives an error of one line, and exit code 1."""
    done = linkrx_command("doctor", "lo", LINKRX_BACKEND="carrier_pigeon")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "linkrx: LINKRX_BACKEND=carrier_pigeon: there is no backend 'carrier_pigeon'"
    )
    assert done.stderr.count("\n") == 1


def test_doctor_on_an_unknown_interface() -> None:
    """For an interface that does not exist, the doctor prints the error on stderr, and exits with 1."""
    with pytest.raises(linkrx.UnsupportedSource) as caught:
        linkrx.probe("nowhere0")
    done = linkrx_command("doctor", "nowhere0")
    assert (done.returncode, done.stderr) == (1, f"linkrx: {caught.value}\n")


def test_doctor_without_the_core() -> None:
    """Without the C core the doctor gives the reason for the backends that need it, and exits with 0."""
    done = run("-c", WITHOUT_CORE, "doctor")
    assert done.returncode == 0
    assert re.search(r"^C core +no: the C core cannot be loaded", done.stdout, re.MULTILINE)
    for name in ("packet_mmap", "readv", "recvmmsg"):
        assert re.search(rf"^{name} +unavailable  the C core cannot be loaded", done.stdout, re.MULTILINE)
    assert re.search(r"^os_readv +supported", done.stdout, re.MULTILINE)


# capset(2) with the third version of its header (linux/capability.h): the process drops all capabilities.
UNPRIVILEGED = """
import ctypes, struct, sys
header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
assert ctypes.CDLL(None).capset(header, none) == 0
from linkrx.cli.main import main
sys.exit(main(["doctor", "lo"]))
"""


def test_doctor_without_privileges() -> None:
    """Without CAP_NET_RAW the doctor says what does not work and what to type, and exits with 1 for an interface."""
    done = run("-c", UNPRIVILEGED)
    assert done.returncode == 1
    assert re.search(
        r"^CAP_NET_RAW +no: no interface can be opened by name; `sudo setpriv .*=\+net_raw COMMAND`",
        done.stdout,
        re.MULTILINE,
    )
    assert re.search(r"^CAP_NET_ADMIN +no: no TAP or TUN device", done.stdout, re.MULTILINE)
    assert done.stderr.startswith("linkrx: opening a packet socket on 'lo' needs CAP_NET_RAW; `sudo setpriv ")


def test_help_is_complete() -> None:
    """Help lists every command, the environment, the exit codes and examples, and each command has its own help."""
    done = linkrx_command("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("demo", "doctor", "LINKRX_BACKEND", "LINKRX_AVOID", "exit codes:", "examples:", "--version"):
        assert part in done.stdout
    assert "--count" in linkrx_command("demo", "--help").stdout
    assert "SOURCE" in linkrx_command("doctor", "--help").stdout


def test_version() -> None:
    """`--version` prints the name and the version."""
    assert linkrx_command("--version").stdout == f"linkrx {linkrx.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [(), ("fly",), ("demo", "--count", "0"), ("demo", "-c", "x"), ("doctor", "a", "b")]
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    """Wrong usage gives exit code 2, with a message on stderr and nothing on stdout."""
    done = linkrx_command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error:" in done.stderr
