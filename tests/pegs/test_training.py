import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch.utils.data import Dataset

from dataset_builders.stickerconv.sessions import load_mini
from dataset_builders.stickers.openmoji import cached_pack
from pegs.training import decoder
from pegs.training.art import Drawing, general_caption
from pegs.training.cache import digest, kept
from pegs.training.decoder import ConditionedLatents, DecoderUnetArguments, DecoderVaeArguments, reconstruction_loss
from pegs.training.loop import LoopArguments, cosine_with_warmup, train_loop
from pegs.training.stages import STAGES, ConfigError, build_arguments, load_config, main
from tests.fixtures import tiny
from tests.pegs.test_stage_configs import make_pack


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "mini").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_complete(path):
    if path.stem == "model":
        return
    values = load_config(str(path), [])
    assert values["stage"] == path.stem and values["stage"] in STAGES


@pytest.mark.parametrize(("text", "overrides", "message"), [
    ("[1, 2]", [], "needs `stage:`"),
    ("stage: dance", [], "needs `stage:`, one of decoder_vae"),
    ("stage: decoder_vae", ["--seed"], "pairs `--key value`"),
    ("stage: decoder_vae", ["seed", "1"], "pairs `--key value`"),
    ("stage: decoder_vae", ["--stage", "dance"], "needs `stage:`, one of decoder_vae"),
    ("stage: decoder_vae", ["--stage", "[align]"], "needs `stage:`"),
    ("stage: [decoder_vae", [], "no YAML: while parsing"),
    ("stage: decoder_vae", ["--seed", "[1"], "--seed is no YAML: while parsing"),
])  # fmt: skip
def test_bad_configurations_are_named(tmp_path, text, overrides, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(tmp_path / "c.yaml"), overrides)


@pytest.mark.parametrize(("changes", "message"), [
    ({"speed": 3}, "unknown key 'speed'"),
    ({"max_steps": "many"}, "max_steps must be int, got 'many'"),
    ({"learning_rate": "fast"}, "learning_rate must be float, got 'fast'"),
    ({"output_dir": None}, "output_dir must be str, got None"),
])  # fmt: skip
def test_bad_arguments_are_named(changes, message):
    values = {"output_dir": "x", "max_steps": 1, "batch_size": 1, "learning_rate": "1e-3", **changes}
    with pytest.raises(ConfigError, match=message):
        build_arguments(DecoderVaeArguments, values)
    with pytest.raises(ConfigError, match="missing key 'max_steps'"):
        build_arguments(DecoderVaeArguments, {"output_dir": "x"})


LANGUAGE = {
    "stage": "joint",
    "data": "sessions",
    "output_dir": "out",
    "init_from": "tiny",
    "trainable": ["qformer"],
    "stickers": "pack",
    "sessions": "none.jsonl",
}
SFT = {"stage": "baseline_text", "data": "text", "output_dir": "out", "trainer": {"max_length": 8}}
LOOP = {"output_dir": "out", "max_steps": 1, "batch_size": 1, "learning_rate": 1e-3}


@pytest.mark.parametrize(("values", "message"), [
    ({**LANGUAGE, "init_from": "nowhere/there/is"}, "init_from nowhere/there/is: "),
    ({**LANGUAGE, "init_from": "outputs/mini/vision"}, "init_from outputs/mini/vision: no such folder; it is what"),
    ({**LANGUAGE, "init_from": "no.yaml"}, "init_from no.yaml: .*No such file"),
    ({**LANGUAGE, "variant": "all"}, "variant, .*ret"),
    ({**LANGUAGE, "attn_implementation": "none_such"}, "attn_implementation .*none_such"),
    ({**LANGUAGE, "sessions": "mini"}, "sessions or stickers: sticker '.*' is not in the pack"),
    ({**LANGUAGE, "text_encoder": "nowhere/there/is"}, "text_encoder nowhere/there/is: "),
    ({**LANGUAGE, "trainable": ["tail"]}, "`trainable` 'tail' names no parameter"),
    ({**LANGUAGE, "trainable": []}, "`trainable` is empty"),
    ({**LANGUAGE, "data": "captions", "pairs": ["no.tar"], "trainer": {"max_steps": 1}}, "pairs: .*no.tar"),
    ({**LANGUAGE, "stickers": "nowhere/there/is"}, "nowhere/there/is"),
    ({**LANGUAGE, "sessions": "no.jsonl"}, "sessions no.jsonl: No such file"),
    ({**LANGUAGE, "sessions": "c.yaml"}, "c.yaml:1: not JSON"),
    ({**LANGUAGE, "data": "texts", "trainer": {"speed": 1}}, "trainer: .*'speed'"),
    ({**SFT, "init_from": "nowhere"}, "init_from: .*nowhere"),
    ({**SFT, "trainer": {}}, "`trainer` needs a `max_length`"),
    ({**SFT, "shares": {"Queries": 1.0}}, "`shares` are of FreeIntention, .*, got 'Queries'"),
    ({**LOOP, "stage": "vision", "model": "no.yaml"}, "model no.yaml .*: .*No such file"),
    ({**LOOP, "stage": "decoder_unet", "vae": "nowhere/there/is"}, "vae nowhere/there/is: "),
    ({**LOOP, "stage": "decoder_lcm", "teacher": "nowhere/there/is"}, "teacher nowhere/there/is: "),
    ({**LOOP, "stage": "align", "init_from": "nowhere/there/is"}, "init_from nowhere/there/is: "),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, values, message):
    monkeypatch.chdir(tmp_path)
    if values.get("init_from") == "tiny":
        model = tiny.make_tiny_model()
        model.save_pretrained("tiny")
        tiny.make_tiny_processor(model.config).save_pretrained("tiny")
        make_pack().save("pack")
    Path("none.jsonl").touch()
    Path("c.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", "c.yaml"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(told) == 1 and re.search(f"c.yaml: .*{message}", told[0]), told


def test_train_py_exits_2_with_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--config", str(tmp_path / "nowhere.yaml")],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.strip().endswith("nowhere.yaml: no such file")
        and "Traceback" not in done.stderr
    )


def test_the_schedule_warms_up_and_cools_down():
    factors = [cosine_with_warmup(step, 10, 100) for step in range(101)]
    assert factors[9] == factors[10] == 1.0 == max(factors) and factors[100] == pytest.approx(0)
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)


class Numbers(Dataset):
    def __init__(self, break_at=None):
        self.break_at = break_at

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        if index == self.break_at:
            raise KeyboardInterrupt
        return torch.tensor([float(index), 1.0])


def run(folder, break_at=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 1))
    args = LoopArguments(str(folder), max_steps=12, batch_size=4, learning_rate=1e-2, warmup_steps=2, save_minutes=0)

    def loss_fn(model, batch, generator):
        return (model(batch / 40).float() - torch.randn(1, generator=generator)).square().mean()

    return train_loop(args, model, Numbers(break_at), loss_fn)


def test_a_cut_run_goes_on_to_the_same_weights(tmp_path):
    undisturbed = run(tmp_path / "one").state_dict()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", break_at=4 * 7 + 1)
    assert 0 < int((tmp_path / "two" / "state" / "step").read_text().split()[0]) < 12
    resumed = run(tmp_path / "two").state_dict()
    for name, value in undisturbed.items():
        assert torch.equal(value, resumed[name]), name


def test_a_run_that_is_killed_while_it_saves_goes_on_from_what_it_saved_before(tmp_path, monkeypatch):
    undisturbed = run(tmp_path / "one").state_dict()
    save_state = Accelerator.save_state

    def cut(self, folder):
        save_state(self, folder)
        if folder.endswith("7"):
            next(Path(folder).glob("*.safetensors")).write_bytes(b"half")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Accelerator, "save_state", cut)
        run(tmp_path / "two")
    assert (tmp_path / "two" / "state" / "step").read_text().split()[0] == "6"
    resumed = run(tmp_path / "two").state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())
    assert {path.name for path in (tmp_path / "two" / "state").iterdir()} == {"step", "step-12"}


def test_loops_refuse_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="trains in one process"):
        build_arguments(DecoderVaeArguments, dict(LOOP))


def test_phases_of_the_autoencoder_have_its_options_and_go_on_with_their_own_run_alone(tmp_path, monkeypatch):
    drawing = Drawing("0", "0", np.full((16, 16, 4), 255, np.uint8), None)
    monkeypatch.setattr(decoder, "load_art", lambda pack, size: [drawing])
    phases, cut = [], True

    def spy(args, model, dataset, loss_fn):
        if cut and args.output_dir.endswith("whole"):
            raise KeyboardInterrupt
        phases.append((Path(args.output_dir).name, args))
        return train_loop(args, model, dataset, loss_fn)

    monkeypatch.setattr(decoder, "train_loop", spy)
    vae = {"in_channels": 4, "out_channels": 4, "block_out_channels": [8], "norm_num_groups": 4}
    values = {**LOOP, "output_dir": str(tmp_path), "max_steps": 2, "full_size_part": 0.5, "image_size": 16}
    args = DecoderVaeArguments(**values, crop_size=8, vae=vae, warmup_steps=3, weight_decay=0.5)
    for changes in ({}, {}, {"edge_weight": 0.0}):
        with pytest.raises(KeyboardInterrupt):
            decoder.train_vae(replace(args, **changes))
    cut = False
    decoder.train_vae(replace(args, edge_weight=0.0))
    assert [name for name, _ in phases] == ["crops", "crops", "whole"]  # the second time it was there
    assert all((phase.warmup_steps, phase.weight_decay) == (3, 0.5) for _, phase in phases)
    AutoencoderKL.from_pretrained(tmp_path / "vae")


def test_what_another_run_has_left_is_not_resumed(tmp_path, caplog):
    undisturbed = run(tmp_path / "one").state_dict()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", break_at=4 * 7 + 1)
    step = tmp_path / "two" / "state" / "step"
    step.write_text(step.read_text().split()[0] + " of-other-data")
    again = run(tmp_path / "two").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in undisturbed.items())


def test_what_was_kept_is_made_anew_for_another_key(tmp_path):
    made = []

    def compute():
        made.append(1)
        return {"a": torch.tensor([len(made)])}

    file = tmp_path / "state" / "a.safetensors"
    found = [int(kept(file, key, compute)["a"]) for key in ("x", "x", "y", "y")]
    assert found == [1, 1, 2, 2] and [path.name for path in file.parent.iterdir()] == ["a.safetensors"]


def test_a_digest_tells_values_apart():
    one = {"w": torch.zeros(2, dtype=torch.bfloat16), "n": [1, "a"]}
    assert digest(one) == digest({"w": torch.zeros(2, dtype=torch.bfloat16), "n": [1, "a"]})
    assert len({digest(one), digest({**one, "w": torch.ones(2)}), digest({**one, "n": [1, "b"]})}) == 3


def test_reconstruction_loss_is_pixels_plus_edges_plus_hues():
    target = torch.zeros(1, 4, 3, 3)
    output = target.clone()
    output[..., 1, 1] = 9.0
    edges = 2 * 9.0 * 2 / 6  # two of six differences along each of two axes
    torch.testing.assert_close(reconstruction_loss(output, target, 0.5, 2.0), torch.tensor(1.0 + 0.5 * edges))
    output[:, 1:3] = 0.0  # red and alpha are left: the hue is off by 6, -3, -3
    pixels, edges, hues = 0.5, 0.5 * 2 * 9.0 * 2 / 6, 54 / 27
    torch.testing.assert_close(
        reconstruction_loss(output, target, 0.5, 2.0), torch.tensor(pixels + 0.5 * edges + 2.0 * hues)
    )


def test_export_loads_as_float32_in_one_folder(tmp_path):
    from transformers import AutoModel

    from pegs.training.export import export
    from pipelines.pipeline_sticker import StickerPipeline

    model = tiny.make_tiny_model(lora={"r": 2, "target_modules": ["q_proj"]})
    model.save_pretrained(tmp_path / "language")
    tiny.make_tiny_processor(model.config).save_pretrained(tmp_path / "language")
    tiny.make_tiny_decoder().save_pretrained(tmp_path / "decoder")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("card")
    (tmp_path / "out" / "old.safetensors").write_text("stale")
    sessions = load_mini("validation")[:2]
    places = [str(tmp_path / name) for name in ("language", "decoder", "out")]
    with pytest.raises(ValueError, match="holds no earlier export"):
        export(*places, sessions, cached_pack())
    with pytest.raises(ValueError, match="is in it"):
        export(places[0], places[1], str(tmp_path), sessions, cached_pack())
    assert (tmp_path / "out" / "old.safetensors").exists()
    (tmp_path / "out" / "model_index.json").write_text("{}")
    export(str(tmp_path / "language"), str(tmp_path / "decoder"), str(tmp_path / "out"), sessions, cached_pack())
    again = AutoModel.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert isinstance(again.generation_config.sticker_rate, float)
    assert not (tmp_path / "out" / "old.safetensors").exists() and (tmp_path / "out" / "README.md").exists()
    assert StickerPipeline.from_pretrained(tmp_path / "out").unet.dtype == torch.float32


@pytest.mark.parametrize(
    ("caption", "general"),
    [
        ("weary face, sadness", "face, sadness"),
        ("cat with tears of joy, happiness", "cat face, happiness"),
        ("woman pouting, anger", "person, anger"),
        ("broken heart, sadness", "heart, sadness"),
        ("tiger face, anger", None),
        ("cactus, neutral", None),
        ("cactus", None),
    ],
)
def test_a_general_caption_names_the_kind_and_the_emotion(caption, general):
    assert general_caption(caption) == general


def test_the_denoiser_is_conditioned_by_shares():
    drawings = [Drawing(str(i), f"{i}", np.zeros(1), sticker_id) for i, sticker_id in enumerate(["a", "b", None])]
    args = DecoderUnetArguments(
        "", 1000, 1, 0.1, pack_part=0.7, drop_part=0.1, mapped_part=0.3, general_part=0.2
    )  # fmt: skip
    latents = torch.arange(3.0).view(1, 3, 1, 1, 1).repeat(2, 1, 1, 1, 1)
    states = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    mapped = [torch.full((1, 1, 1), 4.0), torch.zeros(0, 1, 1), torch.zeros(0, 1, 1)]
    dataset = ConditionedLatents(latents, states, {0: torch.full((1, 1), 5.0)}, mapped, drawings, args)
    rows = [dataset[i] for i in range(len(dataset))]
    drawn = Counter((int(row["latents"]), int(row["states"])) for row in rows)
    assert set(drawn) == {(0, 0), (0, 1), (0, 4), (0, 5), (1, 0), (1, 2), (2, 0), (2, 3)}
    first = sum(count for (drawing, _), count in drawn.items() if drawing == 0)
    assert first / len(rows) == pytest.approx(0.35, abs=0.05)
    assert drawn[0, 4] / first == pytest.approx(0.3, abs=0.07) and drawn[0, 5] / first == pytest.approx(0.2, abs=0.07)
