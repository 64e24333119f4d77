"""Every stage of the paper's configuration runs, through its own file, on a model reduced in width."""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors import safe_open
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
)

from dataset_builders.schema import Generator, Message, Profile, Session, Sticker, StickerUse, Turn
from dataset_builders.stickers.pack import PackInfo, StickerPack
from modeling_pegs import PegsConfig, PegsModel
from modeling_pegs.backbones import load_vision
from pegs.training.build import build_model
from pegs.training.data_collator import DataCollatorForPegs
from pegs.training.language import LanguageArguments
from pegs.training.stages import ConfigError, build_arguments, load_config, main
from tests.fixtures import tiny


CONFIGS = Path(__file__).parents[2] / "configs"
VICUNA = CONFIGS / "vicuna-7b"
NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COLORS = ("red", "green", "blue", "gold")
# the table's rows: learning rate, warm-up, weight decay, batch, longest caption or dialogue, and steps or epochs
PAPER = {
    "pretrain_perception": (1e-4, 2000, 0.05, 128, 32, 80000),
    "pretrain_retrieval": (3e-5, 4000, 1e-4, 36, 77, 142220),
    "pretrain_generation": (1e-5, 1000, 0.05, 108, 32, 80000),
    "sft_retrieval": (3e-5, 70, 0.05, 36, None, 10),
    "sft_generation": (5e-5, 200, 0.05, 108, None, 4),
    "joint_ret": (3e-6, 2000, 0.05, 4, 768, 9),
    "joint_rag": (3e-6, 2000, 0.05, 4, 768, 9),
    "joint_gen": (1e-4, 1000, 0.05, 4, 768, 4),
}


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    tiny.picture(color).save(buffer, "PNG")
    return buffer.getvalue()


def make_pack() -> StickerPack:
    info = PackInfo(name="tiny", version="1", licence="CC0-1.0", attribution="nobody", source="made up")
    stickers = [
        Sticker(
            id=color,
            image_path=f"{color}.png",
            emotion="happiness",
            tags=(color,),
            width=40,
            height=40,
            sha256=f"{number:064x}",
        )
        for number, color in enumerate(COLORS)
    ]
    return StickerPack(info, stickers, {color: png(color) for color in COLORS})


def make_session(number: int, split: str) -> Session:
    def use(color: str) -> StickerUse:
        return StickerUse(id=color, emotion="happiness", query="q", rank=0, intention="emotional expression")

    turns = [
        Turn(turn=1, user=Message(text="Hi.", sticker=use(COLORS[number % 4])), system=Message(text="Hello.")),
        Turn(turn=2, user=Message(text="So?"), system=Message(text="Well.", sticker=use(COLORS[number % 2]))),
    ]
    return Session(
        session_id=f"s{number}",
        split=split,
        database=1,
        profile=Profile(name="A", emotion="happiness", persona="You are.", situation="You do."),
        turns=tuple(turns),
        ended_by="closure",
        generator=Generator(name="test", version="1"),
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with all that the paper's stages ask for, at tiny sizes."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    plain = tiny.make_tiny_tokenizer(SimpleNamespace(new_tokens=[]))
    text = LlamaConfig(
        **NARROW, vocab_size=len(plain), num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=tiny.EOS
    )
    LlamaForCausalLM(text).save_pretrained(root / "vicuna")
    plain.save_pretrained(root / "vicuna")
    vision = {**NARROW, "image_size": 28, "patch_size": 14}
    qformer = {**NARROW, "cross_attention_frequency": 1, "encoder_hidden_size": 32, "vocab_size": 30523}
    opt = {"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    blip = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config={**opt, "vocab_size": 64, "word_embed_proj_dim": 16},
        num_query_tokens=32,
    )
    Blip2ForConditionalGeneration(blip).save_pretrained(root / "blip2")
    clip = CLIPTextConfig(**{**NARROW, "hidden_size": 24}, vocab_size=512, max_position_embeddings=77, eos_token_id=1)
    CLIPTextModel(clip).save_pretrained(root / "sd" / "text_encoder")
    plain.save_pretrained(root / "sd" / "tokenizer")
    make_pack().save(root / "pack")
    sessions = [make_session(number, "train") for number in range(3)] + [make_session(3, "validation")]
    (root / "sessions.jsonl").write_text("\n".join(session.model_dump_json() for session in sessions))
    with tarfile.open(root / "pairs.tar", "w") as tar:
        for number in range(12):
            caption = json.dumps({"caption": f"A {COLORS[number % 4]} Square!"}).encode()
            for suffix, data in (("png", png(COLORS[number % 4])), ("json", caption)):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    model = yaml.safe_load((VICUNA / "model.yaml").read_text())
    narrow = {
        "vision_config": vision,
        "qformer_config": {**model["qformer_config"], **NARROW, "cross_attention_frequency": 1},
    }
    narrow |= {"mapper_hidden_size": 32, "mapper_intermediate_size": 64, "mapper_num_layers": 1, "prompt_dim": 24}
    (root / "model.yaml").write_text(yaml.safe_dump({**model, **narrow}))
    return root


def narrowed(world: Path, name: str) -> list[str]:
    """The command line of a stage of the paper, with this world's data and two steps."""
    values = yaml.safe_load((VICUNA / f"{name}.yaml").read_text())
    trainer = {key: value for key, value in values["trainer"].items() if key != "num_train_epochs"}
    trainer |= {"max_steps": 2, "per_device_train_batch_size": 2, "warmup_steps": 0, "logging_steps": 1}
    trainer["gradient_accumulation_steps"] = min(2, trainer.get("gradient_accumulation_steps", 1))
    changes = {"output_dir": str(world / name), "trainer": trainer, "samples": 1}
    places = {"pairs": [str(world / "pairs.tar")], "stickers": str(world / "pack"), "text_encoder": str(world / "sd")}
    places |= {"sessions": str(world / "sessions.jsonl"), "vision_from": str(world / "blip2")}
    changes |= {key: value for key, value in places.items() if key in values}
    start = values["init_from"]
    changes["init_from"] = str(world / ("model.yaml" if start.endswith(".yaml") else Path(start).name))
    pairs = [(f"--{key}", yaml.safe_dump(value, default_flow_style=True)) for key, value in changes.items()]
    return ["--config", str(VICUNA / f"{name}.yaml"), *(part for pair in pairs for part in pair)]


@pytest.mark.slow
def test_every_stage_of_the_paper_trains_what_it_says_and_starts_from_the_last(world, monkeypatch):
    monkeypatch.setenv("PEGS_LANGUAGE_MODEL", str(world / "vicuna"))
    monkeypatch.setenv("HF_HOME", str(world))
    for name in PAPER:
        assert main(narrowed(world, name)) == 0, name
        values = yaml.safe_load((VICUNA / f"{name}.yaml").read_text())
        after = PegsModel.from_pretrained(world / name)
        before = build_model(str(world / "model.yaml")) if values["init_from"].endswith(".yaml") else None
        if before is None:
            before = PegsModel.from_pretrained(world / Path(values["init_from"]).name)
        else:
            load_vision(before, world / "blip2")
        with safe_open(world / name / "model.safetensors", "pt") as file:
            held = {key.partition(".")[0] for key in file.keys()}
        assert not held & {"language_model", "vision_model", "qformer", "query_tokens"}, f"{name}: {held}"
        trained = values["trainable"]
        old = dict(before.named_parameters())
        changed = {key for key, p in after.named_parameters() if not torch.equal(p, old[key])}
        for prefix in trained:
            mark = ".lora_" if prefix == "lora" else prefix
            assert any(mark in key for key in changed), f"{name}: {prefix}"
        strays = {k for k in changed if not any((".lora_" if p == "lora" else p) in k for p in trained)}
        # weights that a fresh model draws anew each time are no strays
        assert values["init_from"].endswith(".yaml") or not strays, f"{name}: {strays}"
        assert after.config.variant == values.get("variant", before.config.variant)
    replies = [json.loads(line) for line in (world / "joint_rag" / "replies.jsonl").read_text().splitlines()]
    assert replies and all(set(reply) == {"step", "user", "reply", "sticker"} for reply in replies)
    assert "dialogues" not in (world / "joint_rag" / "config.json").read_text()


@pytest.mark.parametrize("name", sorted(PAPER))
def test_the_papers_stages_have_the_papers_values(name):
    values = load_config(str(VICUNA / f"{name}.yaml"), [])
    values.pop("stage")
    args = build_arguments(LanguageArguments, values)
    rate, warmup, decay, batch, length, duration = PAPER[name]
    trainer = args.trainer
    assert float(trainer["learning_rate"]) == rate and trainer["warmup_steps"] == warmup
    assert trainer["weight_decay"] == decay
    assert trainer["per_device_train_batch_size"] * trainer.get("gradient_accumulation_steps", 1) == batch
    assert (trainer.get("max_steps") or trainer["num_train_epochs"]) == duration
    if length is not None:
        assert (args.max_length if args.data == "sessions" else args.caption_length) == length
    if name.startswith("joint"):
        assert args.lora_learning_rate == rate


@pytest.mark.parametrize("path", sorted((CONFIGS / "modern-4b").glob("*.yaml")), ids=lambda path: path.stem)
def test_modern_stages_are_complete(path):
    if path.stem == "model":
        with torch.device("meta"):
            config = PegsConfig(**yaml.safe_load(path.read_text()))
            assert config.vision_config.model_type == "siglip_vision_model"
            assert config.qformer_config.encoder_hidden_size == 1152 and config.num_img_tokens == 32
        return
    values = load_config(str(path), [])
    assert values.pop("stage") == path.stem
    build_arguments(LanguageArguments, values)


@pytest.mark.parametrize(("name", "kind"), [("cpu", "NO"), ("multi_gpu", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")])  # fmt: skip
def test_accelerate_reads_its_configurations(name, kind):
    assert load_config_from_file(str(CONFIGS / "accelerate" / f"{name}.yaml")).distributed_type == kind


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": "songs"}, "must be captions, requests, texts or sessions, got 'songs'"),
    ({"loss_weights": {"retreival": 0.5}}, "`loss_weights` are of lm, retrieval and generation, got 'retreival'"),
    ({"dtype": "half"}, "must be float32 or bfloat16, got 'half'"),
    ({"dtype": "bfloat16"}, "`trainer` needs `bf16: true`"),
    ({"negatives": "none"}, "must be pack or batch, got 'none'"),
    ({"data": "texts", "pairs": ["a.tar"]}, "are for captions or requests, not for texts"),
    ({"data": "requests", "pairs": ["a.tar"]}, "`negatives` must be batch"),
    ({"pairs": ["a.tar"]}, "`trainer` needs `max_steps`"),
    ({"data": "sessions", "trainable": ["vision_model"]}, "`vision_model` is `trainable`, `negatives` must be batch"),
])  # fmt: skip
def test_what_cannot_be_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_arguments(LanguageArguments, {"data": "captions", "init_from": "a", "output_dir": "b", **changes})


def test_a_siglip_tower_is_taken_over_and_a_wrong_one_is_named(tmp_path, world):
    vision = {**NARROW, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
    text = {**NARROW, "vocab_size": 64, "max_position_embeddings": 8}
    siglip = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    siglip.save_pretrained(tmp_path)
    model = tiny.make_tiny_model(vision_config=vision)
    load_vision(model, tmp_path)
    pixels = torch.randn(2, 3, 28, 28)
    expected = siglip.vision_model.eval()(pixels).last_hidden_state
    torch.testing.assert_close(model.encode_images(pixels).last_hidden_state, expected)
    wide = tiny.make_tiny_model(vision_config={**vision, "intermediate_size": 48})
    with pytest.raises(ValueError, match=r"vision_model\..* has the shape \(.*\), the configuration asks for"):
        load_vision(wide, tmp_path)


def test_vicunas_format_marks_what_the_assistant_says():
    """Its format has no tokens of its own around a message."""
    config = tiny.make_tiny_config()
    template = (VICUNA / "chat_template.jinja").read_text().replace("{{ img_span }}", "".join(config.new_tokens[3:]))
    processor = tiny.make_tiny_processor(config)
    processor.chat_template = template
    said = processor.apply_chat_template(tiny.dialogue(stickers=False), tokenize=False, add_generation_prompt=True)
    assert said.endswith(
        " sticker. USER: My dog died. ASSISTANT: Oh no. What was he called?<|im_end|>USER: Bruno ASSISTANT:"
    )
    collator = DataCollatorForPegs(processor, config, None, 2048)
    messages = [*tiny.dialogue(), {"role": "assistant", "content": [{"type": "text", "text": "A good name."}]}]
    ids = torch.tensor(collator.encode(messages))
    labels = collator.make_labels(ids, torch.ones_like(ids))
    span = "".join(config.new_tokens[3:])
    assert (
        processor.decode(labels[labels != -100])
        == f" Oh no. What was he called?{span}<|im_end|> A good name.<|im_end|>"
    )
