"""
Scores of the fixture's 50 pairs by the reference implementations, into `fixtures/references.json`.

    pip install pycocoevalcap==1.2 bert-score==0.3.13 && python -m tests.pegs.evaluation.references
"""

import json
from pathlib import Path

from dataset_builders.stickers.encoder import packaged_encoder
from pegs.evaluation.text import PACKAGED_LAYER, tokenize, wordnet


FIXTURES = Path(__file__).with_name("fixtures")


def read_pairs() -> tuple[list[str], list[str]]:
    rows = [json.loads(line) for line in (FIXTURES / "pairs.jsonl").read_text("utf-8").splitlines()]
    return [row["reference"] for row in rows], [row["predicted"] for row in rows]


def main() -> None:
    import bert_score
    from nltk.translate.bleu_score import corpus_bleu
    from nltk.translate.meteor_score import meteor_score
    from pycocoevalcap.cider.cider import Cider
    from rouge_score.rouge_scorer import RougeScorer

    golds, saids = read_pairs()
    gold_tokens, said_tokens = [[tokenize(text)] for text in golds], [tokenize(text) for text in saids]
    weights = [(1 / n,) * n for n in range(1, 5)]
    cider = Cider().compute_score(dict(enumerate([g] for g in golds)), dict(enumerate([s] for s in saids)))
    rouge = RougeScorer(["rougeL"])
    bert = bert_score.score(saids, golds, model_type=str(packaged_encoder()), num_layers=PACKAGED_LAYER)
    scores = {
        "bleu": corpus_bleu(gold_tokens, said_tokens, weights),
        "meteor": [
            meteor_score(gold, said, wordnet=wordnet()) for gold, said in zip(gold_tokens, said_tokens, strict=True)
        ],
        "rouge_l": [rouge.score(gold, said)["rougeL"].fmeasure for gold, said in zip(golds, saids, strict=True)],
        "cider": [float(score) for score in cider[1]],
        "bertscore": [[float(value) for value in row] for row in zip(*bert, strict=True)],
    }
    (FIXTURES / "references.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
