import ast
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from PIL import Image

from pipelines import pipeline_sticker
from pipelines.emotions import EmotionStates
from pipelines.pipeline_sticker import CODE, SCHEDULERS, StickerPipeline
from tests.fixtures import tiny


def embeds(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 5, 24, generator=torch.Generator().manual_seed(3))


def draw(pipeline, count=1, seed=0, **kwargs):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    return pipeline(prompt_embeds=embeds(count), generator=generators, num_inference_steps=3, **kwargs)


def test_same_seed_same_picture(decoder):
    one, two, other = draw(decoder), draw(decoder), draw(decoder, seed=1)
    assert one.images[0].tobytes() == two.images[0].tobytes() != other.images[0].tobytes()
    assert one.images[0].mode == "RGBA" and one.images[0].size == (32, 32)
    assert one.blocked == [None]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", ["ddim", "lcm"])
def test_a_batch_equals_its_singles_to_the_byte(scheduler, guidance_scale):
    pipeline = tiny.make_tiny_decoder()
    pipeline.set_scheduler(scheduler)
    together = draw(pipeline, count=3, guidance_scale=guidance_scale, init_image=tiny.picture()).images
    for i, image in enumerate(together):
        alone = pipeline(
            prompt_embeds=embeds(3)[i : i + 1],
            generator=torch.Generator().manual_seed(i),
            num_inference_steps=3,
            guidance_scale=guidance_scale,
            init_image=tiny.picture(),
        )
        assert image.tobytes() == alone.images[0].tobytes()


def test_several_drawings_of_a_prompt_lie_side_by_side(decoder):
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    pictures = [tiny.picture("red"), tiny.picture("blue")]
    kwargs = {
        "num_inference_steps": 2,
        "negative_prompt_embeds": torch.ones(2, 5, 24) * torch.tensor([[[1.0]], [[-1.0]]]),
    }
    four = decoder(prompt_embeds=embeds(2), init_image=pictures, num_images_per_prompt=2, generator=seeds, **kwargs)
    for i in range(4):
        kwargs["negative_prompt_embeds"] = torch.full((1, 5, 24), 1.0 - 2 * (i // 2))
        one = decoder(
            prompt_embeds=embeds(2)[i // 2 : i // 2 + 1],
            init_image=pictures[i // 2],
            generator=torch.Generator().manual_seed(i),
            **kwargs,
        )
        assert four.images[i].tobytes() == one.images[0].tobytes()


def test_a_distilled_decoder_draws_by_its_saved_defaults(tmp_path):
    """Four passes of the denoiser without guidance, in a process that knows of neither."""
    made = tiny.make_tiny_decoder(default_num_inference_steps=4, default_guidance_scale=1.0, default_num_candidates=3)
    made.set_scheduler("lcm")
    made.save_pretrained(tmp_path)
    pipeline = StickerPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, LCMScheduler) and pipeline.config.default_num_candidates == 3
    passes = []
    pipeline.unet.register_forward_pre_hook(lambda _, args: passes.append((len(args[0]), int(args[1]))))
    drawn = pipeline(prompt_embeds=embeds(), generator=torch.Generator().manual_seed(0)).images[0]
    assert passes == [(1, 999), (1, 759), (1, 499), (1, 259)]
    again = pipeline(prompt_embeds=embeds(), generator=torch.Generator().manual_seed(0)).images[0]
    assert drawn.tobytes() == again.tobytes()  # LCM adds noise between its steps: from the same generator


@pytest.mark.parametrize(
    ("strength", "timesteps"), [(0.5, [499, 379, 259, 139]), (1.0, [999, 759, 499, 259]), (0.04, [39, 19])]
)
def test_lcm_spreads_its_few_steps_over_the_strength(strength, timesteps):
    pipeline = tiny.make_tiny_decoder()
    pipeline.set_scheduler("lcm")
    assert pipeline.prepare_timesteps(4, strength, pipeline.device).tolist() == timesteps


def test_other_schedulers_draw_the_last_part_of_their_steps(decoder):
    whole = decoder.prepare_timesteps(10, 1.0, decoder.device).tolist()
    assert decoder.prepare_timesteps(10, 0.3, decoder.device).tolist() == whole[-3:]
    assert decoder.prepare_timesteps(10, 0.01, decoder.device).tolist() == whole[-1:]


def test_callbacks_see_every_step_and_may_change_it(decoder):
    seen = []

    def watch(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        return {"latents": tensors["latents"] * 0.5}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    changed = draw(decoder, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names)
    assert changed.images[0].tobytes() != draw(decoder).images[0].tobytes()
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert seen[0][2] == {"latents": (1, 4, 16, 16), "prompt_embeds": (1, 5, 24), "negative_prompt_embeds": (1, 5, 24)}
    unchanged = draw(decoder, callback_on_step_end=lambda *_: {})
    assert unchanged.images[0].tobytes() == draw(decoder).images[0].tobytes()


def test_callbacks_of_diffusers_turn_guidance_off_and_interrupt(decoder):
    seen = []

    def watch(pipeline, step, *_):
        seen.append((step, pipeline.guidance_scale, pipeline.num_timesteps))
        pipeline._interrupt = step == 1
        return {}

    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    draw(decoder, guidance_scale=2.0, callback_on_step_end=MultiPipelineCallbacks([cutoff]))
    assert decoder.guidance_scale == 0.0
    draw(decoder, guidance_scale=2.0, callback_on_step_end=watch)
    assert seen == [(0, 2.0, 3), (1, 2.0, 3)]


def test_tensors_are_between_0_and_1(decoder):
    pixels = draw(decoder, output_type="pt").images
    assert pixels.shape == (1, 4, 32, 32) and 0 <= pixels.min() < pixels.max() <= 1


def test_latents_serve_as_init_image(decoder):
    latents = decoder.encode_image([tiny.picture()])
    one, two = (draw(decoder, init_image=init).images[0].tobytes() for init in (latents, tiny.picture()))
    assert one == two


def test_rag_stays_near_the_init_image_at_low_strength(decoder):
    init = tiny.picture(size=32)
    target = decoder.preprocess(init)
    reconstruction = decoder.vae.decode(decoder.vae.encode(target).latent_dist.mode()).sample / 2 + 0.5

    def distance(strength: float) -> float:
        picture = draw(decoder, init_image=init, strength=strength, guidance_scale=1.0, output_type="pt").images
        return (picture - reconstruction).abs().mean().item()

    assert distance(0.3) < distance(1.0)


def test_guidance_away_from_a_text_needs_a_text_encoder(decoder):
    with pytest.raises(ValueError, match="pass `negative_prompt_embeds`, or `guidance_scale=1`"):
        draw(decoder, negative_prompt="ugly", guidance_scale=2.0)


def test_emotions_of_a_repository_are_those_of_the_same_commit(monkeypatch, tmp_path):
    decoder, asked = tiny.make_tiny_decoder(), []
    snapshot = tmp_path / "models--me--x" / "snapshots" / "c0ffee"
    decoder.register_to_config(_name_or_path="me/x")
    decoder.unet.register_to_config(_name_or_path=str(snapshot / "unet"))
    monkeypatch.setattr(EmotionStates, "from_pretrained", lambda *args, **kwargs: asked.append((args, kwargs)))
    decoder.save_pretrained(tmp_path / "again")
    place = {"subfolder": "emotions", "revision": "c0ffee", "cache_dir": tmp_path}
    assert asked == [(("me/x",), place)]


def test_saving_with_a_push_pushes_what_is_complete(monkeypatch, tmp_path):
    pushed = []

    def upload(folder_path, **kwargs):
        pushed.append((kwargs, (folder_path / "pipeline_sticker.py").is_file()))

    def create(repo_id, private, **_):
        return SimpleNamespace(repo_id=f"me/{repo_id}" if private else "")

    monkeypatch.setattr(pipeline_sticker, "create_repo", create)
    monkeypatch.setattr(pipeline_sticker, "upload_folder", upload)
    tiny.make_tiny_decoder().save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    assert pushed == [({"repo_id": "me/mine", "token": None}, True)]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_by_name(name):
    """With a denoiser that knows the clean latents, each of them must find these, from nothing and from a picture."""
    pipeline = tiny.make_tiny_decoder()
    pipeline.scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
    )
    pipeline.set_scheduler(name)
    assert pipeline.scheduler.config.prediction_type == "sample"
    assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    clean = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pipeline.unet.register_forward_hook(lambda *_: UNet2DConditionOutput(sample=clean))
    for init in (None, tiny.picture(size=32)):
        latents = draw(pipeline, init_image=init, guidance_scale=1.0, output_type="latent").images
        assert (latents - clean).abs().max() < 0.05


def test_unknown_schedulers_are_refused(decoder):
    with pytest.raises(ValueError, match="must be one of ddim, dpm\\+\\+, euler, lcm, got 'x'"):
        decoder.set_scheduler("x")


def test_size_and_outline(decoder):
    drawn = draw(decoder, size=64, outline=0.1).images[0]
    assert drawn.size == (64, 64) and drawn.mode == "RGBA"
    assert drawn.tobytes() != draw(decoder, size=64).images[0].tobytes()


def test_guidance_and_negative_prompt_change_the_picture(decoder):
    plain = draw(decoder, guidance_scale=1.0).images[0].tobytes()
    guided = draw(decoder, guidance_scale=6.0).images[0].tobytes()
    away = draw(decoder, guidance_scale=6.0, negative_prompt_embeds=torch.ones(1, 5, 24)).images[0].tobytes()
    assert len({plain, guided, away}) == 3


def test_rgb_autoencoders_give_rgb_pictures():
    assert draw(tiny.make_tiny_decoder(channels=3), init_image=tiny.picture()).images[0].mode == "RGB"


def test_transparency_survives_the_way_in_and_out(decoder):
    picture = tiny.picture(size=32)
    again = decoder.postprocess(decoder.preprocess(picture))[0]
    difference = np.abs(np.asarray(again, dtype=int) - np.asarray(picture, dtype=int))
    assert difference[np.asarray(picture)[..., 3] == 255].max() <= 2
    assert (np.asarray(again)[..., 3][np.asarray(picture)[..., 3] == 0] == 0).all()


@pytest.mark.parametrize(("kwargs", "message"), [
    ({}, "exactly one of"),
    ({"prompt": "a cat", "prompt_embeds": torch.zeros(1, 5, 24)}, "exactly one of"),
    ({"prompt_embeds": torch.zeros(1, 77, 768)}, r"must be of shape \(B, 5, 24\) for this decoder, got \(1, 77, 768\)"),
    ({"prompt_embeds": torch.zeros(1, 5, 24), "strength": 0.0}, r"`strength` must be in \(0, 1\], got 0.0"),
    ({"prompt": "a cat"}, "needs a text encoder"),
    ({"prompt_embeds": torch.zeros(1, 5, 24), "negative_prompt": "x", "guidance_scale": 2.0}, "needs a text encoder"),
    ({"prompt_embeds": torch.zeros(1, 5, 24), "negative_prompt": "x", "negative_prompt_embeds": torch.zeros(1, 5, 24)}, "only one of"),
    ({"prompt_embeds": torch.zeros(2, 5, 24), "generator": [torch.Generator()]}, "as many as there are stickers, 2, got 1"),
    ({"prompt_embeds": torch.zeros(3, 5, 24), "init_image": [tiny.picture()] * 2}, "as many as there are prompts, 3, got 2"),
    ({"prompt_embeds": torch.zeros(1, 5, 24), "callback_on_step_end_tensor_inputs": ["x"]}, r"must be among .*, got \['x'\]"),
    ({"prompt_embeds": torch.zeros(1, 5, 24), "output_type": "PIL"}, '`output_type` must be .*, got .PIL'),
    ({"prompt_embeds": torch.zeros(1, 5, 24), "emotion": "anger"}, "needs `emotion_states`"),
])  # fmt: skip
def test_bad_arguments_are_named(decoder, kwargs, message):
    with pytest.raises(ValueError, match=message):
        decoder(**kwargs)


def test_save_and_load(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_sticker", "StickerPipeline"]
    again = StickerPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert draw(decoder).images[0].tobytes() == draw(again).images[0].tobytes()


def test_a_saved_pipeline_carries_all_the_code_it_imports(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    needed, found = {"pipeline_sticker"}, set()
    while needed - found:
        name = (needed - found).pop()
        found.add(name)
        tree = ast.parse((tmp_path / f"{name}.py").read_text("utf-8"))
        needed |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert {f"{name}.py" for name in found} == {path.name for path in tmp_path.glob("*.py")} == set(CODE)


def test_a_checkpoint_saved_before_there_were_defaults_still_loads(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    index = {k: v for k, v in json.loads(file.read_text()).items() if not k.startswith("default_")}
    file.write_text(json.dumps(index))
    config = StickerPipeline.from_pretrained(tmp_path).config
    assert (config.default_num_inference_steps, config.default_guidance_scale, config.default_num_candidates) == (
        20,
        2.5,
        1,
    )


SCRIPT = """
import sys, torch
from diffusers import DiffusionPipeline
try:
    import pipelines
    raise SystemExit("pipelines can be imported here, so this proves nothing")
except ModuleNotFoundError:
    pass
stickers = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
stickers.set_progress_bar_config(disable=True)
embeds = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(3))
for size, file in ((None, sys.argv[2]), (96, sys.argv[3])):
    drawn = stickers(prompt_embeds=embeds, emotion="anger", emotion_scale=1.5, size=size, generator=torch.Generator().manual_seed(0))
    drawn.images[0].save(file)
"""


def test_a_process_without_this_package_draws_the_same_sticker(tmp_path):
    """By the saved defaults, with the emotion slider and the finishing that lie in the folder."""
    pipeline = tiny.make_tiny_decoder(default_num_inference_steps=4, default_guidance_scale=1.0)
    pipeline.set_scheduler("lcm")
    pipeline.emotion_states = EmotionStates(["anger", "neutral"], 24)
    torch.nn.init.normal_(pipeline.emotion_states.means, generator=torch.Generator().manual_seed(1))
    pipeline.save_pretrained(tmp_path / "repo")
    arguments = [str(tmp_path / name) for name in ("repo", "small.png", "large.png")]
    # -I ignores PYTHONPATH and the working directory; the finder of the editable install is taken off as well
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()];"
        f"sys.path = [p for p in sys.path if p != {os.getcwd()!r}]; sys.argv = ['x', *{arguments!r}];\n{SCRIPT}"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for size, file in ((None, "small.png"), (96, "large.png")):
        generator = torch.Generator().manual_seed(0)
        here = pipeline(prompt_embeds=embeds(), emotion="anger", emotion_scale=1.5, size=size, generator=generator)
        assert Image.open(tmp_path / file).tobytes() == here.images[0].tobytes()


def test_a_blocked_picture_says_why(decoder, monkeypatch):
    class Verdict:
        nsfw, is_nsfw = 0.93, True

    class Classifier:
        def classify(self, image):
            assert isinstance(image, Image.Image) and image.mode == "RGB"
            return Verdict()

    from pipelines import safety

    monkeypatch.setattr(safety, "_open_nsfw", Classifier)
    assert draw(decoder).blocked == ["nsfw (open_nsfw 0.93)"]
