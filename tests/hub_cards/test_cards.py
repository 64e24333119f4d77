"""Cards say what the folder holds, and what was measured."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset
from huggingface_hub import ModelCard

from dataset_builders.stickerconv.build import build_dataset
from dataset_builders.stickerconv.sessions import load_mini
from dataset_builders.stickers import openmoji
from dataset_builders.stickers.export import LicenceError
from hub_cards.cards import CardError
from hub_cards.checkpoints import CardOptions, KindError, checkpoint_card, kind_of, own_card
from hub_cards.dataset import describe_dataset
from hub_cards.licences import hub_licence, licence_fields, require_free
from hub_cards.push import licences_of, write_card
from hub_cards.space import write_space
from pegs.cli_hub import card, push
from pegs.errors import InputError


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "pegs", "num_query_tokens": 4, "language_model": {"hub_id": "ines/llama"}}))  # fmt: skip
    (tmp_path / "processor_config.json").write_text("{}")
    state = {"global_step": 168, "epoch": 4.0, "log_history": [{"loss": 3.0}, {"loss": 2.5}, {"eval_loss": 2.7}]}
    for name, change in (("checkpoint-1", {"global_step": 1}), ("checkpoint-168", {})):
        (tmp_path / "trainer" / name).mkdir(parents=True)
        (tmp_path / "trainer" / name / "trainer_state.json").write_text(json.dumps(state | change))
    (tmp_path / "figures.json").write_text(json.dumps({"model": "x", "perplexity": {"pegs": 29.1, "bare": 51.2}}))
    (tmp_path / "emissions.csv").write_text("timestamp,emissions\na,0.0125\nb,0.0005\n")
    (tmp_path / "joint.yaml").write_text("stage: joint\n")
    return tmp_path


def test_a_checkpoints_card_has_the_runs_own_numbers(checkpoint):
    options = CardOptions(licence="mit", config=checkpoint / "joint.yaml", data=("ines/stickerconv",))
    text = checkpoint_card(checkpoint, "ines/pegs", options)
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.base_model, data.datasets) == ("mit", "transformers", "ines/llama", ["ines/stickerconv"])  # fmt: skip
    assert data.co2_eq_emissions == {"emissions": 13.0, "source": "codecarbon"}
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {"perplexity.pegs": 29.1, "perplexity.bare": 51.2}  # fmt: skip
    for line in ("| steps | 168 |", "| loss | 2.5 |", "| eval_loss | 2.7 |", "stage: joint", "| num_query_tokens | 4 |", "| perplexity.bare | 51.2 |", "13.0 g CO2"):  # fmt: skip
        assert line in text, line
    assert 'AutoProcessor.from_pretrained("ines/pegs"' in text and "DiffusionPipeline" not in text
    assert "manipulate" in text and "NSFW" in text


def test_an_adapters_card_names_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "ines/llama"}))
    text = checkpoint_card(tmp_path, "ines/adapter", CardOptions())
    assert ModelCard(text).data.base_model == "ines/llama"
    assert 'AutoPeftModelForCausalLM.from_pretrained("ines/adapter")' in text


def test_a_tokenizers_card_loads_a_tokenizer(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    text = checkpoint_card(tmp_path, "ines/words", CardOptions())
    assert 'AutoTokenizer.from_pretrained("ines/words")' in text and "AutoProcessor" not in text


def test_a_bare_checkpoints_card_leaves_out_what_nobody_measured(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    text = checkpoint_card(tmp_path, "ines/decoder", CardOptions())
    assert not [title for title in ("## Training", "## Figures", "## Configuration", "Carbon") if title in text]
    assert "DiffusionPipeline.from_pretrained" in text and "AutoModel" not in text
    (tmp_path / "figures.json").write_text("{")
    with pytest.raises(ValueError, match="figures.json: not JSON"):
        checkpoint_card(tmp_path, "ines/decoder", CardOptions())


def test_a_card_that_somebody_wrote_is_kept_and_boilerplate_is_not(checkpoint):
    readme = checkpoint / "README.md"
    readme.write_text("---\nlicense: other\nlicense_name: mine\n---\nWritten by hand.")
    assert own_card(checkpoint).content.endswith("Written by hand.")
    assert licences_of(checkpoint, CardOptions()) == {"the model": "mine"}
    readme.write_text("---\nlicense: mit\n---\n[More Information Needed]")
    assert own_card(checkpoint) is None and licences_of(checkpoint, CardOptions()) == {"the model": "apache-2.0"}
    write_card(checkpoint, "", CardOptions())
    assert readme.read_text().count(f"# {checkpoint.name}\n") == 1


def test_only_a_card_as_it_was_made_is_made_again(checkpoint, tmp_path):
    readme = checkpoint / "README.md"
    for name in ("first", "second"):
        write_card(checkpoint, f"ines/{name}", CardOptions())
        assert f'"ines/{name}"' in readme.read_text()
    readme.write_text(readme.read_text().replace("Made with", "Made by Ines with"))
    with pytest.raises(CardError, match="README.md: somebody wrote this card"):
        write_card(checkpoint, "ines/third", CardOptions())
    write_space(tmp_path / "space", "ines/pegs")
    write_space(tmp_path / "space", "ines/other")
    (tmp_path / "space" / "README.md").write_text("Mine.")
    with pytest.raises(CardError, match="README.md: somebody wrote this card"):
        write_space(tmp_path / "space", "ines/pegs")
    assert '"ines/other"' in (tmp_path / "space" / "app.py").read_text()


def test_a_datasets_card_that_somebody_changed_is_kept(tmp_path):
    rows = "\n".join(json.dumps(session.model_dump()) for session in load_mini()[:2])
    (tmp_path / "sessions.jsonl").write_text(rows)
    pack = openmoji.build_pack(size=8)
    pack.save(tmp_path / "pack")
    folder, readme = tmp_path / "built", tmp_path / "built" / "README.md"
    build_dataset([tmp_path], folder, stickers=str(tmp_path / "pack"))
    describe_dataset(folder)
    write_card(folder, "ines/sc", CardOptions())
    assert 'load_dataset("ines/sc", "turns"' in readme.read_text()
    assert "Splits go by sticker database" in readme.read_text()
    readme.write_text(readme.read_text().replace("# built", "# What Ines built"))
    before = readme.read_text()
    describe_dataset(folder)
    assert readme.read_text() == before
    (tmp_path / "sessions.jsonl").write_text(rows.split("\n")[0])
    build_dataset([tmp_path], folder, stickers=str(tmp_path / "pack"))
    assert "# What Ines built" in readme.read_text()
    assert load_dataset(str(folder), "sessions", cache_dir=str(tmp_path / "cache"))["train"].num_rows == 1


def test_the_splits_of_a_released_set_are_its_files(tmp_path):
    (tmp_path / "train.json").write_text(
        json.dumps({"conversation": [{"user_message": "hi", "system_message": "ho"}]})
    )
    build_dataset([tmp_path / "train.json"], tmp_path / "built")
    describe_dataset(tmp_path / "built")
    text = (tmp_path / "built" / "README.md").read_text()
    assert "Splits are those of the released files.\nNo sticker of the test split is in another one" in text


def test_kinds(tmp_path):
    with pytest.raises(KindError, match="expected one of dataset.yaml, pack.yaml"):
        kind_of(tmp_path)
    write_space(tmp_path / "space", "ines/pegs", "ines/cats", "rag")
    assert kind_of(tmp_path / "space") == "space"
    assert '"ines/pegs", "ines/cats"), "rag"' in (tmp_path / "space" / "app.py").read_text()
    front = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---")[1])
    assert (front["sdk"], front["app_file"], front["models"]) == ("gradio", "app.py", ["ines/pegs"])
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    assert f'python_requires=">={front["python_version"]}"' in setup
    assert f'"gradio>={front["sdk_version"].rpartition(".")[0]},' in setup
    with pytest.raises(KindError, match="`pegs card --space`"):
        write_card(tmp_path / "space", "", CardOptions())


def test_licences():
    assert hub_licence("CC BY-SA 4.0") == "cc-by-sa-4.0" and hub_licence("mine") == "other"
    assert licence_fields({"a": "MIT", "b": "MIT"}) == {"license": "mit"}
    assert licence_fields({"a": "MIT", "b": "CC0-1.0"}) == {"license": "other", "license_name": "CC0-1.0; MIT"}
    require_free({"a": "MIT", "b": "CC-BY-SA-4.0", "c": "apache-2.0"}, have_rights=False)
    for closed in ("other", "unknown", "CC-BY-NC-ND-4.0", "research only, not to be distributed", ""):
        with pytest.raises(LicenceError, match="the licence of it is"):
            require_free({"it": closed}, have_rights=False)
        require_free({"it": closed}, have_rights=True)


@pytest.mark.parametrize("licence", ["bsd-3-clause", "Apache-1.1", "GPL-3.0-or-later"])
def test_a_push_with_any_free_licence_can_be_run_again(checkpoint, licence):
    options = CardOptions(licence=licence)
    for _ in range(2):
        licences = licences_of(checkpoint, options)
        require_free(licences, have_rights=False)
        write_card(checkpoint, "ines/pegs", options)
    assert licences == licences_of(checkpoint, CardOptions()) == {"the model": licence}
    data = own_card(checkpoint).data
    assert licence in (data.license, data.get("license_name"))


def test_our_own_card_is_made_anew_with_what_is_given_and_keeps_the_rest(checkpoint):
    (checkpoint / "figures.json").unlink()
    (checkpoint / "more.json").write_text('{"bleu": 0.5}')
    given = CardOptions("mit", checkpoint / "joint.yaml", checkpoint / "more.json", ("ines/sc",))
    write_card(checkpoint, "ines/pegs", given)
    first = (checkpoint / "README.md").read_text()
    write_card(checkpoint, "ines/pegs", CardOptions())
    assert (checkpoint / "README.md").read_text() == first
    write_card(checkpoint, "ines/other", CardOptions("cc0-1.0", data=("ines/new",)))
    text, data = (checkpoint / "README.md").read_text(), own_card(checkpoint).data
    assert (data.license, data.datasets, data.eval_results[0].metric_value) == ("cc0-1.0", ["ines/new"], 0.5)
    assert "stage: joint" in text and '"ines/other"' in text and "ines/pegs" not in text


def test_somebodys_card_without_a_licence_takes_the_one_that_is_given(checkpoint):
    (checkpoint / "README.md").write_text("Mine.")
    assert licences_of(checkpoint, CardOptions("mit")) == {"the model": "mit"}
    assert licences_of(checkpoint, CardOptions()) == {"the model": "not told"}
    (checkpoint / "README.md").write_text("---\nlicense: isc\n---\nMine.")
    assert licences_of(checkpoint, CardOptions("mit")) == {"the model": "isc"}


@pytest.mark.parametrize("name", ["app.py", "requirements.txt"])
def test_a_spaces_file_that_somebody_wrote_is_kept(tmp_path, name):
    write_space(tmp_path, "ines/pegs")
    write_space(tmp_path, "ines/other")
    mine = (tmp_path / name).read_text().replace("\n", "  # mine\n", 1)
    (tmp_path / name).write_text(mine)
    before = {file: file.read_text() for file in tmp_path.iterdir()}
    with pytest.raises(CardError, match=f"{name}: somebody wrote this file"):
        write_space(tmp_path, "ines/third")
    assert {file: file.read_text() for file in tmp_path.iterdir()} == before


def test_bad_input_of_card_and_push_is_one_line(checkpoint, tmp_path, monkeypatch):
    def told(call, *args, **kwargs):
        with pytest.raises(InputError) as raised:
            call(*args, **kwargs)
        return str(raised.value)

    bad = checkpoint / "bad.json"
    for text, said in (("[1, 2]", "expected an object."), ("[" * 9999, "not JSON (maximum recursion")):
        bad.write_text(text)
        assert told(card, checkpoint, metrics=bad).startswith(f"{bad}: {said}")
    (checkpoint / "config.json").write_text("[]")
    assert told(push, checkpoint, "ines/pegs") == f"{checkpoint / 'config.json'}: expected an object."
    assert told(card, bad, space="a/b") == f"{bad}: File exists; expected a folder to write."
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "pack.yaml").touch()
    assert told(push, tmp_path / "pack", "ines/pack").endswith(
        "pack is not a sticker pack: it has no stickers.parquet."
    )
    openmoji.build_pack(size=8).save(tmp_path / "openmoji")
    build_dataset(["mini"], tmp_path / "built", stickers=str(tmp_path / "openmoji"))
    monkeypatch.delitem(sys.modules, "dataset_builders.stickerconv.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert told(card, tmp_path / "built").startswith("matplotlib is not installed: pip install")
