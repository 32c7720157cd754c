"""Replays the inputs that fuzzing found, without a fuzzer, and proves that the harnesses detect defects."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from fuzz import run

# The exit codes of gcc's and clang's sanitizers. abort() ends the program with a signal.
CLEAN = 0


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A C compiler that has the sanitizers."""
    found = shutil.which("cc")
    if found is None:
        pytest.skip("needs a C compiler: there is no cc")
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.c").write_text("int main(void) { return 0; }\n")
    built = subprocess.run(
        [found, f"-fsanitize={run.SANITIZERS}", str(folder / "empty.c"), "-o", str(folder / "empty")],
        capture_output=True,
        text=True,
    )
    if built.returncode:
        pytest.skip(f"needs a C compiler with -fsanitize={run.SANITIZERS}: {built.stderr.strip()}")
    return found


def replayed(
    compiler: str, name: str, folder: Path, core: Path = run.CORE
) -> subprocess.CompletedProcess[str]:
    """Run a harness on its whole corpus."""
    program = run.compiled(compiler, name, folder, sanitizers=run.SANITIZERS, core=core)
    seeds = run.write_seeds(name, folder / "seeds")
    assert seeds
    return subprocess.run([program, *seeds], capture_output=True, text=True, timeout=60)


@pytest.mark.repeats
@pytest.mark.parametrize("name", run.NAMES)
def test_corpus(compiler: str, tmp_path: Path, name: str) -> None:
    """Every input of the corpus passes the harness and both sanitizers."""
    result = replayed(compiler, name, tmp_path)
    assert result.returncode == CLEAN, result.stderr[-3000:]
    assert result.stdout == f"{len(run.lines_of(name))} inputs\n"


@pytest.mark.parametrize("name", run.NAMES)
def test_corpus_is_small(name: str) -> None:
    """A corpus is short enough to read."""
    lines = run.lines_of(name)
    assert len(lines) <= run.LINES
    assert sum(len(line) + 1 for line in lines) <= run.CHARACTERS


# Each is one change to the text of the core. The first of readv, and the first four of recvmmsg, were real defects.
DEFECTS = {
    "a load ends a byte behind the frame": ("bpf", "simple - offset >= size", "simple - offset + 1 >= size"),
    "a load with the tag put back ends behind the frame": (
        "bpf",
        "from + size > v->length",
        "from + size > v->length + 1ull",
    ),
    "a division by zero goes on": (
        "bpf",
        "mod_##name : if (!operand) return 0;",
        "mod_##name : if (!operand) NEXT;",
    ),
    "a jump behind the end": ("bpf", "i->jt < left && i->jf < left", "i->jt < left"),
    "scratch that nobody has written": ("bpf", "written[at + 1 + i->jf] &= now;", ""),
    "a filter that cuts does not tell": (
        "classify",
        "wire_length > length)\n            flags",
        "in.wire_lengths[k] > length)\n            flags",
    ),
    "runts are packets": ("classify", "length < link_header", "length + 1 < link_header"),
    "empty is shorter": ("classify", "length <= prefix", "length < prefix"),
    "a reported interface is forgotten": (
        "classify",
        "in.interfaces[k] ? in.interfaces[k] : usual_interface",
        "usual_interface",
    ),
    "a reported link type is forgotten": ("classify", "in.link_types[k] ? in.link_types[k] : ", ""),
    "a reported protocol hides the inner tag": ("classify", "protocol = ETHERTYPE_VLAN;", ";"),
    "an address as long as it claims": (
        "recvmmsg",
        "    if (length > most)\n        length = most;\n",
        "",
    ),
    "a frame crosses the end of its block": (
        "packet_mmap",
        "s->offset + mac + *snaplen > s->block_size",
        "s->offset + *snaplen > s->block_size",
    ),
    "a header crosses the end of its block": (
        "packet_mmap",
        "(uint64_t)s->offset + TPACKET3_HDRLEN > s->block_size || ",
        "",
    ),
    "an error overtakes packets": (
        "packet_mmap",
        " || ONCE(block_header(s)->num_pkts))",
        ")",
    ),
    "no packet that just fits": (
        "packet_mmap",
        "(uint64_t)cursor + length > size",
        "(uint64_t)cursor + length >= size",
    ),
    "a header with what is in front of it": (
        "packet_mmap",
        "memcpy(header, frame - VNET_WRITTEN, VNET_WRITTEN);",
        "memcpy(header, frame - s->vnet, s->vnet);",
    ),
    "an unreleased block is read again": (
        "packet_mmap",
        "    if (is_unreleased(s))\n        return false;\n",
        "",
    ),
    "starts in place forget the header in front": (
        "packet_mmap",
        "(uint32_t)(frame - s->vnet - frames)",
        "(uint32_t)(frame - frames)",
    ),
    "a batch in place goes round the end of the ring": (
        "packet_mmap",
        " || (s->in_place && begun && s->block == 0)",
        "",
    ),
    "an error waits for empty blocks": (
        "packet_mmap",
        "    if (n == 0 && s->in_place)\n        lrx_ring_release(s, slot); /* empty blocks */\n",
        "",
    ),
    "a ring that is not mapped is released": ("packet_mmap", "    if (!is_mapped(s))\n        return;\n", ""),
    "interrupted poll reads": ("readv", "case -1:\n            return -1;", ""),
    "room for all but the cut byte": ("readv", "cursor + r->capacity < size", "cursor + r->capacity <= size"),
    "an error behind packets is lost": ("readv", "= (uint32_t)error;", "= 0;"),
    "short names say nothing": (
        "recvmmsg",
        "named >= offsetof(struct sockaddr_ll, sll_addr)",
        "named >= sizeof *from",
    ),
    "an old timestamp shows": (
        "recvmmsg",
        "out->timestamps[n] = timestamp",
        "out->timestamps[n] += timestamp",
    ),
    "an old tag shows": ("recvmmsg", "out->vlan_tcis[n] = tci", "out->vlan_tcis[n] |= tci"),
    "a control message behind the end": ("recvmmsg", " || length > left)", ")"),
    "no further packet for want of a row": ("recvmmsg", "wanted && n < most);", "wanted && n + 1 < most);"),
    "an empty queue is asked again": ("recvmmsg", "(uint32_t)got == wanted &&", "got > 0 &&"),
    "an error behind packets of a fill is lost": (
        "recvmmsg",
        "if (got < 0 && got != -EAGAIN) {",
        "if (n == 0 && got < 0 && got != -EAGAIN) {",
    ),
    "the last packet has no room": (
        "recvmmsg",
        "size / (s->near_stride + s->far_stride)",
        "size / (s->near_stride + s->far_stride) + 1",
    ),
    "the start of a long packet is missing": (
        "recvmmsg",
        "memcpy(memory + whole, memory + out.starts[n], s->near);",
        "memcpy(memory + whole, memory + out.starts[n], s->near - 1);",
    ),
    "the arena ends at the last packet": (
        "recvmmsg",
        "if (end < lrx_align(",
        "if (n != UINT32_MAX || end < lrx_align(",
    ),
    "room is aligned without a look": ("segment", "end > o->size)", "end > o->size + 7ull)"),
    "IPv4 options behind the end": ("segment", "size >= IPV4_HEADER && size <= room", "size >= IPV4_HEADER"),
    "half an extension header": ("segment", "room - size < 8", "room == size"),
    "a cut super-packet is split": ("segment", "if (truncated || !v->gso_size", "if (!v->gso_size"),
    "a checksum at the very end": (
        "segment",
        "v->csum_offset + 2 <= p->length",
        "v->csum_offset + 1 <= p->length",
    ),
    "UDP with no checksum": (
        "segment",
        "put_word(l4 + UDP_CHECKSUM_AT, checksum ? checksum : 0xFFFF)",
        "put_word(l4 + UDP_CHECKSUM_AT, checksum)",
    ),
    "CWR on every segment": ("segment", "if (k)\n", "if (k > p->segments)\n"),
    "the last segment is not the last": ("segment", "if (k + 1 < p->segments)", "if (k < p->segments)"),
    "done is forgotten": (
        "segment",
        "s->done < p.segments; s->done++",
        "s->done + 1 < p.segments; s->done++",
    ),
    "receives are reported twice": ("segment", "    taken->receives = 0;\n", ""),
}


@pytest.mark.repeats
@pytest.mark.parametrize("defect", DEFECTS)
def test_harness_sees_defect(compiler: str, tmp_path: Path, defect: str) -> None:
    """The harness fails for a core with this defect."""
    name, right, wrong = DEFECTS[defect]
    core = tmp_path / "core"
    shutil.copytree(run.CORE, core, ignore=shutil.ignore_patterns("*.so", "*.py", "_native.c"))
    # In the harness's own file, or in one that it needs.
    (there, *_) = [
        path
        for path in sorted(core.glob("*.[ci]*"), key=lambda path: path.name != f"{name}.c")
        if right in path.read_text()
    ]
    text = there.read_text()
    assert text.count(right) == 1
    there.write_text(text.replace(right, wrong))
    assert replayed(compiler, name, tmp_path, core).returncode != CLEAN
