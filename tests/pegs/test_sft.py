"""The stages that TRL runs: what is learned, what is saved, and what comes back."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dataset_builders.stickerconv.sessions import load_mini
from dataset_builders.stickers.openmoji import cached_pack
from modeling_pegs.backbones import find_language_model
from pegs.adapters import EMBEDDED, load_adapted, load_language_model
from pegs.errors import InputError
from pegs.evaluation.baselines import baseline_chat
from pegs.training import sft
from pegs.training.stages import ConfigError, build_arguments, load_config
from tests.pegs.test_training import ROOT


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(find_language_model(EMBEDDED))


@pytest.fixture
def tiny_model(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setenv("PEGS_LANGUAGE_MODEL", str(folder))
    return folder


def test_marks_change_nothing_that_is_read(tokenizer):
    chats = [
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Yes?"}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Action: x\n"}, {"role": "tool", "content": "Observation: y"}],
    ]  # fmt: skip
    for chat in chats:
        for generate in (False, True):
            plain = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
            marked = tokenizer.apply_chat_template(chat, chat_template=sft.SMOLLM2_TEMPLATE, tokenize=False, add_generation_prompt=generate)  # fmt: skip
            assert marked == plain
    marked = tokenizer.apply_chat_template(chats[2], chat_template=sft.SMOLLM2_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True)  # fmt: skip
    learned = [i for i, mask in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(learned) == "Action: x\n<|im_end|>"


@pytest.mark.parametrize("data", ["text", "tool", "agents"])
def test_an_adapter_is_trained_saved_and_found_again(data, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(sft, "load_sessions", lambda name, split: load_mini(split)[:4])
    stage = "sft_agents" if data == "agents" else f"baseline_{data}"
    values = load_config(str(ROOT / f"configs/mini/{stage}.yaml"), ["--output_dir", str(tmp_path / "out")])
    values["init_from"] = ""
    values["trainer"] |= {"max_steps": 2, "logging_steps": 1, "bf16": False, "gradient_accumulation_steps": 1}
    del values["stage"]
    sft.train_sft(build_arguments(sft.SftArguments, values))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == EMBEDDED["hub_id"]
    with safe_open(tmp_path / "out/adapter_model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    adapted, _ = load_adapted(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(InputError, match=r"out: was trained on top of something else than .*out; train it anew"):
        load_language_model(EMBEDDED, [tmp_path / "out", tmp_path / "out"])
    changed = {name for name, tensor in adapted.state_dict().items() if not tensor.equal(plain.state_dict()[name])}
    assert changed and all("proj" in name for name in changed)


def test_a_baseline_of_another_model_has_its_own_format_and_data(tmp_path, tiny_model):
    session = load_mini("train")[0]
    (tmp_path / "sessions.jsonl").write_text(session.model_dump_json())
    changes = {"output_dir": tmp_path / "out", "sessions": tmp_path / "sessions.jsonl", "stickers": "openmoji"}
    changes["chat_template"] = ROOT / "configs/vicuna-7b/baseline_template.jinja"
    values = load_config(str(ROOT / "configs/vicuna-7b/baseline_tool.yaml"), [])
    values |= {**{name: str(value) for name, value in changes.items()}, "language_model": dict(EMBEDDED)}
    values["trainer"] |= {"max_steps": 1, "per_device_train_batch_size": 1}
    del values["stage"]
    sft.train_sft(build_arguments(sft.SftArguments, values))
    _, tokenizer = load_adapted(tmp_path / "out")
    chat = baseline_chat(session, cached_pack(), with_tool=True)
    told = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, mask in zip(told["input_ids"], told["assistant_masks"], strict=True) if mask]
    said = "".join(message["content"] + tokenizer.eos_token for message in chat if message["role"] == "assistant")
    assert tokenizer.decode(learned).replace(" ", "") == said.replace(" ", "")
    asked = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert asked == f"{tokenizer.bos_token}{chat[0]['content']} USER: {chat[1]['content']} ASSISTANT:"


def test_another_run_starts_afresh_and_a_checkpoint_that_was_cut_is_no_hindrance(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(sft, "load_sessions", lambda name, split: load_mini(split)[:4])
    trainer = {
        "max_length": 512,
        "max_steps": 2,
        "save_steps": 1,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 1,
    }
    lora = {"r": 2, "target_modules": ["q_proj"]}
    checkpoints, weights = tmp_path / "out" / "trainer", []
    for rate in (1e-2, 1e-2, 1e-3):
        settings = {**trainer, "learning_rate": rate}
        sft.train_sft(sft.SftArguments("text", str(tmp_path / "out"), lora=lora, trainer=settings))
        weights.append(load_file(tmp_path / "out" / "adapter_model.safetensors"))
        (checkpoints / "checkpoint-2" / "trainer_state.json").write_text("{")
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())
    assert not all(tensor.equal(weights[2][name]) for name, tensor in weights[0].items())


def test_lora_that_matches_no_module_is_named(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(sft, "load_sessions", lambda name, split: load_mini(split)[:4])
    trainer, lora = {"max_length": 512, "bf16": False}, {"target_modules": ["none_such"]}
    with pytest.raises(ConfigError, match=r"lora or trainer: .*none_such"):
        sft.train_sft(sft.SftArguments("text", str(tmp_path / "out"), lora=lora, trainer=trainer))


def test_the_loss_of_answers_goes_through_the_wrapped_models_forward(tmp_path, tiny_model, tokenizer):
    model, _ = load_language_model(EMBEDDED)
    tokenizer.chat_template = sft.SMOLLM2_TEMPLATE
    chats = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}] for said in ("Yes?", "What is it?")
    ]
    trainer = sft.AnswerTrainer(
        model=model,
        args=sft.SFTConfig(str(tmp_path), assistant_only_loss=True, use_cpu=True, report_to="none", bf16=False),
        train_dataset=sft.Dataset.from_list([{"messages": chat} for chat in chats]),
        processing_class=tokenizer,
        peft_config=sft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    wrapped = torch.nn.DataParallel(trainer.model)
    went = []
    wrapped.register_forward_hook(lambda *_: went.append(1))
    loss = trainer.compute_loss(wrapped, batch)
    assert went == [1]
    torch.testing.assert_close(loss, trainer.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss)


def test_the_shipped_agents_adapter_changes_what_the_model_says(tokenizer):
    from pegs.agent_tools import AGENTS, DEFAULT_MODEL

    ids = tokenizer("Hello", return_tensors="pt")
    logits = [
        load_language_model(EMBEDDED, adapters)[0](**ids).logits
        for adapters in ([], [DEFAULT_MODEL / "adapter"], [DEFAULT_MODEL / "adapter", AGENTS])
    ]
    assert not logits[0].allclose(logits[1]) and not logits[1].allclose(logits[2])


def test_chats_of_agents_end_with_their_answer():
    from dataset_builders.stickers.encoder import TextEncoder
    from pegs.agent_tools import load_toolbox

    toolbox, _ = load_toolbox("openmoji", TextEncoder())
    session = next(s for s in load_mini("train") if any(turn.system.sticker for turn in s.turns))
    forms = ("FreeIntention", "DueIntention", "Query", "Choice", "StickerReview", "DialogueReview")
    chats = list(sft.agent_chats(session, toolbox, dict.fromkeys(forms, 1.0), 0))
    answers = [chat[-1]["content"] for chat in chats]
    assert all(chat[-1]["role"] == "assistant" for chat in chats)
    said = {message.text for turn in session.turns for message in (turn.user, turn.system)}
    assert [answer in said for answer in answers[-2:]] == [True, True]
    keys = {tuple(json.loads(answer)) for answer in answers[:-2]}
    assert {("choice",), ("query", "emotion"), ("reason", "consistent")} <= keys
