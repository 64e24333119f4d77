"""What the feature mapper is trained on is what it meets: a sticker after the model's own words."""

import math

import pytest
import torch

from modeling_pegs import PegsModel, PegsProcessor
from pegs.places import DEFAULT_MODEL
from pegs.training.generation import generation_hidden_states, own_replies
from tests.fixtures import tiny


@pytest.mark.slow
def test_hidden_states_after_own_replies_are_those_of_generate():
    model, processor = PegsModel.from_pretrained(DEFAULT_MODEL), PegsProcessor.from_pretrained(DEFAULT_MODEL)
    request = "a cat that sleeps"
    (reply,) = own_replies(model, processor, [request], 8)
    assert len(reply.split()) >= 2
    user = {"role": "user", "content": [{"type": "text", "text": request}]}
    sent = [{"type": "text", "text": reply}, {"type": "image", "image": tiny.picture()}]
    hidden = generation_hidden_states(model, processor, [[user, {"role": "assistant", "content": sent}]], 1)
    inputs = processor.apply_chat_template([user], add_generation_prompt=True, tokenize=True, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=40, sticker_bias=math.inf)
    with torch.no_grad():
        expected = model.feature_mapper(hidden)
    assert (
        processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        == reply
    )
    error = (output.sticker_prompt_embeds - expected).square().mean()
    assert error < 0.02 * expected.var()  # hidden states of training are computed in bfloat16
