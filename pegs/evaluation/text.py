"""Text metrics (section 5.1, Table 1): BLEU, Dist-n, ROUGE-L, METEOR, CIDEr, BERTScore."""

import functools
import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset_builders.stickerconv.statistics import CHINESE, split_chinese
from pegs.errors import InputError
from pegs.evaluation.predict import Predictions
from pegs.evaluation.results import Columns, Result, Statistic, divide, make_result, mean_of


MAX_BLEU, MAX_DIST, MAX_CIDER = 4, 3, 4
CIDER_SIGMA = 6.0
WORDNET_FOLDER = Path("/usr/share/wordnet")  # Debian's wordnet-base
PACKAGED_LAYER = 5  # of 6, as the bert-score library has for DistilBERT
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
ROUGE_TOKEN = re.compile(f"[a-z0-9]+|{CHINESE}")


def tokenize(text: str) -> list[str]:
    """
    Words and marks as `nltk.word_tokenize` gives them, Chinese characters one by one.

    Sentences end where a mark is followed by space, so Punkt's data is not needed.
    """
    return [token for sentence in SENTENCE_END.split(split_chinese(text)) for token in _treebank().tokenize(sentence)]


def spaced_words(text: str) -> list[str]:
    """What spaces part, and Chinese characters one by one."""
    return split_chinese(text).split()


@functools.cache
def _treebank() -> Any:
    from nltk.tokenize.destructive import NLTKWordTokenizer

    return NLTKWordTokenizer()


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All n-grams, in order."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def bleu_counts(reference: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """What BLEU needs of a pair: matched and all n-grams of orders 1 to 4 (`match_n`, `total_n`), and both lengths."""
    counts: dict[str, float] = {"predicted_length": len(predicted), "reference_length": len(reference)}
    for n in range(1, MAX_BLEU + 1):
        found = Counter(ngrams(predicted, n))
        counts[f"match_{n}"] = (found & Counter(ngrams(reference, n))).total()
        counts[f"total_{n}"] = max(1, found.total())  # nltk's denominator for a text shorter than n
    return counts


def bleu(order: int) -> Statistic:
    """Corpus BLEU with equal weights and without smoothing (Papineni et al. 2002), as `nltk.corpus_bleu`."""

    def statistic(columns: Columns, weights: np.ndarray) -> np.ndarray:
        logs = np.zeros(len(weights))
        with np.errstate(divide="ignore"):
            for n in range(1, order + 1):
                logs += np.log(divide(weights @ columns[f"match_{n}"], weights @ columns[f"total_{n}"])) / order
            ratio = divide(weights @ columns["reference_length"], weights @ columns["predicted_length"])
        return np.exp(logs + np.minimum(0.0, 1.0 - np.nan_to_num(ratio, nan=np.inf)))

    return statistic


def distinct(text: str, n: int) -> float:
    """
    Share of different n-grams within a text, lower case, by [`spaced_words`] (Dist-n, Li et al. 2016); 0 without any.

    Differs from the definition, which counts over the whole corpus: the reference code averages over replies, and only so Table 1's Dist-2 of 0.99 can be reached.
    """
    found = ngrams(spaced_words(text.lower()), n)
    return len(set(found)) / len(found) if found else 0.0


def corpus_distinct(texts: Iterable[str], n: int) -> float:
    """Share of different n-grams over all texts together, as Li et al. (2016) define it."""
    counts = Counter(gram for text in texts for gram in ngrams(spaced_words(text.lower()), n))
    return len(counts) / max(1, counts.total())


class RougeTokenizer:
    """The tokens of `rouge-score`, and Chinese characters, which it drops."""

    def tokenize(self, text: str) -> list[str]:
        """Lower-case ASCII words and numbers, and Chinese characters one by one."""
        return ROUGE_TOKEN.findall(text.lower())


def rouge_l(references: Sequence[str], predicted: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of each pair by `rouge-score`, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=RougeTokenizer())
    return [scorer.score(gold, said)["rougeL"].fmeasure for gold, said in zip(references, predicted, strict=True)]


@functools.cache
def wordnet() -> Any:
    """
    WordNet for METEOR: nltk's own data if it is there, else Debian's `wordnet-base`.

    Raises:
        InputError: If there is neither.

    """
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class PlainWordNet(WordNetCorpusReader):
        """WordNet's files without what nltk adds to them (names of lexicographers' files, maps to other versions): METEOR reads neither."""

        def open(self, file: str) -> Any:
            names = "".join(f"{number:02d} file-{number} 0\n" for number in range(45))
            return io.StringIO(names) if file == "lexnames" else super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            return None

        @functools.cache  # noqa: B019  one instance a process
        def synsets(self, word: str) -> Any:
            return super().synsets(word)

    for name in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
        try:
            root = nltk.data.find(name)
            break
        except LookupError:
            continue
    else:
        if not WORDNET_FOLDER.is_dir():
            raise InputError(
                "METEOR needs WordNet: apt-get install wordnet-base, or python -m nltk.downloader wordnet; --no-meteor leaves it out."
            )
        nltk.data.path.append(str(WORDNET_FOLDER))  # nltk opens no file outside its path
        root = str(WORDNET_FOLDER)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions are not available")
        return PlainWordNet(root, None)


def meteor(reference: Sequence[str], predicted: Sequence[str]) -> float:
    """METEOR of a tokenized pair (Banerjee and Lavie 2005) by nltk: words, Porter stems, then WordNet's synonyms."""
    from nltk.translate.meteor_score import single_meteor_score

    return single_meteor_score(reference, predicted, wordnet=wordnet())


def cider(references: Sequence[str], predicted: Sequence[str]) -> np.ndarray:
    """
    CIDEr-D of each pair (Vedantam et al. 2015), one reference each: tf-idf cosine of 1- to 4-grams with clipped counts and a penalty on lengths, times 10.

    Words are those of [`spaced_words`], document frequencies are the references'; equal to `pycocoevalcap` (tested).

    Returns:
        `np.ndarray` of shape `(n,)`.

    """
    golds, saids = ([_all_ngrams(spaced_words(text)) for text in texts] for texts in (references, predicted))
    frequency = Counter(gram for counts in golds for gram in counts)
    log_total = math.log(len(golds)) if golds else 0.0

    def vector(counts: Counter) -> tuple[list[dict], np.ndarray]:
        weighted: list[dict] = [{} for _ in range(MAX_CIDER)]
        for gram, count in counts.items():
            weighted[len(gram) - 1][gram] = count * (log_total - math.log(max(1, frequency[gram])))
        return weighted, np.sqrt([sum(value**2 for value in part.values()) for part in weighted])

    scores = np.zeros(len(golds))
    for row, (gold, said) in enumerate(zip(golds, saids, strict=True)):
        (gold_parts, gold_norms), (said_parts, said_norms) = vector(gold), vector(said)
        dots = np.array([sum(min(value, g[gram]) * g[gram] for gram, value in s.items() if gram in g) for g, s in zip(gold_parts, said_parts, strict=True)])  # fmt: skip
        norms = gold_norms * said_norms
        # the reference implementation measures length in bigrams
        gap = sum(c for gram, c in said.items() if len(gram) == 2) - sum(c for gram, c in gold.items() if len(gram) == 2)  # fmt: skip
        cosines = np.divide(dots, norms, out=dots.astype(float), where=norms > 0)
        scores[row] = 10 * cosines.mean() * math.exp(-(gap**2) / (2 * CIDER_SIGMA**2))
    return scores


def _all_ngrams(tokens: Sequence[str]) -> Counter:
    return Counter(gram for n in range(1, MAX_CIDER + 1) for gram in ngrams(tokens, n))


class BertScorer:
    """
    BERTScore (Zhang et al. 2020) by the `transformers` encoder of a folder or Hub id, without idf and rescaling; equal to `bert-score` (tested).

    Args:
        encoder (`str`, *optional*): The packaged all-MiniLM-L6-v2 if not given; the paper's is `roberta-large` (layer 17).
        layer (`int`, *optional*, defaults to 5): Which hidden states, 0 for the embeddings.

    """

    def __init__(self, encoder: str = "", layer: int = PACKAGED_LAYER) -> None:
        from transformers import AutoModel, AutoTokenizer

        from dataset_builders.stickers.encoder import PACKAGED, packaged_encoder

        self.name, self.layer = encoder or PACKAGED, layer
        folder = encoder or str(packaged_encoder())
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.model = AutoModel.from_pretrained(folder).eval()
        except (OSError, ValueError) as error:
            raise InputError(f"--bertscore-encoder {encoder}: {str(error).splitlines()[0]}") from None
        depth = self.model.config.num_hidden_layers
        if not 0 <= layer <= depth:
            raise InputError(f"--bertscore-layer {layer}: must be from 0 to {depth}.")

    def states(self, texts: Sequence[str]) -> dict[str, Any]:
        """Unit token states `(length, d)` of different texts, the start and end token included."""
        import torch

        found = {}
        ordered = sorted(set(texts), key=len)
        for start in range(0, len(ordered), 64):
            batch = ordered[start : start + 64]
            inputs = self.tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            with torch.no_grad():
                hidden = self.model(**inputs, output_hidden_states=True).hidden_states[self.layer]
            hidden = torch.nn.functional.normalize(hidden, dim=-1)
            for text, states, mask in zip(batch, hidden, inputs["attention_mask"], strict=True):
                found[text] = states[mask.bool()]
        return found

    def __call__(self, references: Sequence[str], predicted: Sequence[str]) -> np.ndarray:
        """
        Precision, recall and F1 of each pair by greedy matching of tokens; start and end tokens are matched to but not counted.

        Returns:
            `np.ndarray` of shape `(n, 3)`.

        """
        states = self.states([*references, *predicted])
        rows = []
        for gold, said in zip(references, predicted, strict=True):
            similarity = states[said] @ states[gold].T  # (predicted tokens, reference tokens)
            precision = similarity.max(1).values[1:-1].mean().item() if len(similarity) > 2 else 0.0
            recall = similarity.max(0).values[1:-1].mean().item() if similarity.shape[1] > 2 else 0.0
            total = precision + recall
            rows.append((precision, recall, 2 * precision * recall / total if total > 0 else 0.0))
        return np.array(rows)


STATISTICS: dict[str, Statistic] = {
    **{f"bleu_{n}": bleu(n) for n in range(1, MAX_BLEU + 1)},
    **{f"dist_{n}": mean_of(f"dist_{n}") for n in range(1, MAX_DIST + 1)},
    **{name: mean_of(name) for name in ("rouge_l", "meteor", "cider", "bertscore_p", "bertscore_r", "bertscore")},
}


def text_columns(
    references: Sequence[str], predicted: Sequence[str], scorer: BertScorer | None = None, with_meteor: bool = True
) -> dict[str, np.ndarray]:
    """
    Figures of every pair of texts that `STATISTICS` are made of.

    Args:
        references (`Sequence[str]`): The dataset's.
        predicted (`Sequence[str]`): The model's.
        scorer ([`BertScorer`], *optional*): Without it there is no BERTScore.
        with_meteor (`bool`, *optional*, defaults to `True`): Whether to compute METEOR, which needs WordNet.

    Returns:
        `dict[str, np.ndarray]`: Arrays of shape `(n,)`.

    """
    tokens = [(tokenize(gold), tokenize(said)) for gold, said in zip(references, predicted, strict=True)]
    counts = [bleu_counts(*pair) for pair in tokens]
    columns = {name: np.array([row[name] for row in counts], float) for name in counts[0]}
    for n in range(1, MAX_DIST + 1):
        columns[f"dist_{n}"] = np.array([distinct(text, n) for text in predicted])
    columns["rouge_l"] = np.array(rouge_l(references, predicted))
    if with_meteor:
        columns["meteor"] = np.array([meteor(*pair) for pair in tokens])
    columns["cider"] = cider(references, predicted)
    if scorer is not None:
        columns |= dict(zip(("bertscore_p", "bertscore_r", "bertscore"), scorer(references, predicted).T, strict=True))
    return columns


def evaluate_text(run: Predictions, scorer: BertScorer | None = None, with_meteor: bool = True) -> Result:
    """
    Text metrics of a model's predictions.

    Args:
        run ([`Predictions`]): All its turns count; a reply without text scores 0.
        scorer ([`BertScorer`], *optional*): Without it there is no BERTScore.
        with_meteor (`bool`, *optional*, defaults to `True`): Whether to compute METEOR, which needs WordNet.

    Returns:
        [`Result`].

    """
    references = [row.reference.text.strip() for row in run.rows]
    predicted = [row.predicted.text.strip() for row in run.rows]
    columns = text_columns(references, predicted, scorer, with_meteor)
    left_out = {"meteor", "bertscore_p", "bertscore_r", "bertscore"} - set(columns)
    statistics = {name: statistic for name, statistic in STATISTICS.items() if name not in left_out}
    settings: dict[str, Any] = {"predictions": str(run.path), "sha256": run.sha256, "tokenizer": "NLTKWordTokenizer, Chinese by character"}  # fmt: skip
    if with_meteor:
        settings["wordnet"] = str(wordnet().root)
    if scorer is not None:
        settings |= {"bertscore_encoder": scorer.name, "bertscore_layer": scorer.layer}
    details = {
        **{f"corpus_dist_{n}": corpus_distinct(predicted, n) for n in range(1, MAX_DIST + 1)},
        "mean_words": float(np.mean([len(spaced_words(said)) for said in predicted])),
        "empty_replies": sum(not said for said in predicted),
    }
    return make_result("text", run.model, run.keys, columns, statistics, settings, details)
