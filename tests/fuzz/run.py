"""Fuzzes one file of the C core: `python tests/fuzz/run.py classify --seconds 60`. It needs clang with libFuzzer.

It starts from the inputs in NAME.hex, one per line in hexadecimal. With `--keep` it writes back a set of inputs with the same
coverage as all inputs. A line with a comment once found a defect, and is kept.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORE = HERE.parent.parent / "linkrx" / "_core"
NAMES = ("bpf", "capture_file", "classify", "packet_mmap", "readv", "recvmmsg", "segment")

SANITIZERS = "address,undefined"
FLAGS = ("-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all")

# The limit of a corpus, so that it can be read, and replayed in a second.
LINES = 60
CHARACTERS = 20_000
INPUT_BYTES = 600


def compiled(compiler: str, name: str, folder: Path, *, sanitizers: str, core: Path = CORE) -> Path:
    """Build the harness of that name in `folder`. With `fuzzer` among the sanitizers, libFuzzer provides main()."""
    program = folder / name
    sources = [HERE / f"{name}.c"] + ([] if "fuzzer" in sanitizers else [HERE / "replay.c"])
    if name != "bpf":
        sources += [core / f"{filters}.c" for filters in ("bpf", "bpf_check", "bpf_loads")]
        if name != "classify":
            sources.append(core / "classify.c")  # a fill ends with classification
    subprocess.run(
        [compiler, *FLAGS, f"-fsanitize={sanitizers}", f"-I{core}", *map(str, sources), "-o", str(program)],
        check=True,
    )
    return program


def lines_of(name: str) -> list[str]:
    """The lines of a corpus, one input each."""
    path = HERE / f"{name}.hex"
    return path.read_text().splitlines() if path.exists() else []


def write_seeds(name: str, folder: Path) -> list[Path]:
    """Write a file for each line of a corpus."""
    folder.mkdir()
    paths = []
    for number, line in enumerate(lines_of(name), 1):
        paths.append(folder / f"line{number}")
        paths[-1].write_bytes(bytes.fromhex(line.partition("#")[0]))
    return paths


def merged(program: Path, into: Path, counters: int, *folders: Path) -> list[bytes]:
    """The inputs that together have the full coverage. With `counters`, also the same execution counts."""
    into.mkdir()
    subprocess.run([program, "-merge=1", f"-use_counters={counters}", into, *folders], check=True)
    return sorted((path.read_bytes() for path in into.iterdir()), key=lambda data: (len(data), data))


def keep(name: str, needed: list[bytes], wanted: list[bytes]) -> None:
    """Write a corpus: inputs that found a defect, inputs that coverage needs, and further inputs up to the limit."""
    lines = [line for line in lines_of(name) if "#" in line]
    spare = max(0, LINES - len(lines) - len(needed))
    lines += [data.hex() for data in needed + wanted[:: len(wanted) // (spare + 1) + 1] if data]
    lines = list(dict.fromkeys(lines))
    while len(lines) > LINES or sum(len(line) + 1 for line in lines) > CHARACTERS:
        print("left out, for it is too much:", lines.pop())
    (HERE / f"{name}.hex").write_text("".join(f"{line}\n" for line in lines))


def main(arguments: list[str] | None = None) -> int:
    """Build, fuzz, and print the path of an input that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--keep", action="store_true", help="merge what was found into NAME.hex")
    parser.add_argument(
        "--inputs", type=Path, help="a folder of inputs of your own, added to as they are found"
    )
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        program = compiled("clang", chosen.name, folder, sanitizers=f"fuzzer,{SANITIZERS}")
        seeds, found = folder / "seeds", chosen.inputs or folder / "found"
        write_seeds(chosen.name, seeds)
        found.mkdir(exist_ok=True)
        limits = (f"-max_total_time={chosen.seconds}", f"-max_len={INPUT_BYTES}", "-timeout=10")
        failed = Path.cwd() / f"{chosen.name}-"
        code = subprocess.run(
            [program, *limits, f"-artifact_prefix={failed}", "-print_final_stats=1", found, seeds]
        ).returncode
        if code == 0 and chosen.keep:
            needed = merged(program, folder / "needed", 0, seeds, found)
            keep(chosen.name, needed, merged(program, folder / "wanted", 1, seeds, found))
    return code


if __name__ == "__main__":
    sys.exit(main())
