"""
Figures of the mini model's card on the held-out test sessions, one JSON line; the card and its pictures into the checkpoint.

    python benchmarks/mini.py [--model checkpoints/pegs-mini] [--limit 0]
"""

import argparse
import json
import math
import random
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dataset_builders.schema import EMOTIONS
from dataset_builders.stickerconv.sessions import load_mini
from dataset_builders.stickers.sheet import contact_sheet
from hub_cards.cards import render_card
from modeling_pegs.backbones import find_language_model
from pegs.assemble import DEFAULT_MODEL, load_pipeline
from pegs.evaluation.drawing import DrawingJudge
from pegs.quiet import quiet_libraries
from pegs.training.data_collator import DataCollatorForPegs
from pegs.training.dialogues import session_messages, turn_contexts
from pegs.training.text_states import embed_sentences


def text_only(messages: list[dict]) -> list[dict]:
    """The dialogue without its stickers."""
    return [{**m, "content": [part for part in m["content"] if part["type"] == "text"]} for m in messages]


@torch.no_grad()
def perplexity(score, collator: DataCollatorForPegs, dialogues: list[list[dict]]) -> float:
    """Perplexity of the System's text tokens; end and [IMG] tokens are left out, so that both models predict the same tokens."""
    total, count = 0.0, 0
    for messages in dialogues:
        batch = collator.processor.apply_chat_template([messages], tokenize=True, return_tensors="pt")
        labels = collator.make_labels(batch["input_ids"][0], batch["attention_mask"][0])
        keep = (labels != -100) & (labels < collator.config.first_new_token_id) & (labels != collator.end_id)
        log_probs = score(batch)[0, :-1, : collator.config.first_new_token_id].float().log_softmax(-1)
        targets = labels[1:][keep[1:]]
        total -= log_probs[keep[1:]].gather(1, targets.unsqueeze(1)).sum().item()
        count += len(targets)
    return math.exp(total / count)


def system_turns(sessions, pack) -> list[dict]:
    """Every System turn with all earlier messages as context (section 6)."""
    turns = []
    for session in sessions:
        for turn, context in zip(session.turns, turn_contexts(session, pack), strict=True):
            turns.append({"session": session, "context": context, "user": turn.user.text, "gold": turn.system.sticker})
    return turns


def generate(pipeline, turns: list[dict], seed: int, batch_size: int = 16, **kwargs) -> list[dict]:
    """Replies of the model to the turns' contexts."""
    replies = []
    for start in range(0, len(turns), batch_size):
        chunk = [turn["context"] for turn in turns[start : start + batch_size]]
        inputs = pipeline.processor.apply_chat_template(
            chunk, add_generation_prompt=True, tokenize=True, return_tensors="pt"
        )
        torch.manual_seed(seed + start)
        output = pipeline.model.generate(**inputs, max_new_tokens=64, **kwargs)
        new_ids = output.sequences[:, inputs["input_ids"].shape[1] :]
        for row in range(len(chunk)):
            text = pipeline.processor.decode(new_ids[row], skip_special_tokens=True).strip()
            replies.append(
                {
                    "text": text,
                    "sticker": bool(output.sticker_mask[row]),
                    "query": output.sticker_queries[row],
                    "prompt_embeds": output.sticker_prompt_embeds[row],
                }
            )
    return replies


def share(hits: list[bool]) -> float:
    """Mean of hits, rounded."""
    return round(sum(hits) / len(hits), 4)


def macro(golds: list[str], hits: list[bool]) -> float:
    """Mean over the gold emotions of the share of hits, rounded."""
    groups = {e: [hit for gold, hit in zip(golds, hits, strict=True) if gold == e] for e in set(golds)}
    return round(sum(sum(group) / len(group) for group in groups.values()) / len(groups), 4)


def main() -> None:
    """Print the figures and draw the sheets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--limit", type=int, default=0, help="only so many test sessions")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet_libraries()
    pipeline = load_pipeline(args.model)
    model, processor, pack = pipeline.model, pipeline.processor, pipeline.pack
    sessions = load_mini("test")[: args.limit or None]
    dialogues = [session_messages(session, pack) for session in sessions]
    collator = DataCollatorForPegs(processor, model.config, None, 2048)
    figures: dict = {"model": Path(args.model).name, "test_sessions": len(sessions)}

    untouched = AutoModelForCausalLM.from_pretrained(
        find_language_model(model.config.language_model), dtype=torch.float32
    )
    figures["perplexity"] = {
        "pegs": round(perplexity(lambda b: model(**b).logits, collator, dialogues), 3),
        "untouched_smollm2": round(
            perplexity(lambda b: untouched(**b).logits, collator, [text_only(d) for d in dialogues]), 3
        ),
    }

    turns = system_turns(sessions, pack)
    replies = generate(pipeline, turns, args.seed)
    figures["sticker_rate"] = {
        "turns": len(turns),
        "gold": share([turn["gold"] is not None for turn in turns]),
        "pegs": share([reply["sticker"] for reply in replies]),
    }

    with_sticker = [turn for turn in turns if turn["gold"] is not None]
    forced = generate(pipeline, with_sticker, args.seed, sticker_bias=math.inf, do_sample=False)
    rows = {sticker_id: i for i, sticker_id in enumerate(pipeline.pack_ids)}
    databases = {d: [s.id for s in pack.database(d)] for d in {t["session"].database for t in turns}}
    descriptions = embed_sentences([s.description for s in pack.stickers])
    captions = embed_sentences([s.caption for s in pack.stickers])
    messages = embed_sentences([turn["user"] for turn in with_sticker])
    golds = [turn["gold"].emotion for turn in with_sticker]
    hits: dict[str, list[bool]] = {"pegs": [], "minilm_message_to_description": [], "minilm_message_to_caption": []}
    exact, chance = [], []
    for turn, reply, message in zip(with_sticker, forced, messages, strict=True):
        ids = databases[turn["session"].database]
        index = torch.tensor([rows[i] for i in ids])
        order = (pipeline.pack_embeds[index] @ reply["query"]).argsort(descending=True)
        by_text = {
            "minilm_message_to_description": ids[int((descriptions[index] @ message).argmax())],
            "minilm_message_to_caption": ids[int((captions[index] @ message).argmax())],
        }
        hits["pegs"].append(pack.by_id[ids[int(order[0])]].emotion == turn["gold"].emotion)
        for name, found in by_text.items():
            hits[name].append(pack.by_id[found].emotion == turn["gold"].emotion)
        exact.append(ids.index(turn["gold"].id) in order[:5].tolist())
        counts = Counter(pack.by_id[i].emotion for i in ids)
        chance.append(counts[turn["gold"].emotion] / len(ids))
    figures["retrieved_emotion_accuracy"] = {
        "turns": len(with_sticker),
        **{name: share(values) for name, values in hits.items()},
        "chance": round(sum(chance) / len(chance), 4),
    }
    figures["retrieved_emotion_macro_accuracy"] = {
        **{name: macro(golds, values) for name, values in hits.items()},
        "chance": round(
            sum(sum(c for c, g in zip(chance, golds, strict=True) if g == e) / golds.count(e) for e in set(golds))
            / len(set(golds)),
            4,
        ),
    }
    figures["retrieval_recall_at_5_of_database"] = {"pegs": share(exact), "chance": round(5 / 55.5, 4)}

    judge, test = DrawingJudge.of(pipeline), pack.split("test")
    verdicts = judge.name_emotions(judge.embed([pack.image(s.id) for s in test]))
    figures["judge_accuracy_on_held_out_stickers"] = share(
        [v == s.emotion for v, s in zip(verdicts, test, strict=True)]
    )
    drawn = []
    for start in range(0, len(forced), 16):
        chunk = torch.stack([reply["prompt_embeds"] for reply in forced[start : start + 16]])
        generators = [torch.Generator().manual_seed(args.seed + start + i) for i in range(len(chunk))]
        drawn += pipeline.decoder(prompt_embeds=chunk, generator=generators).images
    verdicts = judge.name_emotions(judge.embed(drawn))
    drawn_hits = [verdict == gold for verdict, gold in zip(verdicts, golds, strict=True)]
    train_share = Counter(judge.emotions)
    figures["drawn_emotion_accuracy"] = {
        "pegs": share(drawn_hits),
        "chance": round(sum(train_share[gold] / len(judge.emotions) for gold in golds) / len(golds), 4),
    }
    figures["drawn_emotion_macro_accuracy"] = {"pegs": macro(golds, drawn_hits), "chance": round(1 / len(EMOTIONS), 4)}
    assets = Path(args.model) / "assets"
    assets.mkdir(exist_ok=True)
    draw_request_sheet(pipeline, args.seed).save(assets / "drawn_42.png", optimize=True)
    print(json.dumps(figures))
    rng = random.Random(args.seed)
    with (assets / "replies.jsonl").open("w", encoding="utf-8") as file:
        for i in sorted(rng.sample(range(len(turns)), min(20, len(turns)))):
            nearest = pipeline.retrieve(replies[i]["query"], top_k=1)[0].id if replies[i]["sticker"] else None
            file.write(
                json.dumps(
                    {"user": turns[i]["user"], "reply": replies[i]["text"], "sticker": nearest}, ensure_ascii=False
                )
                + "\n"
            )
    (Path(args.model) / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    (Path(args.model) / "README.md").write_text(render_card("model_card", figures=figures), "utf-8")


def draw_request_sheet(pipeline, seed: int):
    """Six stickers an emotion, drawn by PEGS on request: the user describes a sticker of the pack, PEGS draws what it understood."""
    rng = random.Random(seed)
    chosen = [s for e in EMOTIONS for s in rng.sample([s for s in pipeline.pack.split("train") if s.emotion == e], 6)]
    turns = [{"context": [{"role": "user", "content": [{"type": "text", "text": s.caption}]}]} for s in chosen]
    replies = generate(pipeline, turns, seed, sticker_bias=math.inf, do_sample=False)
    images = []
    for start in range(0, len(replies), 14):
        chunk = torch.stack([reply["prompt_embeds"] for reply in replies[start : start + 14]])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        images += pipeline.decoder(prompt_embeds=chunk, generator=generators).images
    labels = [f"{s.emotion}: {s.tags[0]}" for s in chosen]
    return contact_sheet(
        images, labels, columns=6, footer="Drawn by the mini decoder, trained on OpenMoji (CC BY-SA 4.0)"
    )


if __name__ == "__main__":
    main()
