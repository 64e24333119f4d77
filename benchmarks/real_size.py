"""
Joint steps at the paper's size (configs/vicuna-7b) on one GPU, with random weights: seconds a step, peak memory, what is trained. One JSON line.

    python benchmarks/real_size.py [--steps 5] [--batch 4] [--length 768]

Nothing is downloaded: the language model is a `LlamaForCausalLM` of Vicuna's size. A dialogue holds four stickers that are seen and two that are sent.
"""

import argparse
import json
import time

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_pegs import PegsConfig, PegsModel
from pegs.training.language import freeze_except


SEEN, SENT = 4, 2


def make_model(path: str, device: str) -> PegsModel:
    """The model of a configuration file with random weights: all in bfloat16."""
    with open(path, encoding="utf-8") as file:
        values = yaml.safe_load(file)
    text_config = LlamaConfig(intermediate_size=11008, tie_word_embeddings=False)  # the other defaults are Llama 7B's
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = PegsModel(PegsConfig(text_config=text_config, **values))
            model.attach_language_model(LlamaForCausalLM(text_config))
    finally:
        torch.set_default_dtype(torch.float32)
    return model


def make_batch(config: PegsConfig, batch: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """Random words with stickers at fixed places, and random targets."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, config.first_new_token_id, (batch, length), generator=generator)
    labels = torch.where(torch.rand(batch, length, generator=generator) < 0.4, ids, -100)
    places = torch.linspace(8, length - config.num_img_tokens - 8, SEEN + SENT).long()
    for number, place in enumerate(places):
        sent = number >= SEEN
        span = config.img_token_ids if sent else [config.image_token_id] * config.num_query_tokens
        ids[:, place : place + len(span)] = torch.tensor(span)
        labels[:, place : place + len(span)] = torch.tensor(span) if sent else -100
    size, stickers = config.vision_config.image_size, batch * SENT
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "labels": labels.to(device),
        "pixel_values": torch.randn(batch * SEEN, 3, size, size, generator=generator).to(device, torch.bfloat16),
        "target_prompt_embeds": torch.randn(stickers, config.prompt_length, config.prompt_dim).to(device),
        "retrieval_features": torch.randn(stickers, config.vision_config.hidden_size).to(device, torch.bfloat16),
        "retrieval_positives": torch.eye(stickers, dtype=torch.bool).to(device),
    }


def main() -> None:
    """Train a few steps and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="configs/vicuna-7b/model.yaml")
    parser.add_argument("--stage", default="configs/vicuna-7b/joint_rag.yaml")
    parser.add_argument("--device", default="cuda")
    for name, default in (("steps", 5), ("batch", 4), ("length", 768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(json.dumps({"skipped": "needs a GPU of 40 GB or more"}))
        return
    torch.manual_seed(0)  # noqa: TID251  entry point
    with open(args.stage, encoding="utf-8") as file:
        stage = yaml.safe_load(file)
    started = time.perf_counter()
    model = make_model(args.model, args.device)
    trained = freeze_except(model, stage["trainable"])
    weights = [p for p in model.parameters() if p.requires_grad]
    for parameter in weights:
        parameter.data = parameter.data.float()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(weights, lr=1e-5)
    batch = make_batch(model.config, args.batch, args.length, args.device)
    made = time.perf_counter() - started
    seconds, losses = [], []
    for _ in range(args.steps + 1):  # the first one warms up
        started = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    gpu = args.device == "cuda"
    figures = {
        "device": torch.cuda.get_device_name() if gpu else args.device,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": trained,
        "batch": args.batch,
        "length": args.length,
        "seconds_to_make": round(made, 1),
        "seconds_a_step": round(sorted(seconds[1:])[args.steps // 2], 3),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if gpu else None,
        "losses": [round(value, 3) for value in losses],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
