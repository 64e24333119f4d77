import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from modeling_pegs import PegsConfig, PegsModel, backbones, modeling_pegs
from modeling_pegs.modeling_pegs import AddedVocabulary
from modeling_pegs.retrieval_head import info_nce_loss
from tests.fixtures import tiny


def test_config_round_trips(tmp_path):
    config = tiny.make_tiny_config(lora={"r": 2, "target_modules": ["q_proj"]})
    config.save_pretrained(tmp_path)
    again = PegsConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.img_token_ids == [262, 263, 264, 265, 266]
    assert again.new_tokens[:4] == ["<Img>", "</Img>", "<IMG>", "[IMG1]"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"variant": "fax"}, "must be one of ret, gen, rag, got 'fax'"),
    ({"variant": "rag", "num_retrieval_tokens": 0}, "needs `num_retrieval_tokens`"),
    ({"variant": "gen", "num_generation_tokens": 0}, "needs `num_generation_tokens`"),
])  # fmt: skip
def test_config_refuses_impossible_variants(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.make_tiny_config(**changes)


def batch_for(model, processor, seed=0):
    """Two dialogues of different length with every kind of target."""
    from pegs.training.data_collator import DataCollatorForPegs

    class Targets:
        vision_features = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
        states = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(seed + 1))

        def positives(self, sent):
            return torch.nn.functional.one_hot(torch.arange(len(sent)), 3).bool()

        def prompt_embeds(self, sent):
            return self.states[: len(sent)]

    collator = DataCollatorForPegs(processor, model.config, Targets(), max_length=600)
    first = [*tiny.dialogue(), {"role": "assistant", "content": [{"type": "text", "text": "A good name."}]}]
    second = tiny.dialogue()[:2]
    return collator([{"messages": first}, {"messages": second}])


def test_labels_cover_what_the_assistant_says_sends_and_ends_with(model, processor):
    batch = batch_for(model, processor)
    said = processor.decode(batch["labels"][0][batch["labels"][0] != -100])
    span = "".join(model.config.new_tokens[3:])
    assert said == f"Oh no. What was he called?{span}<|im_end|>A good name.<|im_end|>"
    assert (batch["labels"][batch["input_ids"] == model.config.image_token_id] == -100).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_joint_loss_is_the_sum_of_its_parts(model, processor):
    batch = batch_for(model, processor)
    output = model(**batch)
    total = output.lm_loss + output.retrieval_loss + output.generation_loss
    torch.testing.assert_close(output.loss, total)


def test_lm_loss_equals_an_independent_computation(model, processor):
    batch = batch_for(model, processor)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    log_probs = model(**inputs).logits.log_softmax(-1)
    terms = [
        -log_probs[row, position - 1, batch["labels"][row, position]]
        for row, position in (batch["labels"] != -100).nonzero().tolist()
    ]
    torch.testing.assert_close(model(**batch).lm_loss, torch.stack(terms).mean())


def test_only_what_should_train_does(processor):
    from pegs.training.language import freeze_except

    model = tiny.make_tiny_model(lora={"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]})
    trainable = ["lora", "added_vocabulary", "language_projection", "retrieval_head", "feature_mapper"]
    freeze_except(model, trainable)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    model.train()
    for _ in range(3):
        model(**batch_for(model, processor)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        should = any(".lora_" in name if p == "lora" else name.startswith(p) for p in trainable)
        assert torch.equal(parameter, before[name]) != should, f"{name} {'has not' if should else 'has'} changed"


def test_freeze_except_refuses_a_prefix_without_parameters(model):
    from pegs.training.language import freeze_except

    with pytest.raises(ValueError, match="'nothing' names no parameter"):
        freeze_except(copy.deepcopy(model), ["nothing"])


def test_placeholders_and_stickers_must_match(model):
    with pytest.raises(ValueError, match="1 <IMG> placeholders, 0 stickers need 0"):
        model(input_ids=torch.tensor([[5, model.config.image_token_id]]))


def test_info_nce_equals_equation_8():
    generator = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(4, 8, generator=generator), dim=-1)
    image = torch.nn.functional.normalize(torch.randn(4, 8, generator=generator), dim=-1)
    sim = (text @ image.T / 0.07).exp()
    t2i = -sum((sim[i, i] / sim[i].sum()).log() for i in range(4)) / 4
    i2t = -sum((sim[i, i] / sim[:, i].sum()).log() for i in range(4)) / 4
    torch.testing.assert_close(info_nce_loss(text, image, torch.eye(4).bool(), 0.07), (t2i + i2t) / 2)


def test_info_nce_counts_a_repeated_sticker_as_right_for_both_replies():
    same = torch.nn.functional.normalize(torch.ones(2, 8), dim=-1)
    image = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    positives = torch.tensor([[True, False, False], [True, False, False]])
    loss = info_nce_loss(same, image, positives, 0.07)
    assert torch.isfinite(loss)
    better = info_nce_loss(image[:1].expand(2, -1), image, positives, 0.07)
    assert better < loss


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj", "v_proj"]}])
def test_save_and_load_give_the_same_model(tmp_path, lora, processor):
    model = tiny.make_tiny_model(lora=lora)
    model.save_pretrained(tmp_path)
    again = PegsModel.from_pretrained(tmp_path)
    for (name, one), (_, two) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_referenced_language_model_is_left_out_of_the_checkpoint(tmp_path, monkeypatch):
    model = tiny.make_tiny_model()
    model.language_model.save_pretrained(tmp_path / "backbone")
    reference = {"hub_id": "nobody/nothing", "package": None, "gguf_file": None}
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    referring = PegsModel(tiny.make_tiny_config(language_model=reference, lora=lora))
    referring.attach_language_model(copy.deepcopy(model.language_model))
    with torch.no_grad():
        for name, parameter in referring.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    referring.eval().save_pretrained(tmp_path / "pegs")
    from safetensors import safe_open

    with safe_open(tmp_path / "pegs" / "model.safetensors", "pt") as file:
        assert not any(key.startswith("language_model") for key in file.keys())
    again = PegsModel.from_pretrained(tmp_path / "pegs", language_model_path=tmp_path / "backbone")
    ids = torch.randint(3, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(input_ids=ids).logits, referring(input_ids=ids).logits)
    again.save_pretrained(tmp_path / "saved")
    written = [file for file in (tmp_path / "saved").rglob("*") if file.suffix in (".json", ".md")]
    assert len(written) > 3 and not any(str(tmp_path) in file.read_text() for file in written)
    with pytest.raises(FileNotFoundError) as caught:
        PegsModel.from_pretrained(tmp_path / "pegs")
    for way in ("language_model_path=", "install a package", "let the Hub be reached to download nobody/nothing"):
        assert way in str(caught.value)


def test_gradient_checkpointing_does_not_change_the_loss(processor):
    model = tiny.make_tiny_model().train()
    batch = batch_for(model, processor)
    torch.manual_seed(1)
    plain = model(**batch).loss
    model.gradient_checkpointing_enable()
    torch.manual_seed(1)
    torch.testing.assert_close(model(**batch).loss, plain)


BACKBONES = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "glm": {"head_dim": 8, "pad_token_id": 2},
    "glm4": {"head_dim": 8, "pad_token_id": 2},
}
VISION = {
    "blip_2_vision_model": {},
    "clip_vision_model": {},
    "siglip_vision_model": {},
    "siglip2_vision_model": {"num_patches": 4},
}


def make_backbone(text: str, vision: str, **changes) -> PegsModel:
    base = tiny.make_tiny_config()
    text_config = {**base.text_config.to_dict(), "model_type": text, **BACKBONES[text]}
    vision_values = {k: v for k, v in base.vision_config.to_dict().items() if k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")}  # fmt: skip
    vision_config = {**vision_values, "model_type": vision, **VISION[vision]}
    return tiny.make_tiny_model(text_config=text_config, vision_config=vision_config, **changes)


@pytest.mark.parametrize(
    ("text", "vision"),
    [
        ("llama", "clip_vision_model"),
        ("qwen3", "siglip_vision_model"),
        ("glm", "siglip2_vision_model"),
        ("glm4", "blip_2_vision_model"),
    ],
)
def test_any_backbone_trains_saves_and_generates(text, vision, tmp_path, processor):
    model = make_backbone(text, vision, lora={"r": 2, "target_modules": ["q_proj", "v_proj"]})
    assert (model.config.text_config.model_type, model.config.vision_config.model_type) == (text, vision)
    model(**batch_for(model, processor)).loss.backward()
    assert model.query_tokens.grad.abs().sum() > 0 and model.language_projection.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = PegsModel.from_pretrained(tmp_path)
    assert type(again.causal_lm) is type(model.causal_lm) and type(again.vision_model) is type(model.vision_model)
    inputs = processor.apply_chat_template(
        [tiny.dialogue(), tiny.dialogue()[:1]], add_generation_prompt=True, tokenize=True, return_tensors="pt"
    )
    always = {"sticker_bias": torch.inf, "do_sample": False, "max_new_tokens": 4, "forced_eos_token_id": tiny.EOS}
    one, two = (m.generate(**inputs, **always) for m in (model, again))
    assert torch.equal(one.sequences, two.sequences) and one.sticker_mask.all()
    torch.testing.assert_close(one.sticker_queries, two.sticker_queries)


def test_siglip2_sees_the_patches_of_its_own_processor():
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    model = make_backbone("llama", "siglip2_vision_model")
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    patches = torch.stack([torch.tensor(convert_image_to_patches(image.numpy(), 14)) for image in pixels])
    shapes, mask = torch.tensor([[2, 2], [2, 2]]), torch.ones(2, 4, dtype=torch.long)
    expected = model.vision_model(patches, pixel_attention_mask=mask, spatial_shapes=shapes).pooler_output
    torch.testing.assert_close(model.encode_images(pixels).pooler_output, expected)


def test_kept_vision_states_stand_for_the_pictures(model, processor):
    batch = batch_for(model, processor)
    states = model.encode_images(batch["pixel_values"]).last_hidden_state
    kept = {key: value for key, value in batch.items() if key != "pixel_values"}
    torch.testing.assert_close(model(**kept, vision_states=states).loss, model(**batch).loss)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_checkpoint_holds_everything(tmp_path, processor, tied):
    text_config = {**tiny.make_tiny_config().text_config.to_dict(), "tie_word_embeddings": tied}
    whole = tiny.make_tiny_model(text_config=text_config)
    whole.language_model.save_pretrained(tmp_path / "backbone")
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    model = PegsModel(tiny.make_tiny_config(text_config=text_config, language_model={"hub_id": "a/b"}, lora=lora))
    model.attach_language_model(copy.deepcopy(whole.language_model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.eval()
    ids = torch.randint(3, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids).logits
    merged = model.merge()
    torch.testing.assert_close(merged(input_ids=ids).logits, before, atol=1e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter").exists()
    again = PegsModel.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(input_ids=ids).logits, merged(input_ids=ids).logits)
    assert (again.causal_lm.lm_head.weight is again.get_input_embeddings().weight) == tied


@pytest.fixture
def referring(tmp_path):
    """A checkpoint with an adapter in one folder, its language model in another."""
    whole = tiny.make_tiny_model()
    whole.language_model.save_pretrained(tmp_path / "backbone")
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    model = PegsModel(tiny.make_tiny_config(language_model={"hub_id": "nobody/nothing"}, lora=lora))
    model.attach_language_model(whole.language_model)
    model.eval().save_pretrained(tmp_path / "pegs")
    return tmp_path


def test_an_adapter_is_found_in_a_subfolder_and_missed_where_there_is_none(referring):
    places = {"language_model_path": referring / "backbone"}
    whole = PegsModel.from_pretrained(referring / "pegs", **places)
    found = PegsModel.from_pretrained(referring, subfolder="pegs", **places)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
    shutil.rmtree(referring / "pegs" / "adapter")
    with pytest.raises(ValueError, match=r"adapter is missing: the configuration says that there is LoRA"):
        PegsModel.from_pretrained(referring / "pegs", **places)


def test_saving_with_a_push_pushes_the_adapter_too(referring, monkeypatch, tmp_path):
    model = PegsModel.from_pretrained(referring / "pegs", language_model_path=referring / "backbone")
    pushed, folder = {}, tmp_path / "mine"

    def upload(folder_path, **kwargs):
        pushed.update(kwargs, weights=load_file(folder_path / "model.safetensors"))
        assert (folder_path / "adapter" / "adapter_model.safetensors").is_file()

    monkeypatch.setattr(modeling_pegs, "create_repo", lambda repo, **_: SimpleNamespace(repo_id=f"me/{repo}"))
    monkeypatch.setattr(modeling_pegs, "upload_folder", upload)
    averaged = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, averaged, push_to_hub=True, commit_message="first", token="x")
    assert not any(tensor.any() for tensor in pushed.pop("weights").values())
    assert pushed == {"repo_id": "me/mine", "commit_message": "first", "token": "x"}


def test_only_the_main_process_saves_the_adapter(referring, tmp_path):
    model = PegsModel.from_pretrained(referring / "pegs", language_model_path=referring / "backbone")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    model.save_pretrained(tmp_path, {}, is_main_process=False)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_device_map_and_quantisation_reach_the_language_model(referring, monkeypatch):
    load, seen = modeling_pegs.AutoModelForCausalLM.from_pretrained, {}

    def spy(*args, **kwargs):
        seen.update(kwargs)
        return load(*args, **{k: v for k, v in kwargs.items() if k != "quantization_config"})

    monkeypatch.setattr(modeling_pegs.AutoModelForCausalLM, "from_pretrained", spy)
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = PegsModel.from_pretrained(
        referring / "pegs",
        language_model_path=referring / "backbone",
        device_map="auto",
        attn_implementation="eager",
        quantization_config=config,
    )
    assert seen["device_map"] == "auto" and seen["quantization_config"] is config
    assert model.causal_lm.config._attn_implementation == "eager"
    assert model.causal_lm.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    assert model(input_ids=torch.tensor([[5, 6]])).logits.isfinite().all()
    with pytest.raises(ValueError, match="holds its own"):
        model.merge().save_pretrained(referring / "merged")
        PegsModel.from_pretrained(referring / "merged", quantization_config=config)


def test_what_transformers_takes_is_taken(referring, monkeypatch):
    model = PegsModel.from_pretrained(
        referring / "pegs",
        language_model_path=referring / "backbone",
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        attn_implementation="flex_attention",
    )
    assert model.causal_lm.config._attn_implementation == "flex_attention"
    model.merge().save_pretrained(referring / "merged")
    merged = PegsModel.from_pretrained(referring / "merged", attn_implementation="flex_attention")
    assert merged.causal_lm.config._attn_implementation == "flex_attention"
    seen = {}
    monkeypatch.setattr(backbones, "snapshot_download", lambda *_, **kwargs: seen.update(kwargs) or referring / "backbone")  # fmt: skip
    PegsModel.from_pretrained(referring / "pegs", token="hf_x", cache_dir=str(referring), local_files_only=True)
    assert (seen["token"], seen["cache_dir"], seen["local_files_only"]) == ("hf_x", str(referring), True)


class Placed(nn.Module):
    """A module as accelerate dispatches it: what comes is moved to where its weight lies."""

    def __init__(self, function, weight: torch.Tensor) -> None:
        super().__init__()
        self.function, self.weight = function, weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x.to(self.weight.device), self.weight)


def test_added_rows_may_lie_on_another_device_than_the_language_model():
    """Accelerate places both by themselves and moves only what goes into a module's `forward`."""
    with torch.no_grad(), FakeTensorMode():
        rows = AddedVocabulary(3, 8, first_id=10)
        rows.embedding = Placed(nn.functional.embedding, torch.zeros(3, 8, device="cuda:1"))
        rows.head = Placed(nn.functional.linear, torch.zeros(3, 8, device="cuda:1"))
        base = Placed(nn.functional.embedding, torch.zeros(10, 8))
        embedded = rows.embed(torch.zeros(1, 2, dtype=torch.long), base)
        logits = rows.extend(embedded, torch.zeros(1, 2, 10))
    assert embedded.device == logits.device == torch.device("cpu") and logits.shape == (1, 2, 13)


def test_frozen_perception_is_referred_to_and_not_copied(tmp_path, monkeypatch):
    whole = tiny.make_tiny_model()
    whole.save_pretrained(tmp_path / "source")
    model = tiny.make_tiny_model(vision_source={"hub_id": "nobody/nothing", "parts": ["vision_model", "query_tokens"]})
    model.save_pretrained(tmp_path / "pegs")
    held = {name.partition(".")[0] for name in load_file(tmp_path / "pegs" / "model.safetensors")}
    assert {"qformer", "language_model"} <= held and not held & {"vision_model", "query_tokens"}
    with pytest.raises(
        FileNotFoundError, match=r"vision model nobody/nothing was not found; pass `vision_model_path=`"
    ):
        PegsModel.from_pretrained(tmp_path / "pegs")
    monkeypatch.setenv("PEGS_VISION_MODEL", str(tmp_path / "source"))
    again = PegsModel.from_pretrained(tmp_path / "pegs")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"pegs/adapter has no safetensors files"):
        PegsModel.from_pretrained(tmp_path / "pegs", vision_model_path=tmp_path / "pegs" / "adapter")


def test_quantising_needs_what_transformers_needs(referring):
    if is_bitsandbytes_available():
        pytest.skip("bitsandbytes is there")
    with pytest.raises(ImportError, match="bitsandbytes"):
        PegsModel.from_pretrained(
            referring / "pegs",
            language_model_path=referring / "backbone",
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        )


def rewrite(file, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("retrieval_head.text_projection.weight", "model.safetensors"),
        ("base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight", "adapter/adapter_model.safetensors"),
    ],
)
@pytest.mark.parametrize("missing", [False, True])
def test_a_tensor_that_does_not_fit_is_named(referring, name, file, missing):
    path = referring / "pegs" / file
    rewrite(path, lambda t: t.pop(name) if missing else t.update({name: torch.zeros(3, 5)}))
    with pytest.raises(ValueError) as caught:
        PegsModel.from_pretrained(referring / "pegs", language_model_path=referring / "backbone")
    (line,) = str(caught.value).splitlines()
    assert name in line and ("is missing" if missing else "has the shape (3, 5)") in line


@pytest.mark.parametrize("place", ["pegs", "pegs/adapter", "backbone"])
def test_pickles_are_not_opened(referring, place):
    (weights,) = (referring / place).glob("*.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError) as caught:
        PegsModel.from_pretrained(referring / "pegs", language_model_path=referring / "backbone")
    (line,) = str(caught.value).splitlines()
    assert f"{weights.stem}.bin" in line and "pickle" in line


@pytest.mark.parametrize("tied", [False, True])
def test_the_base_vocabulary_stays_as_it_is(processor, tied):
    from pegs.training.language import freeze_except

    text_config = {**tiny.make_tiny_config().text_config.to_dict(), "tie_word_embeddings": tied}
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    model = tiny.make_tiny_model(text_config=text_config, lora=lora)
    freeze_except(model, ["lora", "added_vocabulary", "language_projection", "retrieval_head", "feature_mapper"])
    rows = {"in": model.get_input_embeddings().weight, "out": model.causal_lm.get_output_embeddings().weight}
    before = {side: weight.clone() for side, weight in rows.items()}
    added = model.added_vocabulary.embedding.weight.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    batch = batch_for(model, processor)
    batch = {key: value for key, value in batch.items() if key != "pixel_values"} | {
        "vision_states": model.encode_images(batch["pixel_values"]).last_hidden_state.detach()
    }
    for _ in range(100):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for side, weight in rows.items():
        assert torch.equal(weight, before[side]), side
    assert not torch.equal(model.added_vocabulary.embedding.weight, added)
    assert (rows["in"] is rows["out"]) == tied


def test_the_forward_pass_compiles_in_one_graph(processor):
    model = tiny.make_tiny_model()
    batch = batch_for(model, processor)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
