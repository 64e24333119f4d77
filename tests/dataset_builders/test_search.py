import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_builders.schema import EMOTIONS, Sticker
from dataset_builders.stickers.encoder import TextEncoder
from dataset_builders.stickers.pack import PackError, PackInfo, StickerPack
from dataset_builders.stickers.search import (
    FIELDS,
    StickerSearch,
    VectorIndex,
    embed_pack_texts,
    open_search,
    save_embeddings,
)


class Words(TextEncoder):
    """Sums of a fixed random vector a word: texts that share words are alike."""

    def __init__(self):
        super().__init__("words")
        self.batches = []

    @property
    def model(self):
        return self

    def encode(self, texts, **_):
        self.batches.append(list(texts))
        rows = [
            sum(
                (np.random.default_rng(zlib.crc32(w.encode())).normal(size=64) for w in t.lower().split()),
                np.zeros(64),
            )
            for t in texts
        ]
        vectors = np.array(rows, np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def make(number, emotion, **texts):
    return Sticker(id=f"s{number}", image_path="x.png", emotion=emotion, width=1, height=1, sha256="0", **texts)


STICKERS = [
    make(0, "sadness", description="a crying dog", emotion_description="grief that needs company", recommendation="the vet has called"),
    make(1, "happiness", description="a dog with a ball", emotion_description="joy", recommendation="a walk"),
    make(2, "anger", description="a red face", emotion_description="rage", recommendation="the bus left early", tags=("furious", "steam")),
    make(3, "happiness", description="a cake", emotion_description="festive", recommendation="somebody turns forty"),
    make(4, None, tags=("plain", "thing")),
]  # fmt: skip


@pytest.fixture
def search():
    encode = Words()
    return StickerSearch(STICKERS, embed_pack_texts(STICKERS, encode), encode)


def test_the_best_field_is_told(search):
    assert [(h.id, h.matched) for h in search.by_texts(["a crying dog", "somebody turns forty", "furious steam"], k=1) for h in h] == [
        ("s0", "description"), ("s3", "recommendation"), ("s2", "tags")
    ]  # fmt: skip
    assert [hit.id for hit in search.by_text("the vet has called", k=5)][0] == "s0"
    assert len({hit.id for hit in search.by_text("dog", k=50)}) == len(STICKERS)


def test_an_emotion_filters_or_is_preferred(search):
    only = search.by_text("a crying dog", k=5, emotion="happiness")
    assert {hit.id for hit in only} == {"s1", "s3"}
    plain = {hit.id: hit.score for hit in search.by_text("a dog", k=5)}
    preferred = search.by_text("a dog", k=5, emotion="anger", mode="prefer")
    assert {hit.id for hit in preferred} == set(plain)
    for hit in preferred:
        assert hit.score == pytest.approx(plain[hit.id] + (0.15 if hit.id == "s2" else 0), abs=1e-5)
    assert [hit.score for hit in preferred] == sorted((hit.score for hit in preferred), reverse=True)
    assert search.by_emotion("anger")[0].id == "s2"


@given(st.integers(1, 40), st.integers(0, 99), st.integers(1, 12), st.sampled_from([None, *EMOTIONS]))
def test_search_is_brute_force(count, seed, k, emotion):
    rng = np.random.default_rng(seed)
    stickers = [make(i, rng.choice(EMOTIONS)) for i in range(count)]
    text = rng.normal(size=(count, len(FIELDS), 8)).astype(np.float32)
    query = rng.normal(size=8).astype(np.float32)
    scores = (text @ query).max(axis=1)
    wanted = [i for i in np.argsort(-scores) if emotion in (None, stickers[i].emotion)][:k]
    hits = StickerSearch(stickers, text, Words()).by_vector(query, "text", k, emotion)
    assert [hit.id for hit in hits] == [f"s{i}" for i in wanted]
    assert [hit.score for hit in hits] == pytest.approx([scores[i] for i in wanted], abs=1e-4)


def test_many_vectors_are_searched_by_cells():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(300, 32))
    vectors = centres[rng.integers(0, 300, 20_000)] + 0.4 * rng.normal(size=(20_000, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    exact, cells = VectorIndex(vectors, exact=True), VectorIndex(vectors, exact=False)
    _, right = exact.search(vectors[:100], 10)
    _, found = cells.search(vectors[:100], 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(right, found, strict=True)]) >= 0.95
    rows = np.arange(0, 20_000, 7)
    _, some = cells.search(vectors[:5], 10, rows)
    assert set(some.reshape(-1)) <= set(rows)


def test_queries_are_embedded_in_one_batch_and_once():
    encode = Words()
    search = StickerSearch(STICKERS, embed_pack_texts(STICKERS, encode), encode)
    encode.batches.clear()
    search.by_texts(["one", "two", "one"])
    search.by_texts(["two", "three"])
    assert encode.batches == [["one", "two"], ["three"]]


def test_vectors_beside_a_pack(tmp_path):
    pack = StickerPack(PackInfo(name="p", version="1", licence="CC0-1.0", attribution="", source=""), STICKERS, {})
    encode = Words()
    assert open_search(tmp_path, pack, encode).by_text("a cake", 1)[0].id == "s3"
    made = len(encode.batches)
    open_search(tmp_path, pack, encode)
    assert len(encode.batches) == made  # read, not computed again
    changed = StickerPack(pack.info, [s.model_copy(update={"description": "a boat"}) for s in STICKERS], {})
    with pytest.raises(PackError, match="other stickers or texts"):
        StickerSearch.open(tmp_path, changed, encode)
    assert open_search(tmp_path, changed, encode).by_text("a boat", 1)[0].matched == "description"
    (tmp_path / "embeddings.safetensors").write_bytes(b"no")
    with pytest.raises(PackError, match="embeddings.safetensors"):
        StickerSearch.open(tmp_path, pack, encode)


def test_pictures_are_searched_by_their_own_vectors(tmp_path):
    image = np.eye(5, 16, dtype=np.float32)
    encode = Words()
    save_embeddings(tmp_path, STICKERS, embed_pack_texts(STICKERS, encode), "words", image, "tower")
    pack = StickerPack(PackInfo(name="p", version="1", licence="CC0-1.0", attribution="", source=""), STICKERS, {})
    search = StickerSearch.open(tmp_path, pack, encode)
    assert (search.by_vector(image[3], "image", 1)[0].id, search.by_vector(image[3], "image", 1)[0].matched) == ("s3", "image")  # fmt: skip
    with pytest.raises(ValueError, match="not embedded"):
        StickerSearch(STICKERS, embed_pack_texts(STICKERS, encode), encode).by_vector(image[0], "image")
