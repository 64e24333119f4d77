"""Multimodal metrics (section 5.2, Table 2): frequency, MMr, f-MMr (eq. 11), sticker diversity, retrieval, timing, emotion."""

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dataset_builders.stickers.pack import StickerPack
from modeling_pegs.processing_pegs import load_sticker
from pegs.errors import InputError
from pegs.evaluation.predict import Predictions, SentSticker
from pegs.evaluation.results import Columns, Result, Statistic, divide, make_result, mean_of


ALPHAS = (0.8, 0.2)  # the paper states 0.8; its Table 2 fits 0.2
CLIP = "openai/clip-vit-base-patch32"
RECALLS = (1, 5, 10)
VOTES = 5
BATCH = 64


class Tower(Protocol):
    """Texts and pictures as unit vectors of one space."""

    name: str

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors `(len(texts), d)`."""

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Vectors `(len(images), d)` of RGB pictures."""


class ClipTower:
    """
    A CLIP model of transformers, as in the reference code.

    Args:
        name (`str`): Folder or Hub id.

    """

    def __init__(self, name: str = CLIP) -> None:
        from transformers import AutoProcessor, CLIPModel

        self.name = name
        self.model = CLIPModel.from_pretrained(name).eval()
        self.processor = AutoProcessor.from_pretrained(name)

    def _unit(self, features: Any) -> np.ndarray:
        pooled = getattr(features, "pooler_output", features)
        return (pooled / pooled.norm(dim=-1, keepdim=True)).float().numpy()

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts, cut at the model's length; see [`Tower`]."""
        import torch

        inputs = self.processor(text=list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            return self._unit(self.model.get_text_features(**inputs))

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Vectors of pictures; see [`Tower`]."""
        import torch

        inputs = self.processor(images=list(images), return_tensors="pt")
        with torch.no_grad():
            return self._unit(self.model.get_image_features(**inputs))


class MiniTower:
    """
    The embedded model's sticker tower and the sentence encoder whose space it was trained into.

    Args:
        model (`str`): Folder or Hub id of a PEGS checkpoint with a `retrieval_text_encoder`.

    """

    def __init__(self, model: str) -> None:
        from transformers import AutoProcessor

        from dataset_builders.stickers.encoder import TextEncoder
        from modeling_pegs import PegsModel

        self.model, self.processor = PegsModel.from_pretrained(model).eval(), AutoProcessor.from_pretrained(model)
        encoder = self.model.config.retrieval_text_encoder
        if not encoder:
            raise InputError(f"--tower {model}: its retrieval space has no sentence encoder.")
        self.encode = TextEncoder(encoder)
        self.name = f"PEGS sticker tower + {encoder}"

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts; see [`Tower`]."""
        return self.encode(list(texts))

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Vectors of pictures; see [`Tower`]."""
        import torch

        inputs = self.processor(["<IMG>"] * len(images), list(images), return_tensors="pt")
        with torch.no_grad():
            return self.model.embed_stickers(inputs["pixel_values"]).float().numpy()


def open_tower(name: str, mini: str) -> Tower:
    """
    A tower by name.

    Args:
        name (`str`): `mini`, a CLIP's folder or Hub id, or empty: CLIP ViT-B/32 where it can be reached, else the mini tower, which is told on stderr.
        mini (`str`): Checkpoint of the mini tower.

    Raises:
        InputError: If it cannot be loaded.

    """
    if name == "mini":
        return MiniTower(mini)
    try:
        return ClipTower(name or CLIP)
    except (OSError, ValueError) as error:
        if name:
            raise InputError(f"--tower {name}: {str(error).splitlines()[0]}") from None
        tower = MiniTower(mini)
        print(f"{CLIP} cannot be reached; MMr is computed with {tower.name}.", file=sys.stderr)  # noqa: T201
        return tower


class Embedded:
    """
    Vectors of all texts and stickers of some predictions: each text, and each sticker by its picture, is embedded once.

    Args:
        runs (`Sequence[Predictions]`): The predictions.
        pack ([`StickerPack`]): Holds their stickers.
        tower ([`Tower`]): Embeds.

    """

    def __init__(self, runs: Sequence[Predictions], pack: StickerPack, tower: Tower) -> None:
        self.names: dict[tuple[str | None, str | None, str], str] = {}  # of stickers, to the digest of the picture
        pictures: dict[str, Image.Image] = {}
        for run in runs:
            for sticker in _stickers(run):
                key = self._key(run, sticker)
                if key not in self.names:
                    data = run.picture_bytes(sticker, pack)
                    self.names[key] = hashlib.sha256(data).hexdigest()
                    if self.names[key] not in pictures:
                        pictures[self.names[key]] = load_sticker(run.image(sticker, pack))
        texts = dict.fromkeys(said.text for run in runs for row in run.rows for said in (row.reference, row.predicted))
        self.texts = dict(zip(texts, _in_batches(tower.embed_texts, list(texts)), strict=True))
        self.images = dict(zip(pictures, _in_batches(tower.embed_images, list(pictures.values())), strict=True))

    def _key(self, run: Predictions, sticker: SentSticker) -> tuple[str | None, str | None, str]:
        return sticker.id, sticker.picture, str(run.path.parent) if sticker.picture else ""

    def image(self, run: Predictions, sticker: SentSticker) -> np.ndarray:
        """Vector `(d,)` of a sticker of a run."""
        return self.images[self.names[self._key(run, sticker)]]


def _stickers(run: Predictions) -> list[SentSticker]:
    return [said.sticker for row in run.rows for said in (row.reference, row.predicted) if said.sticker]


def _in_batches(embed: Any, items: Sequence[Any]) -> list[np.ndarray]:
    return [vector for start in range(0, len(items), BATCH) for vector in embed(items[start : start + BATCH])]


def mmr(
    gold_text: np.ndarray, gold_image: np.ndarray | None, text: np.ndarray, image: np.ndarray | None
) -> dict[str, float]:
    """
    MM-Relevance of a reply (Feng et al. 2023, as the reference code computes it).

    The similarities of the four pairs of a gold and a predicted side, 0 where a side is missing, are added and divided by 4 if both have a sticker, by 2 if one has, by 1 if
    none. Precision and recall count equal kinds only, divided by the number of sides that the prediction or the reference has.

    Args:
        gold_text (`np.ndarray` of shape `(d,)`): Unit vector of the reference's text.
        gold_image (`np.ndarray` of shape `(d,)`, *optional*): Of its sticker.
        text (`np.ndarray` of shape `(d,)`): Of the predicted text.
        image (`np.ndarray` of shape `(d,)`, *optional*): Of its sticker.

    Returns:
        `dict[str, float]`: `mmr`, `mmr_precision`, `mmr_recall`, `mmr_f1`.

    """
    texts = float(gold_text @ text)
    images = float(gold_image @ image) if gold_image is not None and image is not None else 0.0
    crossed = float(text @ gold_image) if gold_image is not None else 0.0
    crossed += float(gold_text @ image) if image is not None else 0.0
    sides = (1 + (image is not None), 1 + (gold_image is not None))
    precision, recall = ((texts + images) / count for count in sides)
    f1 = 2 * precision * recall / (precision + recall) if precision > 0 and recall > 0 else 0.0
    total = (texts + images + crossed) / (sides[0] * sides[1])
    return {"mmr": total, "mmr_precision": precision, "mmr_recall": recall, "mmr_f1": f1}


def f_mmr(frequency: Any, relevance: Any, alpha: float) -> Any:
    """Equation 11: relevance with a penalty on replies without stickers; numbers or arrays."""
    return (1 - alpha * (1 - frequency)) * relevance


def f_mmr_of(alpha: float) -> Statistic:
    """f-MMr (eq. 11) of the turns' frequency and MMr."""

    def statistic(columns: Columns, weights: np.ndarray) -> np.ndarray:
        return f_mmr(mean_of("frequency")(columns, weights), mean_of("mmr")(columns, weights), alpha)

    return statistic


def average_precision(columns: Columns, weights: np.ndarray) -> np.ndarray:
    """How well the model's log-odds of a sticker rank the turns where the reference has one (timing); NaN if all or none have one."""
    known = ~np.isnan(columns["sticker_logit"])
    gold, odds, weights = columns["gold_frequency"][known], columns["sticker_logit"][known], weights[:, known]
    if len(set(gold)) < 2:
        return np.full(len(weights), np.nan)
    order = np.argsort(-odds)
    thresholds = np.flatnonzero(np.diff(odds[order], append=np.nan) != 0)  # turns with the same odds count together
    hits = np.cumsum((weights * gold)[:, order], 1)[:, thresholds]
    called = np.cumsum(weights[:, order], 1)[:, thresholds]
    precision = np.nan_to_num(divide(hits, called))
    return divide((np.diff(hits, axis=1, prepend=0) * precision).sum(1), hits[:, -1])


def f_mmr_name(alpha: float) -> str:
    """Name of f-MMr with an alpha: `f_mmr_0.8`."""
    return f"f_mmr_{alpha}"


STATISTICS: dict[str, Statistic] = {
    **{name: mean_of(name) for name in ("frequency", "gold_frequency", "mmr", "mmr_precision", "mmr_recall", "mmr_f1")},
    **{f_mmr_name(alpha): f_mmr_of(alpha) for alpha in ALPHAS},
    **{f"recall_at_{k}": mean_of(f"recall_at_{k}") for k in RECALLS},
    "mrr": mean_of("mrr"),
    "timing_ap": average_precision,
    "timing_agreement": mean_of("timing_agreement"),
    "emotion_agreement": mean_of("emotion_agreement"),
}  # fmt: skip


def diversity_of(vectors: Sequence[np.ndarray | None]) -> Statistic:
    """
    Sticker diversity (ID, Table 10): one minus the mean cosine similarity of two different replies' stickers; NaN below two.

    The paper names the metric without defining it; this definition is ours. A turn that the bootstrap draws twice makes no pair with itself.

    Args:
        vectors (`Sequence[np.ndarray]`): Unit vector `(d,)` of each turn's sticker; `None` without one.

    """
    sent = np.array([vector is not None for vector in vectors])
    known = [vector for vector in vectors if vector is not None]
    matrix = np.array(known, float) if known else np.zeros((0, 1))

    def statistic(columns: Columns, weights: np.ndarray) -> np.ndarray:
        drawn = weights[:, sent]
        alone = (drawn**2).sum(1)
        return 1 - divide(((drawn @ matrix) ** 2).sum(1) - alone, drawn.sum(1) ** 2 - alone)

    return statistic


def vote_of_nearest(similarities: np.ndarray, emotions: Sequence[str | None]) -> str | None:
    """What most of the [`VOTES`] nearest say, of ties what the nearer say first; from the similarities `(n,)` to stickers of these emotions."""
    nearest = np.argsort(-similarities, kind="stable")[:VOTES]
    return Counter(emotions[row] for row in nearest).most_common(1)[0][0]


class EmotionVote:
    """
    Emotion of a drawn sticker: the vote of the nearest annotated stickers of the pack, which are embedded when the first is asked for.

    Args:
        pack ([`StickerPack`]): Stickers with emotions.
        tower ([`Tower`]): Embeds them.

    """

    def __init__(self, pack: StickerPack, tower: Tower) -> None:
        self.pack, self.tower = pack, tower
        self.known = [sticker for sticker in pack.stickers if sticker.emotion]
        self.vectors: np.ndarray | None = None

    def __call__(self, vector: np.ndarray) -> str | None:
        """Emotion by a vector `(d,)`; `None` if the pack is not annotated."""
        if not self.known:
            return None
        if self.vectors is None:
            images = [load_sticker(self.pack.image(sticker.id)) for sticker in self.known]
            self.vectors = np.stack(_in_batches(self.tower.embed_images, images))
        return vote_of_nearest(self.vectors @ vector, [sticker.emotion for sticker in self.known])


def evaluate_multimodal(run: Predictions, embedded: Embedded, vote: EmotionVote) -> Result:
    """
    Multimodal metrics of a model's predictions.

    Args:
        run ([`Predictions`]): The predictions.
        embedded ([`Embedded`]): Their vectors.
        vote ([`EmotionVote`]): Names the emotion of drawn stickers.

    Returns:
        [`Result`]: `details` has how many stickers and different ones were sent, and chance levels.

    """
    figures: list[dict[str, float]] = []
    vectors: list[np.ndarray | None] = []
    for row in run.rows:
        gold, said = row.reference.sticker, row.predicted.sticker
        gold_image = embedded.image(run, gold) if gold else None
        image = embedded.image(run, said) if said else None
        figure = mmr(embedded.texts[row.reference.text], gold_image, embedded.texts[row.predicted.text], image)
        figure |= {
            "frequency": float(said is not None),
            "gold_frequency": float(gold is not None),
            "timing_agreement": float((said is None) == (gold is None)),
            "sticker_logit": np.nan if row.sticker_logit is None else row.sticker_logit,
            "mrr": np.nan if row.gold_rank is None else 1 / (1 + row.gold_rank),
            "emotion_agreement": np.nan,
        }
        for k in RECALLS:
            figure[f"recall_at_{k}"] = np.nan if row.gold_rank is None else float(row.gold_rank < k)
        vectors.append(image)
        if said and image is not None:
            emotion = said.emotion or vote(image)
            if gold and gold.emotion and emotion:
                figure["emotion_agreement"] = float(emotion == gold.emotion)
        figures.append(figure)
    columns = {name: np.array([figure[name] for figure in figures]) for name in figures[0]}
    candidates = [row.candidates for row in run.rows if row.gold_rank is not None and row.candidates]
    sent = [vector for vector in vectors if vector is not None]
    details = {
        "stickers_sent": len(sent),
        "different_stickers": len({vector.tobytes() for vector in sent}),
        "chance": {f"recall_at_{k}": float(np.mean([min(1, k / n) for n in candidates])) if candidates else None for k in RECALLS},
    }  # fmt: skip
    settings = {"predictions": str(run.path), "sha256": run.sha256, "tower": vote.tower.name, "alphas": list(ALPHAS)}
    statistics = {**STATISTICS, "id": diversity_of(vectors)}
    result = make_result("mm", run.model, run.keys, columns, statistics, settings, details)
    diversity = result.metrics["id"].model_copy(update={"n": len(sent)})  # its statistic uses vectors, not figures
    return result.model_copy(update={"metrics": {**result.metrics, "id": diversity}})
