"""How soon a prompt file of 10 GB gives its first rollouts, and in how much memory: `python tests/bench/data.py`. Writes docs/benchmarks/data.json.

Each format is written by this script to --folder (10 GB, deleted after) and read in a process of its own that sees it for the first time: the
pages of the file are dropped from memory before.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROWS_AT_ONCE = 20_000
PROMPTS = 4096


def main() -> int:
    """0 when every figure has met its target."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench")]
    import figures
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--read", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read(arguments.read)))
        return 0
    command = "python tests/bench/data.py" + (f" --gb {arguments.gb:g}" if arguments.gb != 10 else "")
    found = []
    for kind in ("jsonl", "parquet", "arrow"):
        found += [f | {"command": command, "machine": figures.this_machine()} for f in measure(kind, arguments.gb, arguments.folder)]
    figures.write("data", found)
    for f in found:
        print(f"{'      ' if figures.met(f) else 'MISSED'} {f['name']}: {f['value']:.3g} {f['unit']}  {f['target']}  ({f['reference']})")
    return 0 if all(map(figures.met, found)) else 1


def measure(kind: str, gb: float, folder: Path) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        path = write(kind, Path(tmp), gb)
        files = [p for p in (sorted(path.iterdir()) if path.is_dir() else [path])]
        size = sum(p.stat().st_size for p in files) / 1e9
        forget(files)
        told = json.loads(subprocess.run([sys.executable, __file__, "--read", str(path)], capture_output=True, text=True, check=True).stdout)
        forget(files)
        started = time.perf_counter()
        for p in files:
            with p.open("rb") as file:
                while file.read(2**24):
                    pass
        whole_s = time.perf_counter() - started
    name = f"{kind}, {size:.1f} GB on disk"
    return [
        figure(f"{name}: to the first 256 prompts, shuffled", told["first_s"], "s", "<= 10",
               f"{whole_s:.1f} s to read the file once, on the same disk"),
        figure(f"{name}: {PROMPTS} prompts", told["all_s"], "s", "", "the same"),
        figure(f"{name}: memory of its own at the end", told["own_mb"], "MB", "<= 512",
               f"{size * 1e3:.0f} MB in the file; mapped pages are not counted"),
    ]


def figure(name: str, value: float, unit: str, target: str, reference: str) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "target": target, "reference": reference}


def read(path: str) -> dict[str, float]:
    """In the child: what a controller does before its first groups, and the memory that it took."""
    from rlmono.data.cursor import DataCursor
    from rlmono.data.prompts import open_source
    from rlmono.data.rows import Rules
    started = time.perf_counter()
    rules = Rules("prompt", "label", label_required=True, length_limit=1000, length_of=lambda prompt: len(prompt.prompt) // 4)
    source = open_source(path, rules)
    cursor = DataCursor(source, seed=1, shuffle=True)
    for row in cursor.next(256):
        source.row(row)
    first_s = time.perf_counter() - started
    for row in cursor.next(PROMPTS - 256):
        source.row(row)
    cursor.state()
    all_s = time.perf_counter() - started
    # Anonymous memory; pages of mapped files are the kernel's, to drop when it likes.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"first_s": first_s, "all_s": all_s, "own_mb": int(status["RssAnon"].split()[0]) / 1024,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def forget(files: list[Path]) -> None:
    """Drop the files' pages from memory."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write(kind: str, folder: Path, gb: float) -> Path:
    """A file of rows of about 1 kB; the same ones come again and again, which no reader here can tell."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    if shutil.disk_usage(folder).free < 1.2e9 * gb:
        raise SystemExit(f"{folder}: there is no room for {gb:g} GB; name another --folder")
    text = "Let ABC be a triangle with integer sides; find the number of such triangles with perimeter n. " * 10
    rows = [{"prompt": f"{i}: {text[i % 7:]}", "label": str(i)} for i in range(ROWS_AT_ONCE)]
    times = range(round(gb * 1e9 / 1000 / ROWS_AT_ONCE))
    table = pa.Table.from_pylist(rows)
    if kind == "jsonl":
        path, lines = folder / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()
        with path.open("wb") as file:
            for _ in times:
                file.write(lines)
        return path
    if kind == "parquet":
        path = folder / "a.parquet"
        with pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=False) as writer:
            for _ in times:
                writer.write_table(table, row_group_size=1000)
        return path
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        for _ in times:
            stream.write_table(table, max_chunksize=1000)
    return folder


if __name__ == "__main__":
    sys.exit(main())
