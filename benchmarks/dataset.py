"""
Building StickerConv at the paper's size against bare pyarrow, one JSON line.

    python benchmarks/dataset.py [--sessions 13000]

The sessions are synthetic: random words, the paper's numbers of turns and stickers, stickers of the `openmoji` pack. Bare pyarrow is a script that reads the same file with
`json` and writes the same rows with the same schemas, compression and row groups; it checks nothing. The two take turns, and the ratio is of their best times. A second ratio is
to the writing alone, of rows that are in memory already. Peaks of memory are of processes that do nothing but build; the first streamed row counts from the call of
`load_dataset` in a fresh process that has imported torch, which `datasets` does at the first stream.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq

from dataset_builders.schema import EMOTIONS
from dataset_builders.stickerconv.build import ROWS, build_dataset
from dataset_builders.stickerconv.features import FEATURES, encode_emotions, turn_rows
from dataset_builders.stickerconv.inputs import known_openmoji
from dataset_builders.stickers.pack import ROWS_A_GROUP


STICKER_RATE = 67_000 / (13_000 * 5.5 * 2)
ROUNDS = 3
STREAM = """
import os, sys, time
import torch  # `datasets` imports it for every stream; that is no part of the row
from datasets import load_dataset
if sys.argv[2]:
    import dataset_builders
started = time.perf_counter()
files = {"data_files": sys.argv[2]} if sys.argv[2] else {}
stream = load_dataset(sys.argv[1], "turns", split="train", streaming=True, **files)
row = next(iter(stream))
print(time.perf_counter() - started, flush=True)
os._exit(0 if row["messages"] else 1)  # an abandoned stream of parquet aborts at exit
"""
PEAK = """
import re, sys
from pathlib import Path
from dataset_builders.stickerconv.build import build_dataset
build_dataset([sys.argv[1]], Path(sys.argv[2]))
# getrusage would tell the peak of the process that started this one, if that was higher
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
"""


def write_sessions(file: Path, count: int, seed: int = 0) -> int:
    """Write synthetic sessions; returns how many stickers they send."""
    rng, known = random.Random(seed), known_openmoji()
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    of_database = {n: [i for i, d in known.databases.items() if d == n] for n in range(1, known.count + 1)}
    sent = 0

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    def message(database: int) -> dict:
        nonlocal sent
        use = None
        if rng.random() < STICKER_RATE:
            sent += 1
            use = {
                "id": rng.choice(of_database[database]),
                "emotion": rng.choice(EMOTIONS),
                "query": text(5),
                "rank": 0,
            }
            use["intention"] = "enhancing empathy"
        return {"text": text(rng.randint(8, 28)), "sticker": use}

    with file.open("w") as stream:
        for number in range(count):
            database = rng.randint(1, known.count)
            turns = [
                {"turn": turn, "user": message(database), "system": message(database)}
                for turn in range(1, rng.randint(5, 6) + 1)
            ]
            session = {
                "session_id": f"synthetic-{number:06d}",
                "split": "test" if database > 8 else "validation" if number % 11 == 0 else "train",
                "database": database,
                "profile": {"name": "A", "emotion": rng.choice(EMOTIONS), "persona": text(60), "situation": text(60)},
                "turns": turns,
                "ended_by": "closure",
                "generator": {"name": "synthetic", "version": "1"},
            }
            stream.write(json.dumps(session) + "\n")
    return sent


def write_rows(tables: dict[tuple[str, str], list[dict]], out: Path) -> float:
    """Seconds that bare pyarrow takes to write rows that are in memory, by configuration and split."""
    started = time.perf_counter()
    for (config, split), rows in tables.items():
        with open_writer(out, config, split) as writer:
            size = ROWS_A_GROUP if config == "stickers" else ROWS
            for start in range(0, len(rows), size):
                writer.write_table(pa.Table.from_pylist(rows[start : start + size], FEATURES[config].arrow_schema))
    return time.perf_counter() - started


def open_writer(out: Path, config: str, split: str) -> pq.ParquetWriter:
    """A writer with the build's settings."""
    file = out / f"{config}-{split}.parquet"
    return pq.ParquetWriter(file, FEATURES[config].arrow_schema, compression="zstd", write_page_index=True)


def run_script(file: Path, stickers: list[dict], out: Path) -> float:
    """Seconds of a script that reads the sessions with `json` and writes all rows with bare pyarrow, checking nothing."""
    started = time.perf_counter()
    writers: dict[tuple[str, str], pq.ParquetWriter] = {}
    waiting: dict[tuple[str, str], list[dict]] = {}

    def write(key: tuple[str, str]) -> None:
        if key not in writers:
            writers[key] = open_writer(out, *key)
        writers[key].write_table(pa.Table.from_pylist(waiting.pop(key), FEATURES[key[0]].arrow_schema))

    def add(config: str, split: str, rows: Iterable[dict]) -> None:
        waiting.setdefault((config, split), []).extend(rows)
        if len(waiting[config, split]) >= (ROWS_A_GROUP if config == "stickers" else ROWS):
            write((config, split))

    with file.open("rb") as stream:
        for line in stream:
            row = encode_emotions(json.loads(line))
            add("sessions", row["split"], [row])
            add("turns", row["split"], turn_rows(row))
    for sticker in stickers:
        add("stickers", "train", [sticker])
    for key in [key for key, rows in waiting.items() if rows]:
        write(key)
    for writer in writers.values():
        writer.close()
    return time.perf_counter() - started


def run(code: str, *args: object) -> float:
    """What a fresh process prints, a number."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=13_000)
    count = parser.parse_args().sessions
    with TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "run").mkdir()
        (root / "tenth").mkdir()
        sent = write_sessions(root / "run" / "sessions.jsonl", count)
        write_sessions(root / "tenth" / "sessions.jsonl", count // 10)
        info, _ = build_dataset([root / "run"], root / "stickerconv")
        tables = {
            (config, split): pq.read_table(
                root / "stickerconv" / config / f"{split}-00000-of-00001.parquet"
            ).to_pylist()
            for config, splits in info.sizes.items()
            for split in splits
        }
        stickers = tables["stickers", "train"] + tables["stickers", "test"]
        written = min(write_rows(tables, root) for _ in range(ROUNDS))
        del tables
        built, script = [], []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            build_dataset([root / "run"], root / "stickerconv")
            built.append(time.perf_counter() - started)
            script.append(run_script(root / "run" / "sessions.jsonl", stickers, root))
        pictures = sum(size.rows for size in info.sizes["stickers"].values())
        peaks = {name: run(PEAK, root / name, root / f"{name}-out") for name in ("tenth", "run")}
        result = {
            "sessions": count,
            "sticker_references": sent,
            "turns": sum(size.rows for size in info.sizes["turns"].values()),
            "pictures_stored": pictures,
            "build_seconds": round(min(built), 2),
            "bare_pyarrow_seconds": round(min(script), 2),
            "ratio_to_bare_pyarrow": round(min(built) / min(script), 2),
            "writing_alone_seconds": round(written, 2),
            "ratio_to_writing_alone": round(min(built) / written, 2),
            "first_streamed_row_seconds": {
                "built folder": round(run(STREAM, root / "stickerconv", ""), 2),
                "run folder": round(run(STREAM, "stickerconv", root / "run" / "sessions.jsonl"), 2),
            },
            "peak_mib": {f"{count // 10} sessions": round(peaks["tenth"]), f"{count} sessions": round(peaks["run"])},
            "peak_ratio_for_10x_rows": round(peaks["run"] / peaks["tenth"], 2),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
