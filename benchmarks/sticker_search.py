"""
Speed and recall of sticker search against bare FAISS, one JSON line.

    python benchmarks/sticker_search.py [--without_million]

Vectors are synthetic: 384 dimensions like MiniLM's, drawn around centres of centres, since sentence vectors of stickers crowd by emotion and theme.
Ratios are of medians taken in turn in one run.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np

from dataset_builders.schema import EMOTIONS, Sticker
from dataset_builders.stickers.pack import PackInfo, StickerPack
from dataset_builders.stickers.search import FIELDS, StickerSearch, VectorIndex


DIM, K, QUERIES = 384, 10, 200


def make_vectors(count: int, seed: int = 0) -> np.ndarray:
    """`count` unit vectors `(count, DIM)` in 200 themes of 50 scenes each."""
    rng = np.random.default_rng(seed)
    themes = rng.normal(size=(200, DIM)).astype(np.float32)
    scenes = (themes[:, None] + 0.7 * rng.normal(size=(200, 50, DIM)).astype(np.float32)).reshape(-1, DIM)
    vectors = np.empty((count, DIM), np.float32)
    for start in range(0, count, 50_000):
        stop = min(start + 50_000, count)
        near = scenes[rng.integers(0, len(scenes), stop - start)]
        vectors[start:stop] = near + 0.7 * rng.normal(size=(stop - start, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_queries(vectors: np.ndarray, seed: int = 1) -> np.ndarray:
    """Queries `(QUERIES, DIM)` near vectors of the pack, none of them one."""
    rng = np.random.default_rng(seed)
    near = vectors[rng.integers(0, len(vectors), QUERIES)] + rng.normal(scale=0.03, size=(QUERIES, DIM)).astype(
        np.float32
    )
    return near / np.linalg.norm(near, axis=1, keepdims=True)


def times(*searches) -> list[np.ndarray]:
    """Seconds of each query by each search, taken in turn."""
    taken: list[list[float]] = [[] for _ in searches]
    for query in range(QUERIES):
        for seconds, search in zip(taken, searches, strict=True):
            started = time.perf_counter()
            search(query)
            seconds.append(time.perf_counter() - started)
    return [np.array(seconds[5:]) for seconds in taken]


def exact(count: int) -> dict:
    """Exact search in pictures' vectors (one a sticker) against bare FAISS."""
    vectors = make_vectors(count)
    queries = make_queries(vectors)
    bare = faiss.IndexFlatIP(DIM)
    bare.add(vectors)
    stickers = [
        Sticker(id=str(i), image_path="x", emotion=EMOTIONS[i % 7], width=1, height=1, sha256="0")
        for i in range(count)
    ]
    ours = StickerSearch(stickers, np.zeros((count, len(FIELDS), 1), np.float32), None, image=vectors)
    plain, searched = times(
        lambda q: bare.search(queries[q : q + 1], K), lambda q: ours.by_vector(queries[q], "image", K)
    )
    return {
        "bare_ms": round(1000 * float(np.median(plain)), 3),
        "ratio": round(float(np.median(searched) / np.median(plain)), 3),
    }


def approximate(count: int) -> dict:
    """Search by cells: recall against exact search, and time."""
    vectors = make_vectors(count)
    queries = make_queries(vectors)
    started = time.perf_counter()
    index = VectorIndex(vectors, exact=False)
    built = time.perf_counter() - started
    bare = faiss.IndexFlatIP(DIM)
    bare.add(vectors)
    _, right = bare.search(queries, K)
    (seconds,) = times(lambda q: index.search(queries[q : q + 1], K))
    found = np.concatenate([index.search(queries[q : q + 1], K)[1] for q in range(QUERIES)])
    recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(right.tolist(), found.tolist(), strict=True)])
    return {
        "build_s": round(built, 1),
        "recall_at_10": round(float(recall), 4),
        "p50_ms": round(1000 * float(np.median(seconds)), 2),
        "p99_ms": round(1000 * float(np.quantile(seconds, 0.99)), 2),
    }


def open_pack(count: int) -> float:
    """Seconds to open a built pack of `count` stickers."""
    tiny = bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
        "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
    )
    text = "a sentence of the length that annotations of stickers usually have, more or less"
    stickers = [
        Sticker(id=f"sticker-{i}", image_path=f"{i}.png", emotion=EMOTIONS[i % 7], width=1, height=1, sha256=f"{i:064x}", description=f"{i} {text}", emotion_description=f"{i} {text}", recommendation=f"{i} {text}", tags=("one", "two", "three"))
        for i in range(count)
    ]  # fmt: skip
    info = PackInfo(name="synthetic", version="1", licence="CC0-1.0", attribution="", source="")
    with TemporaryDirectory() as folder:
        StickerPack(info, stickers, {s.id: tiny for s in stickers}).save(folder)
        started = time.perf_counter()
        StickerPack.load(Path(folder)).image("sticker-77")
        return time.perf_counter() - started


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without_million", action="store_true", help="leave out the million vectors (6 GB, minutes)")
    args = parser.parse_args()
    figures: dict = {
        "exact_10k": exact(10_000),
        "exact_100k": exact(100_000),
        "cells": {str(n): approximate(n) for n in (125_000, 250_000, *([] if args.without_million else [1_000_000]))},
        "open_10k_s": round(open_pack(10_000), 3),
    }
    builds = {int(n): cells["build_s"] for n, cells in figures["cells"].items()}
    figures["build_s_per_100k"] = {n: round(s / n * 1e5, 2) for n, s in builds.items()}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
