"""
A joint step at the mini scale against the straightforward implementation: samples a second, peak memory, and the same loss. One JSON line.

    python benchmarks/training.py [--steps 3] [--bf16]

Straightforward: every picture, those to choose from too, is opened and goes through the vision tower in every step, captions through the text encoder;
dialogues are padded; scores are made at every position. Batches are those of `configs/mini/joint.yaml`: eight of its sessions and openers in random order. Each of the two runs in a process of its own, in
one thread. Seconds are of CPU time.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time

import torch
import yaml
from torch.nn import functional as F

from dataset_builders.stickers.openmoji import cached_pack
from modeling_pegs import PegsModel, PegsProcessor
from modeling_pegs.retrieval_head import info_nce_loss
from pegs.quiet import quiet_libraries
from pegs.training.data_collator import DataCollatorForPegs
from pegs.training.language import freeze_except, training_dialogues
from pegs.training.targets import CaptionStates, StickerTargets, VisionFeatures


CHECKPOINT = "checkpoints/pegs-mini"


def straightforward_step(model, processor, pack, dialogues: list[list[dict]]) -> torch.Tensor:
    """The joint loss, written down as the paper has it."""
    labels_of = DataCollatorForPegs(processor, model.config, None, 1024)
    batch = processor.apply_chat_template(dialogues, tokenize=True, return_tensors="pt", padding_side="right")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = torch.stack([labels_of.make_labels(*row) for row in zip(ids, mask, strict=True)])
    sent = [
        part["sticker_id"]
        for messages in dialogues
        for message in messages
        if message["role"] == "assistant"
        for part in message["content"]
        if part["type"] == "image"
    ]
    choices = [sticker.id for sticker in pack.split("train")]
    pictures = processor(["<IMG>"] * len(choices), [pack.image(i) for i in choices], return_tensors="pt")
    pooled = torch.cat([model.encode_images(part).pooler_output for part in pictures["pixel_values"].split(64)])
    targets = CaptionStates("", model.config.prompt_length)([pack.by_id[i].caption for i in sent])
    output = model(input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"])
    lm_loss = F.cross_entropy(output.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
    spans = model.get_img_hidden_states(ids, output.last_hidden_state)
    k = model.config.num_retrieval_tokens
    texts, images = model.retrieval_head.embed_text(spans[:, :k]), model.retrieval_head.embed_image(pooled)
    positives = torch.tensor([[i == j for j in choices] for i in sent])
    retrieval = info_nce_loss(texts, images, positives, model.config.retrieval_temperature)
    generation = F.mse_loss(model.feature_mapper(spans[:, k:]).float(), targets)
    weights = model.config
    return (
        weights.lm_loss_weight * lm_loss
        + weights.retrieval_loss_weight * retrieval
        + weights.generation_loss_weight * generation
    )


def measure(kind: str, args: argparse.Namespace) -> dict:
    """CPU seconds of all steps, peak memory in GB, the losses, and how many dialogues a step has."""
    torch.set_num_threads(1)
    quiet_libraries()
    model, processor = PegsModel.from_pretrained(CHECKPOINT), PegsProcessor.from_pretrained(CHECKPOINT)
    with open("configs/mini/joint.yaml", encoding="utf-8") as file:
        stage = yaml.safe_load(file)
    freeze_except(model, stage["trainable"])
    pack, size = cached_pack(), stage["trainer"]["per_device_train_batch_size"]
    dialogues = random.Random(0).sample(training_dialogues("", stage["openers"], pack), size * (args.steps + 1))
    if kind == "ours":
        model.causal_lm.set_attn_implementation("dialogues")
        vision = VisionFeatures(pack, model, processor)
        captions = {sticker.id: sticker.caption for sticker in pack.split("train")}
        targets = StickerTargets(captions, CaptionStates("", model.config.prompt_length), vision)
        collate = DataCollatorForPegs(processor, model.config, targets, 1024, vision=vision, packed=True)
    seconds, losses = [], []
    for start in range(0, len(dialogues), size):  # the first one warms up
        batch = dialogues[start : start + size]
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            if kind == "ours":
                loss = model(**collate([{"messages": messages} for messages in batch])).loss
            else:
                loss = straightforward_step(model, processor, pack, batch)
        loss.backward()
        model.zero_grad()
        seconds.append(time.process_time() - started)
        losses.append(loss.item())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"seconds": sum(seconds[1:]), "peak_gb": peak, "losses": losses, "size": size}


def main() -> None:
    """Measure both and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--kind", choices=("straightforward", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(measure(args.kind, args)))
        return
    found = {}
    for kind in ("straightforward", "ours"):
        command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    plain, ours = found["straightforward"], found["ours"]
    figures = {
        "dialogues": ours["size"],
        "steps": args.steps,
        "precision": "bf16" if args.bf16 else "fp32",
        "samples_a_second": {kind: round(f["size"] * args.steps / f["seconds"], 3) for kind, f in found.items()},
        "speedup": round(plain["seconds"] / ours["seconds"], 2),
        "peak_gb": {kind: round(f["peak_gb"], 2) for kind, f in found.items()},
        "peak_memory_ratio": round(ours["peak_gb"] / plain["peak_gb"], 3),
        "loss_difference": max(abs(a - b) for a, b in zip(plain["losses"], ours["losses"], strict=True)),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
