"""
Figures of the mini model's card on the held-out test sessions, one JSON line; the card and its pictures into the checkpoint.

    python benchmarks/mini.py [--model checkpoints/pegs-mini] [--limit 0]
"""

import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dataset_builders.schema import EMOTIONS, Session
from dataset_builders.stickerconv.sessions import load_mini
from hub_cards.cards import render_card
from modeling_pegs import PegsConfig
from modeling_pegs.backbones import find_language_model
from pegs.assemble import load_pipeline
from pegs.evaluation.drawing import DrawingJudge, draw_all, save_sheet
from pegs.evaluation.multimodal import average_precision
from pegs.evaluation.predict import SystemTurn, system_turns
from pegs.evaluation.replies import WrittenReply, write_replies
from pegs.evaluation.results import Columns, Metric, Statistic, divide, mean_of, measure
from pegs.places import DEFAULT_MODEL
from pegs.quiet import quiet_libraries
from pegs.training.data_collator import DataCollatorForPegs
from pegs.training.dialogues import session_messages
from pegs.training.text_states import embed_sentences
from pipelines.pipeline_pegs import PegsPipeline


@torch.no_grad()
def text_loss(score: Callable, collator: DataCollatorForPegs, messages: list[dict]) -> tuple[float, int]:
    """Negative log-likelihood of the System's text tokens and their number; end and [IMG] tokens are left out, so that all models predict the same tokens."""
    batch = collator.processor.apply_chat_template([messages], tokenize=True, return_tensors="pt")
    labels = collator.make_labels(batch["input_ids"][0], batch["attention_mask"][0])
    keep = (labels != -100) & (labels < collator.config.first_new_token_id) & (labels != collator.end_id)
    log_probs = score(batch)[0, :-1, : collator.config.first_new_token_id].float().log_softmax(-1)
    targets = labels[1:][keep[1:]]
    return -log_probs[keep[1:]].gather(1, targets.unsqueeze(1)).sum().item(), len(targets)


def perplexity(columns: Columns, weights: np.ndarray) -> np.ndarray:
    """Perplexity of sessions' losses."""
    return np.exp(weights @ columns["loss"] / (weights @ columns["tokens"]))


def told(metric: Metric) -> dict[str, float]:
    """A value with its 95 % interval, rounded."""
    return {"value": round(metric.value, 4), "low": round(metric.low, 4), "high": round(metric.high, 4)}


def means(columns: dict[str, list[float]], names: list[str]) -> dict[str, dict[str, float]]:
    """Means of figures of turns, with intervals by bootstrap over sessions."""
    arrays = {name: np.array(values, float) for name, values in columns.items()}
    return {name: told(m) for name, m in measure(arrays, names, {name: mean_of(name) for name in arrays}).items()}


def macro(columns: dict[str, list[float]], names: list[str], golds: list[str]) -> dict[str, dict[str, float]]:
    """Means over the gold emotions of the means within each."""
    rows = {emotion: np.array([gold == emotion for gold in golds], float) for emotion in set(golds)}

    def macro_of(name: str) -> Statistic:
        def statistic(columns: Columns, weights: np.ndarray) -> np.ndarray:
            return np.nanmean(
                [divide((weights * row) @ columns[name], weights @ row) for row in rows.values()], axis=0
            )

        return statistic

    arrays = {name: np.array(values, float) for name, values in columns.items()}
    return {name: told(m) for name, m in measure(arrays, names, {name: macro_of(name) for name in arrays}).items()}


def compare_perplexity(pipeline: PegsPipeline, base: str, sessions: list[Session]) -> dict[str, dict[str, float]]:
    """Perplexity of the System's text under PEGS and under the language model as it was, which sees no stickers."""
    model = pipeline.model
    collator = DataCollatorForPegs(pipeline.processor, model.config, None, 2048)
    untouched = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    dialogues = [session_messages(session, pipeline.pack) for session in sessions]
    figures = {}
    for name, score, seen in (
        ("pegs", model, dialogues),
        ("untouched_smollm2", untouched, [session_messages(session) for session in sessions]),
    ):
        found = [text_loss(lambda batch, score=score: score(**batch).logits, collator, messages) for messages in seen]
        columns = {"loss": np.array([loss for loss, _ in found]), "tokens": np.array([float(n) for _, n in found])}
        names = [f"{session.session_id}/0" for session in sessions]
        figures[name] = told(measure(columns, names, {"perplexity": perplexity})["perplexity"])
    return figures


def compare_timing(replies: dict[int, list[WrittenReply]], turns: list[SystemTurn], names: list[str]) -> dict:
    """The share of turns with a sticker, by seed and over all, and how well the log-odds of one rank the turns that should have it."""
    gold = np.array([turn.turn.system.sticker is not None for turn in turns], float)
    sent = {seed: np.array([reply.sends for reply in found], float) for seed, found in replies.items()}
    columns = {"rate": np.mean(list(sent.values()), axis=0), "gold": gold, "gold_frequency": gold}
    columns["sticker_logit"] = np.array([reply.logit for reply in next(iter(replies.values()))])
    statistics = {"rate": mean_of("rate"), "gold": mean_of("gold"), "timing_ap": average_precision}
    found = {name: told(metric) for name, metric in measure(columns, names, statistics).items()}
    return {
        "turns": len(turns),
        "pegs": found["rate"] | {"seeds": [round(rate.mean(), 4) for rate in sent.values()]},
        "gold": found["gold"],
        "timing_ap": found["timing_ap"],
    }


def compare_requests(pipeline: PegsPipeline) -> dict[str, dict[str, float]]:
    """How often a sticker of the whole pack that is asked for by name is the one sent, and by the retrieval tokens alone: of captions that were trained on and of held-out ones."""
    figures = {}
    for name, stickers in (("known", pipeline.pack.split("train")[::4]), ("held_out", pipeline.pack.split("test"))):
        asked = [f"Send me the {sticker.tags[0]} sticker, please." for sticker in stickers]
        contexts = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in asked]
        replies = write_replies(pipeline, contexts, sticker_bias=math.inf, do_sample=False)
        hits = {"pegs": 0, "retrieval_tokens": 0}
        for sticker, reply in zip(stickers, replies, strict=True):
            meant = pipeline.read_prompt_embeds(reply.prompt_embeds.unsqueeze(0))
            for way, query in (("retrieval_tokens", reply.query), ("pegs", reply.query if meant is None else meant)):
                hits[way] += pipeline.retrieve(query, 1)[0].id == sticker.id
        figures[name] = {"requests": len(stickers)} | {way: round(n / len(stickers), 4) for way, n in hits.items()}
    return figures


def main() -> None:
    """Print the figures and draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--limit", type=int, default=0, help="only so many test sessions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    quiet_libraries()
    drawing = json.loads(
        (Path(args.model) / "drawing.json").read_text("utf-8")
    )  # of benchmarks/drawing.py, for the card
    base = find_language_model(PegsConfig.from_pretrained(args.model).language_model)
    pipeline = load_pipeline(args.model)
    pack, seed = pipeline.pack, args.seeds[0]
    sessions = load_mini("test")[: args.limit or None]
    figures: dict = {"model": Path(args.model).name, "test_sessions": len(sessions)}
    figures["perplexity"] = compare_perplexity(pipeline, base, sessions)

    turns = list(system_turns(sessions, pack))
    replies = {s: write_replies(pipeline, [turn.context for turn in turns], s) for s in args.seeds}
    figures["sticker_rate"] = compare_timing(replies, turns, [turn.key for turn in turns])

    asked = [turn for turn in turns if turn.turn.system.sticker is not None]
    names, golds = [turn.key for turn in asked], [turn.turn.system.sticker.emotion for turn in asked]
    forced = write_replies(pipeline, [turn.context for turn in asked], sticker_bias=math.inf, do_sample=False)
    rows = {sticker_id: i for i, sticker_id in enumerate(pipeline.pack_ids)}
    databases = {d: [s.id for s in pack.database(d)] for d in {t.session.database for t in turns}}
    by_text = {
        "minilm_message_to_description": embed_sentences([s.description for s in pack.stickers]),
        "minilm_message_to_caption": embed_sentences([s.caption for s in pack.stickers]),
    }
    messages = embed_sentences([turn.turn.user.text for turn in asked])
    hits: dict[str, list[float]] = {name: [] for name in ("pegs", *by_text, "chance")}
    found: dict[str, list[float]] = {name: [] for name in ("recall_at_1", "recall_at_5", "recall_at_10", "mrr")}
    for turn, reply, message in zip(asked, forced, messages, strict=True):
        ids = databases[turn.session.database]
        index = torch.tensor([rows[i] for i in ids])
        order = (pipeline.pack_embeds[index] @ reply.query).argsort(descending=True).tolist()
        chosen = {name: int((vectors[index] @ message).argmax()) for name, vectors in by_text.items()}
        for name, row in {"pegs": order[0], **chosen}.items():
            hits[name].append(pack.by_id[ids[row]].emotion == turn.turn.system.sticker.emotion)
        hits["chance"].append([pack.by_id[i].emotion for i in ids].count(turn.turn.system.sticker.emotion) / len(ids))
        rank = order.index(ids.index(turn.turn.system.sticker.id))
        found["mrr"].append(1 / (1 + rank))
        for k in (1, 5, 10):
            found[f"recall_at_{k}"].append(rank < k)
    figures["gold_stickers"] = len(asked)
    figures["retrieved_emotion_accuracy"] = means(hits, names)
    figures["retrieved_emotion_macro_accuracy"] = macro(hits, names, golds)
    figures["asked_for_by_name"] = compare_requests(pipeline)
    chance = sum(1 / len(ids) for ids in databases.values()) / len(databases)
    figures["retrieval_in_database"] = means(found, names) | {"chance_recall_at_1": round(chance, 4)}

    judge, test = DrawingJudge.of(pipeline, pack), pack.split("test")
    verdicts = judge.name_emotions(judge.embed([pack.image(s.id) for s in test]))
    right = [verdict == sticker.emotion for verdict, sticker in zip(verdicts, test, strict=True)]
    figures["judge_accuracy_on_held_out_stickers"] = round(sum(right) / len(right), 4)
    drawn = draw_all(pipeline.decoder, torch.stack([reply.prompt_embeds for reply in forced]), seed)
    verdicts = judge.name_emotions(judge.embed(drawn))
    drawn_hits: dict[str, list[float]] = {
        "pegs": [verdict == gold for verdict, gold in zip(verdicts, golds, strict=True)],
        "chance": [judge.emotions.count(gold) / len(judge.emotions) for gold in golds],
    }
    figures["drawn_emotion_accuracy"] = means(drawn_hits, names)
    figures["drawn_emotion_macro_accuracy"] = macro(drawn_hits, names, golds)
    assets = Path(args.model) / "assets"
    draw_request_sheet(pipeline, seed, assets / "drawn_42.png")
    print(json.dumps(figures))
    rng = random.Random(seed)
    with (assets / "replies.jsonl").open("w", encoding="utf-8") as file:
        for i in sorted(rng.sample(range(len(turns)), min(20, len(turns)))):
            reply = replies[seed][i]
            nearest = pipeline.retrieve(reply.query, top_k=1)[0].id if reply.sends else None
            row = {"user": turns[i].turn.user.text, "reply": reply.text, "sticker": nearest}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    (Path(args.model) / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    card = render_card("model_card", figures=figures, drawing=drawing)
    (Path(args.model) / "README.md").write_text(card, "utf-8")


def draw_request_sheet(pipeline: PegsPipeline, seed: int, file: Path) -> None:
    """Six stickers an emotion, drawn by PEGS on request: the user describes a sticker of the pack, PEGS draws what it understood."""
    rng = random.Random(seed)
    chosen = [s for e in EMOTIONS for s in rng.sample([s for s in pipeline.pack.split("train") if s.emotion == e], 6)]
    images = []
    for number, sticker in enumerate(chosen):
        request = [{"role": "user", "content": [{"type": "text", "text": sticker.caption}]}]
        reply = pipeline(request, "gen", seed + number, floor=0, size=256, sticker_bias=math.inf, do_sample=False)
        images.append(reply.sticker)
    save_sheet(images, [f"{s.emotion}: {s.tags[0]}" for s in chosen], 6, file)


if __name__ == "__main__":
    main()
