import copy

import pytest
import torch

from modeling_pegs import PegsConfig, PegsModel
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
