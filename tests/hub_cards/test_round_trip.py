"""Every artefact goes up to a Hub on loopback and comes back equal, through unmodified clients, in processes without this package."""

import hashlib
import inspect
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL.Image
import pytest
import torch
from datasets import Image, disable_progress_bars, load_dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from dataset_builders.stickerconv.build import build_dataset
from dataset_builders.stickerconv.sessions import MINI
from dataset_builders.stickers import openmoji
from dataset_builders.stickers.pack import StickerPack
from hub_cards.space import write_space
from tests.fixtures import tiny
from tests.fixtures.hub import Hub
from tests.hub_cards.test_push import ALONE, run


PEGS = Path(sys.executable).with_name("pegs")
LLAMA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
PUSH = """
import json, sys
from pathlib import Path
from hub_cards.push import push_folder
for folder, repo_id, tag in json.loads(sys.argv[1]):
    print(push_folder(Path(folder), repo_id, tag=tag))
"""
disable_progress_bars()


def digest(tensors):
    """Of names, types and bits."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def digest_rows(rows):
    return hashlib.sha256(repr(list(rows)).encode()).hexdigest()


def encode(processor):
    """What the processor makes of a message with a sticker."""
    sticker = PIL.Image.linear_gradient("L").resize((40, 30)).convert("RGBA")
    content = [{"type": "text", "text": "My dog died."}, {"type": "image", "image": sticker}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


DIGEST = "import hashlib\nimport PIL.Image\n" + "".join(map(inspect.getsource, (digest, digest_rows, encode)))


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    openmoji.build_pack(size=32).save(folder)
    return folder


def push(hub, home, *artefacts):
    done = run(hub, home, PUSH, json.dumps([(str(folder), repo, tag) for folder, repo, tag in artefacts]))
    return done.stdout.split()


def pegs(hub, home, *args):
    """The command `pegs` with that Hub: exit status, stdout, stderr's lines, seconds."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | hub.environment(home)
    started = time.monotonic()
    done = subprocess.run([PEGS, *map(str, args)], capture_output=True, text=True, env=env, timeout=300)
    return done.returncode, done.stdout, done.stderr.strip().splitlines(), time.monotonic() - started


DOWN_DATASET = """
import json, sys
from datasets import Image, load_dataset
found = {}
for revision in (None, "v1"):
    for config in ("sessions", "turns", "stickers"):
        for split, rows in load_dataset("tester/stickerconv", config, revision=revision).items():
            assert config != "stickers" or rows[0]["image"].size == (32, 32)
            rows = rows.cast_column("image", Image(decode=False)) if config == "stickers" else rows
            found[f"{revision} {config} {split}"] = digest_rows(rows)
stream = load_dataset("tester/stickerconv", "turns", split="test", streaming=True, revision="v1")
found["streamed"] = digest_rows(stream)
print(json.dumps(found))
"""


def test_a_dataset_comes_back_equal_at_each_revision(hub, pack, tmp_path):
    folder, lines = tmp_path / "stickerconv", MINI.read_bytes().split(b"\n")
    expected = {}
    for revision, kept in (("v1", lines), (None, [line for line in lines if b'"validation"' not in line])):
        (tmp_path / "sessions.jsonl").write_bytes(b"\n".join(kept))
        build_dataset([tmp_path / "sessions.jsonl"], folder, stickers=str(pack))
        push(hub, tmp_path / "up", (folder, "tester/stickerconv", revision or ""))
        for config in ("sessions", "turns", "stickers"):
            for split, rows in load_dataset(
                str(folder), config, cache_dir=str(tmp_path / f"cache-{revision}")
            ).items():
                rows = rows.cast_column("image", Image(decode=False)) if config == "stickers" else rows
                expected[f"{revision} {config} {split}"] = digest_rows(rows)
    expected["streamed"] = expected["v1 turns test"]
    found = run(hub, tmp_path / "down", ALONE + DIGEST + DOWN_DATASET, cwd=tmp_path).stdout
    assert json.loads(found) == expected
    assert "v1 sessions validation" in expected and "None sessions validation" not in expected
    files = hub.files("datasets", "tester/stickerconv")
    card = files["README.md"].decode()
    assert "license: cc-by-sa-4.0" in card and 'load_dataset("tester/stickerconv", "turns"' in card
    assert {"assets/sticker_emotions.png", "assets/emotion_words.svg", "statistics.json", "dataset.yaml"} <= set(files)
    assert not any(name.endswith(".py") or "validation" in name for name in files)


DOWN_CHECKPOINTS = """
import json, torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from pathlib import Path
from transformers import AutoModel, AutoProcessor, LlamaConfig, LlamaForCausalLM
found = {"model": digest(AutoModel.from_pretrained("tester/pegs", trust_remote_code=True, revision=sys.argv[1]).state_dict())}
found["newest"] = digest(AutoModel.from_pretrained("tester/pegs", trust_remote_code=True).state_dict())
for repo in ("tester/pegs", "tester/processor"):
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    found[repo] = digest(encode(processor))
decoder = DiffusionPipeline.from_pretrained("tester/decoder", trust_remote_code=True)
found["decoder"] = digest({f"{part}.{k}": v for part in ("unet", "vae") for k, v in getattr(decoder, part).state_dict().items()})
base = LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[2])))
found["schedule"] = dict(decoder.scheduler.config)["prediction_type"], dict(decoder.scheduler.config)["num_train_timesteps"]
found["adapter"] = digest(get_peft_model_state_dict(PeftModel.from_pretrained(base, "tester/adapter")))
space = Path(snapshot_download("tester/space", repo_type="space"))
found["space"] = {file.name: file.read_text() for file in space.iterdir() if file.suffix in (".py", ".md", ".txt")}
print(json.dumps(found))
"""


def test_checkpoints_and_a_space_come_back_equal(hub, tmp_path, model, processor, decoder):
    folders = {name: tmp_path / name for name in ("pegs", "processor", "decoder", "adapter", "space")}
    model.save_pretrained(folders["pegs"])
    processor.save_pretrained(folders["pegs"])
    (folders["pegs"] / "trainer").mkdir()
    (folders["pegs"] / "trainer" / "optimizer.pt").write_bytes(b"not for others")
    processor.save_pretrained(folders["processor"])
    decoder.save_pretrained(folders["decoder"])
    adapter = get_peft_model(LlamaForCausalLM(LlamaConfig(**LLAMA)), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))  # fmt: skip
    adapter.save_pretrained(folders["adapter"])
    write_space(folders["space"], "tester/pegs")
    urls = push(hub, tmp_path / "up", *((folder, f"tester/{name}", "") for name, folder in folders.items()))
    revision = urls[0].rpartition("/")[2]
    changed = tiny.make_tiny_model()
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(1)
    changed.save_pretrained(folders["pegs"])
    push(
        hub, tmp_path / "up", (folders["pegs"], "tester/pegs", "")
    )  # a later commit, which the pinned load must not see
    (tmp_path / "alone").mkdir()
    done = run(
        hub, tmp_path / "down", ALONE + DIGEST + DOWN_CHECKPOINTS, revision, json.dumps(LLAMA), cwd=tmp_path / "alone"
    )
    chosen = "import sys\nfrom pegs.assemble import resolve_checkpoint\nprint(resolve_checkpoint('tester/pegs', sys.argv[1]).name)"
    assert run(hub, tmp_path / "chosen", chosen, revision).stdout.strip() == revision
    (tmp_path / "messages.json").write_text('[{"role": "user", "content": "hello"}]')
    code, _, lines, _ = pegs(hub, tmp_path / "chosen", "respond", tmp_path / "messages.json", "--out", tmp_path / "out", "--model", "tester/pegs", "--revision", "v9")  # fmt: skip
    assert code == 2 and "--revision v9: tester/pegs has no such branch, tag or commit." in " ".join(lines)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["model"] == digest(model.state_dict()) and found["newest"] == digest(changed.state_dict())
    assert found["tester/pegs"] == found["tester/processor"] == digest(encode(processor))
    schedule = decoder.scheduler.config
    assert found["schedule"] == [schedule.prediction_type, schedule.num_train_timesteps]
    assert found["decoder"] == digest({f"{part}.{k}": v for part in ("unet", "vae") for k, v in getattr(decoder, part).state_dict().items()})  # fmt: skip
    assert found["adapter"] == digest(load_file(folders["adapter"] / "adapter_model.safetensors"))
    assert found["space"] == {file.name: file.read_text() for file in folders["space"].iterdir()}
    assert not any("trainer" in name for name in hub.files("models", "tester/pegs"))
    cards = {
        name: hub.files("models", f"tester/{name}")["README.md"].decode() for name in ("pegs", "decoder", "adapter")
    }
    assert "library_name: transformers" in cards["pegs"] and "| num_query_tokens | 4 |" in cards["pegs"]
    assert "library_name: diffusers" in cards["decoder"] and "More Information Needed" not in cards["adapter"]
    compile(found["space"]["app.py"], "app.py", "exec")


def test_a_push_that_was_cut_is_finished_by_running_it_again(pack, tmp_path):
    def cut_and_finish(status: int) -> None:
        with Hub() as hub:
            hub.pass_uploads, hub.fail_uploads, hub.fail_with = 1, 1000, status
            code, _, lines, _ = pegs(hub, tmp_path / f"one-{status}", "push", pack, "tester/cut")
            assert code == 1 and lines[-1].endswith("run the same command again to go on."), lines
            (kept,) = hub.objects
            hub.fail_uploads, hub.fail_commits = 0, int(status == 503)
            if hub.fail_commits:
                code, _, lines, _ = pegs(hub, tmp_path / "commit", "push", pack, "tester/cut")
                assert (
                    code == 1
                    and len(lines) == 1
                    and "503" in lines[0]
                    and len(hub.repos["datasets", "tester/cut"]) == 1
                )
            assert pegs(hub, tmp_path / f"two-{status}", "push", pack, "tester/cut")[0] == 0
            files = hub.files("datasets", "tester/cut")
            assert files["stickers.parquet"] == (pack / "stickers.parquet").read_bytes()
            assert sum(kept in line for line in hub.log) == 1, "what was there was sent again"

    with ThreadPoolExecutor() as pool:
        list(pool.map(cut_and_finish, (0, 503, 429)))


def test_a_403_fails_at_once_with_one_line(pack, tmp_path):
    with Hub() as hub:
        hub.read_only = True
        for asked in (2, 3):  # there is no such repository; there is one, of others
            hub.log.clear()
            code, out, lines, _ = pegs(hub, tmp_path, "push", pack, "tester/closed", "--json")
            assert (code, out, len(lines)) == (2, "", 1) and "403" in lines[0], lines
            assert sum(line.startswith(("POST", "PUT")) for line in hub.log) <= asked, hub.log
            hub.repos["datasets", "tester/closed"] = []
            hub.commit(("datasets", "tester/closed"), {}, "of others")


def test_closed_licences_are_not_published(hub, pack, tmp_path):
    closed = StickerPack.load(pack)
    closed.info = closed.info.model_copy(update={"licence": "all rights reserved"})
    closed.save(tmp_path / "closed")
    build_dataset(["mini"], tmp_path / "dataset", stickers=str(tmp_path / "closed"), licence="CC0-1.0")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: other\nlicense_name: research-only\n---\nMine.")
    for what, said in (("dataset", "the licence of the stickers is 'all rights reserved'"), ("model", "the licence of the model is 'research-only'")):  # fmt: skip
        code, _, lines, _ = pegs(hub, tmp_path / "up", "push", tmp_path / what, f"tester/{what}-closed")
        assert code == 2 and len(lines) == 1 and said in lines[0] and "--i-have-rights" in lines[0]
    assert not any("closed" in repo for _, repo in hub.repos)
    assert pegs(hub, tmp_path / "up", "push", tmp_path / "model", "tester/model-open", "--i-have-rights")[0] == 0
    assert hub.files("models", "tester/model-open")["README.md"].endswith(b"Mine.")
