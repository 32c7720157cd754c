"""Tables and a picture for users: packets that come alone, paced streams, and work in `deliver`."""

from __future__ import annotations

from lone import BY_HAND
from plot import Bar, Panel, number
from results import SOURCES, Facts, Lines, Results, figure, ns_of, quotient, table, why_not
from works import WORKS

RATES = (5_000, 50_000, 200_000)
WORK_SIZES = (64, 1514)
IN_C = "C: poll, read"
PACED_BY_HAND = {
    IN_C: "poll, os.read",
    "run, readv": "poll, os.read",
    "run, os_readv": "poll, os.read",
    "run, latency=0.0005": "poll, os.read",
    "add_reader, drain": "add_reader, os.read",
    "async for": "add_reader, os.read",
}
PEERS = {
    "ring": ("pcapy-ng dispatch", "cypcap dispatch"),
    "tap": ("os.read",),
    "packet": ("socket.recv",),
}
SAID = {
    "nothing": "nothing",
    "len": "`len(packet)`",
    "one byte": "one byte",
    "bytes": "`bytes(packet)`",
    "tobytes": "`packet.tobytes()`",
    "headers, data": "IP and UDP header, `packet.data`",
    "headers, index": "IP and UDP header, `packet[i]`",
    "keep": "keep it",
}


def lone_table(results: Results) -> Lines:
    """Every call and backend on TAP and packet socket: nanoseconds, and the ratio to the loop by hand."""
    rows = []
    for facts in results.of("test_lone"):
        backends = list(dict.fromkeys(name.rpartition(", ")[2] for name in facts.get("readers", {})))
        for way, hand in BY_HAND.items():
            for backend in backends:
                name = f"{way}, {backend}"
                if (ratio := quotient(facts, name, hand)) is not None:
                    rows.append(
                        [
                            f"{SOURCES[facts['source']]}, `{backend}`: {way}",
                            figure(ns_of(facts, name)),
                            hand,
                            figure(ns_of(facts, hand)),
                            figure(ratio),
                        ]
                    )
    return table(["a packet that comes alone", "linkrx, ns", "by hand", "ns", "ratio"], rows)


def paced_table(results: Results) -> Lines:
    """The receiver's processor time at every rate, and the ratio to the loop by hand."""
    streams = {rate: results.one("test_paced", rate=rate) for rate in RATES}
    measured = {rate: facts for rate, facts in streams.items() if facts and "readers" in facts}
    names = dict.fromkeys(name for facts in measured.values() for name in facts["readers"])
    head = ["a paced stream on TAP: receiver, CPU ns per packet"]
    head += [cell for rate in measured for cell in (f"{rate:,}/s", "ratio")]
    rows = []
    for name in names:
        hand = PACED_BY_HAND.get(name, name)
        cells = [name]
        for facts in measured.values():
            cells += [figure(ns_of(facts, name)), figure(quotient(facts, name, hand))]
        rows.append(cells)
    left_out = {name: why_not(facts, name) for facts in measured.values() for name in facts["left_out"]}
    notes = [f"\nNot measured: {name}: {why}" for name, why in left_out.items()]
    figures = [one for facts in measured.values() for one in facts["readers"].values()]
    disturbed = sum(len(one["disturbed"]) for one in figures)
    if disturbed:
        notes.append(
            f"\nOther processes disturbed {disturbed} of {sum(len(one['rounds']) for one in figures)} streams."
        )
    return table(head, rows) + notes


def work_table(results: Results, source: str) -> Lines:
    """All kinds of work on a source at both sizes: nanoseconds of linkrx, and the ratio of the other readers to it."""
    cells = {
        (facts["work"], facts["size"]): facts
        for facts in results.of("test_work", source=source)
        if "readers" in facts
    }
    peers = [name for name in PEERS[source] if any(name in facts["readers"] for facts in cells.values())]
    head = [f"work in `deliver`, {SOURCES[source]}"]
    head += [cell for size in WORK_SIZES for cell in (f"{size} B, ns", *(f"{name} takes" for name in peers))]
    rows = []
    for work in WORKS:
        row = [SAID[work]]
        for size in WORK_SIZES:
            facts = cells.get((work, size))
            ours = ns_of(facts, "linkrx")
            row.append(figure(ours) if ours else why_not(facts, "linkrx"))
            row += [times(quotient(facts, name, "linkrx")) for name in peers]
        rows.append(row)
    left_out = {name: why for facts in cells.values() for name, why in facts["left_out"].items()}
    notes = [f"\nNot measured: {name}: {why}" for name, why in left_out.items() if name != "linkrx"]
    return (table(head, rows) + notes) if cells else []


def times(value: float | None) -> str:
    """A ratio as text."""
    return "" if value is None else f"{number(value)} times"


def kept_table(results: Results) -> Lines:
    """The memory of kept packets."""
    rows = [
        [
            f"{SOURCES[facts['source']]}, {facts['size']} B",
            *(figure(value) for value in facts["kept"].values()),
        ]
        for facts in results.of("test_kept")
        if "kept" in facts
    ]
    head = ["memory, bytes per packet that is kept", "as `bytes`", "every packet", "one in 512"]
    return table(head, rows)


Row = tuple[str, "Facts | None", str, str]  # work, source, and the names of linkrx and of the other reader


# The rows of world_rows() for the README.
IN_README = (
    "one packet waiting on a TAP: `dispatch`",
    "50,000 packets/s on a TAP: `run`",
    "`deliver`, interface, ring, 64 B: nothing",
    "`deliver`, interface, ring, 64 B: `bytes(packet)`",
    "`deliver`, TAP, 1514 B: `bytes(packet)`",
)


def world_rows(results: Results) -> list[Row]:
    """A dozen rows for users."""
    lone = results.one("test_lone", source="tap")
    slow, fast = results.one("test_paced", rate=5_000), results.one("test_paced", rate=50_000)

    def work(source: str, size: int, name: str) -> Row:
        facts, peer = results.one("test_work", source=source, size=size, work=name), PEERS[source][0]
        return f"`deliver`, {SOURCES[source]}, {size} B: {SAID[name]}", facts, "linkrx", peer

    return [
        ("one packet waiting on a TAP: `dispatch`", lone, "dispatch, readv", "os.read"),
        ("the same: `recv`", lone, "recv, readv", "os.read"),
        ("the same, without the C core: `dispatch`", lone, "dispatch, os_readv", "os.read"),
        ("5,000 packets/s on a TAP: `run`", slow, "run, readv", "poll, os.read"),
        ("50,000 packets/s on a TAP: `run`", fast, "run, readv", "poll, os.read"),
        ("5,000 packets/s: `add_reader`, `drain`", slow, "add_reader, drain", "add_reader, os.read"),
        ("5,000 packets/s: `async for`", slow, "async for", "add_reader, os.read"),
        work("ring", 64, "nothing"),
        work("ring", 64, "one byte"),
        work("ring", 64, "bytes"),
        work("ring", 64, "headers, data"),
        work("ring", 1514, "bytes"),
        work("tap", 1514, "bytes"),
    ]


def world_table(results: Results) -> Lines:
    """The table of world_rows()."""
    return compared(world_rows(results))


def speed_table(results: Results) -> Lines:
    """The table of the rows for the README."""
    rows = {row[0]: row for row in world_rows(results)}
    return compared([rows[name] for name in IN_README])


def compared(measured: list[Row]) -> Lines:
    """The nanoseconds of two readers, and their ratio."""
    rows = []
    for what, facts, ours, theirs in measured:
        ratio = quotient(facts, ours, theirs)
        if ratio is not None:
            rows.append(
                [what, figure(ns_of(facts, ours)), f"`{theirs}`", figure(ns_of(facts, theirs)), figure(ratio)]
            )
    return table(["ns per packet", "linkrx", "beside", "ns", "ratio"], rows)


def panels(results: Results) -> list[Panel]:
    """The picture: lone packets, paced streams, and work on a ring and a TAP."""
    drawn = []

    def panel(title: str, facts: Facts | None, compared: dict[str, str]) -> None:
        shown = [name for name in compared if ns_of(facts, name) is not None]
        hands = dict.fromkeys(compared[name] for name in shown)
        bars = [
            bar(
                name,
                facts,
                compared.get(name, name),
                "linkrx" if name in compared and name != IN_C else "floor",
            )
            for name in (*hands, *shown)
        ]
        if bars:
            drawn.append(Panel(title, bars))

    ways = {
        f"{way}, {backend}": hand
        for backend in ("readv", "os_readv")
        for way, hand in BY_HAND.items()
        if backend == "readv" or way == "dispatch"
    }
    panel("A packet that comes alone, on a TAP", results.one("test_lone", source="tap"), ways)
    for rate in RATES:
        facts = results.one("test_paced", rate=rate)
        panel(f"{rate:,} packets a second on a TAP: the receiver's CPU time", facts, PACED_BY_HAND)
    for source, size in (("ring", 64), ("ring", 1514), ("tap", 1514)):
        bars = []
        for work in WORKS:
            facts, peer = results.one("test_work", source=source, size=size, work=work), PEERS[source][0]
            if quotient(facts, "linkrx", peer) is not None:
                said = SAID[work].replace("`", "")
                bars.append(bar("linkrx", facts, peer, "linkrx", f"{said}: linkrx"))
                bars.append(bar(peer, facts, peer, "peer" if source == "ring" else "floor", peer))
        if bars:
            drawn.append(Panel(f"Work in deliver, {SOURCES[source]}, {size} bytes", bars))
    return drawn


def bar(name: str, facts: Facts | None, other: str, kind: str, title: str = "") -> Bar:
    """A bar for a reader that was measured."""
    ns, ratio = ns_of(facts, name), quotient(facts, name, other)
    assert ns is not None
    assert ratio is not None
    return Bar(title or name, ns, ratio, kind)
