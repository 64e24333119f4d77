"""Saved folders load by `trust_remote_code` in a process where this package cannot be imported."""

import json
import os
import subprocess
import sys

import torch

from tests.fixtures import tiny


SCRIPT = """
import json, sys, torch
for name in ("modeling_pegs", "pipelines", "pegs", "dataset_builders"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported here, so this proves nothing")
from PIL import Image
from diffusers import DiffusionPipeline
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
path = sys.argv[1]
model = AutoModel.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "text", "text": "My dog died."}, {"type": "image", "path": sys.argv[2]}]}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=5, do_sample=False, sticker_bias=float("inf"), forced_eos_token_id=1)
stickers = DiffusionPipeline.from_pretrained(path, trust_remote_code=True)
stickers.set_progress_bar_config(disable=True)
image = stickers(prompt_embeds=out.sticker_prompt_embeds, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
image.save(sys.argv[3])
assert type(AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)) is type(model)
chat = pipeline("image-text-to-text", model=path, trust_remote_code=True)
answer = chat(text=messages, max_new_tokens=5, return_full_text=False, generate_kwargs={"do_sample": False, "sticker_bias": float("inf")})
print(json.dumps({"answer": answer[0]["generated_text"], "module": type(model).__module__, "ids": out.sequences[0].tolist(), "queries": out.sticker_queries[0].tolist()}))
"""


def test_model_processor_and_pipeline_load_without_this_package(tmp_path, model, processor, decoder):
    folder = tmp_path / "repo"
    decoder.save_pretrained(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tiny.picture().save(tmp_path / "sad.png")
    (tmp_path / "load.py").write_text(SCRIPT)
    # -I ignores PYTHONPATH and the working directory; the finder of the editable install is taken off as well
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()];"
        f"sys.path = [p for p in sys.path if p != {os.getcwd()!r}];"
        f"sys.argv = ['load.py', *{[str(folder), str(tmp_path / 'sad.png'), str(tmp_path / 'out.png')]!r}];"
        f"exec(open({str(tmp_path / 'load.py')!r}).read())"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", code], cwd="/", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["module"].startswith("transformers_modules.")
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "My dog died."}, {"type": "image", "image": tiny.picture()}],
        }
    ]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_tensors="pt")
    here = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, sticker_bias=float("inf"), forced_eos_token_id=tiny.EOS
    )
    assert result["ids"] == here.sequences[0].tolist()
    plain = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, sticker_bias=float("inf"), return_dict_in_generate=False
    )
    said = processor.decode(plain[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert result["answer"] == said
    torch.testing.assert_close(torch.tensor(result["queries"]), here.sticker_queries[0], atol=1e-5, rtol=1e-5)
    from PIL import Image

    drawn = decoder(
        prompt_embeds=here.sticker_prompt_embeds, num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    )
    assert Image.open(tmp_path / "out.png").tobytes() == drawn.images[0].tobytes()
