"""Finding stickers: by what is said of them, by emotion, by picture, by vector."""

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dataset_builders.schema import Sticker
from dataset_builders.stickers.encoder import Encoder
from dataset_builders.stickers.pack import PackError, StickerPack


FIELDS = ("description", "emotion_description", "recommendation", "tags")
FILE = "embeddings.safetensors"
MAX_EXACT = 100_000  # stickers; above, vectors are searched by cells
PROBED = 1 / 32  # of the cells
PREFERRED = 0.15  # added to the cosine similarity of a sticker that has the preferred emotion


Mode = Literal["only", "prefer"]


@dataclass(frozen=True)
class Hit:
    """A found sticker: its cosine similarity (with what a preference adds), and the field that matched."""

    id: str
    score: float
    matched: str


class VectorIndex:
    """
    Nearest of many unit vectors by inner product: exact for up to `MAX_EXACT` items, by cells (IVF) above.

    Args:
        vectors (`np.ndarray` of shape `(n, d)`): Float32, unit norm.
        exact (`bool`, *optional*): Whether to compare with all of them; by size if not given.

    """

    def __init__(self, vectors: np.ndarray, exact: bool | None = None) -> None:
        faiss = self.faiss = importlib.import_module("faiss")
        vectors = np.ascontiguousarray(vectors, np.float32)
        count, size = vectors.shape
        self.exact = count <= MAX_EXACT if exact is None else exact
        if self.exact:
            self.index = faiss.IndexFlatIP(size)
        else:
            cells = int(4 * count**0.5)
            self.index = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, cells, faiss.METRIC_INNER_PRODUCT)
            self.index.cp.niter = 10
            self.index.cp.max_points_per_centroid = 64
            self.index.nprobe = max(8, int(cells * PROBED))
            self.index.train(vectors)
        self.index.add(vectors)

    def search(self, queries: np.ndarray, k: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """
        The `k` nearest to each query.

        Args:
            queries (`np.ndarray` of shape `(q, d)`): Float32.
            k (`int`): How many.
            rows (`np.ndarray` of shape `(m,)`, *optional*): Search only these.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: Similarities and row numbers, both `(q, k)`, best first; a row number of -1 where there is no further one.

        """
        queries = np.ascontiguousarray(queries, np.float32)
        if rows is None:
            return self.index.search(queries, k)
        selector = self.faiss.IDSelectorBatch(rows.astype(np.int64))
        if self.exact:
            params = self.faiss.SearchParameters(sel=selector)
        else:
            params = self.faiss.SearchParametersIVF(sel=selector, nprobe=self.index.nprobe)
        return self.index.search(queries, k, params=params)


def pack_texts(sticker: Sticker) -> list[str]:
    """What is said of a sticker, in the order of `FIELDS`; the emotion leads its own field (upstream's document form)."""
    feeling = f"{sticker.emotion}: {sticker.emotion_description}" if sticker.emotion else sticker.emotion_description
    return [sticker.description, feeling, sticker.recommendation, ", ".join(sticker.tags)]


def embed_pack_texts(stickers: Sequence[Sticker], encode: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
    """
    Vectors of all fields of all stickers.

    Returns:
        `np.ndarray` of shape `(M, len(FIELDS), d)`, float32; zero where a field is empty.

    """
    texts = [text for sticker in stickers for text in pack_texts(sticker)]
    vectors = np.concatenate([encode(texts[start : start + 1024]) for start in range(0, len(texts), 1024)])
    vectors[[not text for text in texts]] = 0
    return vectors.reshape(len(stickers), len(FIELDS), -1)


def digest_texts(stickers: Sequence[Sticker]) -> str:
    """SHA-256 of the stickers' ids and texts: vectors are good for these and no others."""
    total = hashlib.sha256()
    for sticker in stickers:
        total.update("\0".join([sticker.id, *pack_texts(sticker), ""]).encode())
    return total.hexdigest()


def save_embeddings(
    folder: Path, stickers: Sequence[Sticker], text: np.ndarray, encoder: str, image: np.ndarray | None, tower: str
) -> None:
    """
    Write `embeddings.safetensors`: vectors as float16; ids, digest of the texts and the encoders' names in the metadata.

    Args:
        folder (`Path`): The pack's.
        stickers (`Sequence[Sticker]`): All of the pack, M.
        text (`np.ndarray` of shape `(M, len(FIELDS), d)`): Vectors of their fields.
        encoder (`str`): Name of the text encoder.
        image (`np.ndarray` of shape `(M, e)`, *optional*): Vectors of their pictures.
        tower (`str`): Name of the vision tower, empty without `image`.

    """
    tensors = {"text": text.astype(np.float16)} | ({"image": image.astype(np.float16)} if image is not None else {})
    metadata = {
        "ids": json.dumps([sticker.id for sticker in stickers]),
        "texts": digest_texts(stickers),
        "fields": json.dumps(FIELDS),
        "encoder": encoder,
        "tower": tower,
    }
    partial = folder / f"{FILE}.{os.getpid()}"
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.replace(folder / FILE)
    finally:
        partial.unlink(missing_ok=True)


class StickerSearch:
    """
    Search in a pack, or in some stickers of it.

    Args:
        stickers (`Sequence[Sticker]`): What to search in, M of them.
        text (`np.ndarray` of shape `(M, len(FIELDS), d)`): Vectors of their fields.
        encode (`Callable`): Gives the vectors of texts.
        image (`np.ndarray` of shape `(M, e)`, *optional*): Vectors of their pictures.

    """

    def __init__(
        self,
        stickers: Sequence[Sticker],
        text: np.ndarray,
        encode: Callable[[Sequence[str]], np.ndarray],
        image: np.ndarray | None = None,
    ) -> None:
        self.stickers, self.encode = list(stickers), encode
        self.text_vectors, self.image_vectors = text, image
        self.emotions = np.array([sticker.emotion or "" for sticker in self.stickers])
        self.indexes: dict[str, VectorIndex] = {}

    @classmethod
    def open(cls, folder: Path, pack: StickerPack, encoder: Encoder) -> "StickerSearch":
        """
        Search a pack with the vectors beside it.

        Raises:
            FileNotFoundError: If they were not computed yet.
            PackError: If they are broken, or were made for other stickers, other texts or with another encoder.

        """
        file = folder / FILE
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no {FILE}.")
        try:
            with safe_open(file, "np") as opened:
                metadata, names = opened.metadata() or {}, set(opened.keys())
                text = opened.get_tensor("text").astype(np.float32)
                image = opened.get_tensor("image").astype(np.float32) if "image" in names else None
        except (SafetensorError, KeyError, TypeError) as error:
            raise PackError(f"{file}: {error}") from error
        if metadata.get("encoder") != encoder.name or metadata.get("texts") != digest_texts(pack.stickers):
            raise PackError(f"{file}: made with another encoder or for other stickers or texts")
        return cls(pack.stickers, text, encoder, image)

    def by_text(self, text: str, k: int = 10, emotion: str | None = None, mode: Mode = "only") -> list[Hit]:
        """The `k` stickers of which something alike is said; see [`by_texts`]."""
        return self.by_texts([text], k, emotion, mode)[0]

    def by_texts(
        self, texts: Sequence[str], k: int = 10, emotion: str | None = None, mode: Mode = "only"
    ) -> list[list[Hit]]:
        """
        The stickers of which something alike is said, for each of several queries.

        Args:
            texts (`Sequence[str]`): Queries, embedded in one batch.
            k (`int`, *optional*, defaults to 10): How many each.
            emotion (`str`, *optional*): An emotion.
            mode (`str`, *optional*, defaults to `"only"`): `"only"` finds no others, `"prefer"` adds `PREFERRED` to its stickers' scores.

        Returns:
            `list[list[Hit]]`: Best first; a sticker counts by its best field.

        """
        return self._search("text", self.encode(texts), k, emotion, mode)

    def by_vector(
        self,
        vector: np.ndarray,
        kind: Literal["text", "image"],
        k: int = 10,
        emotion: str | None = None,
        mode: Mode = "only",
    ) -> list[Hit]:
        """
        The stickers nearest to a vector: of a text, or of a picture by the tower that embedded the pack's.

        Args:
            vector (`np.ndarray` of shape `(d,)`): Unit norm.
            kind (`str`): `"text"` or `"image"`.
            k (`int`, *optional*, defaults to 10): How many.
            emotion (`str`, *optional*): As for [`by_texts`].
            mode (`str`, *optional*): As for [`by_texts`].

        Raises:
            ValueError: If the pack's pictures were not embedded.

        """
        if kind == "image" and self.image_vectors is None:
            raise ValueError("the pack's pictures were not embedded")
        return self._search(kind, vector[None], k, emotion, mode)[0]

    def by_emotion(self, emotion: str, k: int = 10) -> list[Hit]:
        """Stickers of an emotion, those first whose feeling is described most like it."""
        return self.by_text(emotion, k, emotion=emotion)

    def _index(self, kind: str) -> VectorIndex:
        if kind not in self.indexes:
            vectors = self.text_vectors if kind == "text" else self.image_vectors
            assert vectors is not None
            exact = len(self.stickers) <= MAX_EXACT
            self.indexes[kind] = VectorIndex(vectors.reshape(-1, vectors.shape[-1]), exact)
        return self.indexes[kind]

    def _search(self, kind: str, queries: np.ndarray, k: int, emotion: str | None, mode: str) -> list[list[Hit]]:
        fields = FIELDS if kind == "text" else ("image",)
        k = min(k, len(self.stickers))
        if emotion is None:
            return self._hits(kind, queries, k, fields, None, 0.0)
        rows = np.flatnonzero(self.emotions == emotion)
        rows = (rows[:, None] * len(fields) + np.arange(len(fields))).reshape(-1)
        of_emotion = self._hits(kind, queries, k, fields, rows, PREFERRED if mode == "prefer" else 0.0)
        if mode == "only":
            return of_emotion
        merged = []
        for preferred, others in zip(of_emotion, self._hits(kind, queries, k, fields, None, 0.0), strict=True):
            better = {hit.id for hit in preferred}
            hits = preferred + [hit for hit in others if hit.id not in better]
            merged.append(sorted(hits, key=lambda hit: -hit.score)[:k])
        return merged

    def _hits(
        self, kind: str, queries: np.ndarray, k: int, fields: Sequence[str], rows: np.ndarray | None, added: float
    ) -> list[list[Hit]]:
        scores, found = self._index(kind).search(queries, k * len(fields), rows)  # k stickers at least
        results = []
        for row_scores, row_found in zip(scores.tolist(), found.tolist(), strict=True):
            hits: dict[int, Hit] = {}
            for score, row in zip(row_scores, row_found, strict=True):
                number, field = divmod(row, len(fields))
                if row >= 0 and number not in hits:
                    hits[number] = Hit(self.stickers[number].id, score + added, fields[field])
            results.append(list(hits.values())[:k])
        return results


def open_search(folder: Path, pack: StickerPack, encoder: Encoder) -> StickerSearch:
    """Search a pack; its texts are embedded, and kept beside it, if that was not done yet or they have changed."""
    try:
        return StickerSearch.open(folder, pack, encoder)
    except (FileNotFoundError, PackError):
        save_embeddings(folder, pack.stickers, embed_pack_texts(pack.stickers, encoder), encoder.name, None, "")
        return StickerSearch.open(folder, pack, encoder)
