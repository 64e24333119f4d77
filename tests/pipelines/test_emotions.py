import pytest
import torch

from pipelines.emotions import EmotionStates
from pipelines.pipeline_sticker import StickerPipeline
from tests.fixtures import tiny


EMOTIONS = ["anger", "neutral", "sadness"]
LENGTH, DIM = 8, 24


def word(text: str) -> torch.Tensor:
    return 3 * torch.nn.functional.normalize(
        torch.randn(DIM, generator=torch.Generator().manual_seed(sum(map(ord, text)))), dim=0
    )


def encode(captions):
    """An encoder without context: start, words, comma, emotion, end, zeros."""
    states = torch.zeros(len(captions), LENGTH, DIM)
    for row, caption in enumerate(captions):
        thing, emotion = caption.split(", ")
        words = ["[", *thing.split(), ",", emotion, "]"]
        states[row, : len(words)] = torch.stack([word(w) for w in words])
    return states


@pytest.fixture
def states():
    return EmotionStates.measure(encode, ["cat", "old dog", "red car", "my best friend"], EMOTIONS)


def test_without_context_another_emotion_is_exactly_the_other_caption(states):
    captions = ["cat, anger", "my best friend, sadness"]
    for emotion in EMOTIONS:
        expected = encode([f"{caption.split(',')[0]}, {emotion}" for caption in captions])
        torch.testing.assert_close(states.shift(encode(captions), emotion, 1.0), expected, atol=1e-5, rtol=0)


def test_scale_goes_from_neutral_through_the_emotion_and_beyond(states):
    neutral, angry = encode(["old dog, neutral"]), encode(["old dog, anger"])
    for scale in (0.0, 0.5, 1.0, 1.5):
        expected = neutral + scale * (angry - neutral)
        for start in ("old dog, neutral", "old dog, anger", "old dog, sadness"):
            torch.testing.assert_close(states.shift(encode([start]), "anger", scale), expected, atol=1e-5, rtol=0)


def test_a_captions_own_emotion_is_recognised_also_with_noise_behind_its_end(states):
    captions = [f"{thing}, {emotion}" for thing in ("cat", "my best friend") for emotion in EMOTIONS]
    noise = 0.05 * torch.randn(len(captions), LENGTH, DIM, generator=torch.Generator().manual_seed(0))
    assert states.recognise(encode(captions) + noise) == EMOTIONS * 2


def test_unknown_emotions_are_refused(states):
    with pytest.raises(ValueError, match="must be one of anger, neutral, sadness, got 'joy'"):
        states.shift(encode(["cat, anger"]), "joy", 1.0)


def test_a_pipeline_keeps_its_slider_through_saving_twice(states, tmp_path):
    pipeline = tiny.make_tiny_decoder(prompt_length=LENGTH)
    pipeline.emotion_states = states
    pipeline.save_pretrained(tmp_path / "one")
    StickerPipeline.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    again = StickerPipeline.from_pretrained(tmp_path / "two")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again.emotion_states.means, states.means)

    def draw(name):
        generator = torch.Generator().manual_seed(0)
        drawn = again(prompt_embeds=encode(["cat, sadness"]), emotion=name, num_inference_steps=2, generator=generator)
        return drawn.images[0].tobytes()

    assert len({draw(name) for name in EMOTIONS}) == 3
