"""The baselines of section 6.2: what they are told, and the loop around their tool."""

import pytest
import torch

from pegs.evaluation.baselines import SYSTEM, TOOL, BaselinePredictor, baseline_chat, context_chat
from pegs.evaluation.predict import run_predictions, system_turns
from tests.fixtures import tiny
from tests.pegs.evaluation import make


PACK = make.make_pack()


def test_the_text_baseline_is_told_of_no_sticker():
    chat = baseline_chat(make.make_session(), PACK, with_tool=False)
    assert [message["role"] for message in chat] == ["system", *["user", "assistant"] * 3]
    assert (
        chat[0]["content"] == SYSTEM and chat[3]["content"] == "user line 2" and chat[2]["content"] == "system line 1"
    )


def test_the_tool_is_called_before_the_text():
    chat = baseline_chat(make.make_session(), PACK, with_tool=True)
    told = [(message["role"], message["content"]) for message in chat]
    assert told[:5] == [
        ("system", TOOL),
        ("user", "user line 1"),
        ("assistant", "Action: draw_sticker\nAction Input: yellow, happiness"),
        ("tool", "Observation: drawn and sent: yellow, happiness"),
        ("assistant", "system line 1"),
    ]
    assert told[5:7] == [("user", "user line 2 [sends a sticker: blue, sadness]"), ("assistant", "system line 2")]
    assert context_chat(make.make_session(), 2, PACK, with_tool=True) == chat[:6]


class Scripted(BaselinePredictor):
    """Says what a script has; keeps what it was asked."""

    def __init__(self, decoder, script):
        super().__init__(torch.nn.Identity(), None, PACK, "scripted", decoder, 5)
        self.script, self.asked, self.captions = script, [], []

    def _say(self, chats, seed):
        self.asked.append(chats)
        return self.script.pop(0)[: len(chats)], [1.5] * len(chats)

    def _draw(self, captions, seeds):
        self.captions += captions
        embeds = torch.zeros(len(captions), 5, self.decoder.unet.config.cross_attention_dim)
        return self.decoder(prompt_embeds=embeds, generator=seeds, num_inference_steps=1)


def test_a_call_is_drawn_observed_and_answered(tmp_path):
    call = "Action: draw_sticker\nAction Input: red heart, happiness\n"
    script = [[call, "No sticker here.", "Action: draw_sticker\nAction Input:"], ["Be well."]]
    predictor = Scripted(tiny.make_tiny_decoder(), script)
    turns = list(system_turns([make.make_session()], PACK))
    run = run_predictions(predictor, turns, PACK, tmp_path / "tool.jsonl", batch_size=3)
    said = [row.predicted for row in run.rows]
    assert [line.text for line in said] == ["Be well.", "No sticker here.", "Action: draw_sticker\nAction Input:"]
    assert run.image(said[0].sticker, PACK).mode == "RGBA" and said[1].sticker is said[2].sticker is None
    assert predictor.captions == ["red heart, happiness"] and run.rows[1].sticker_logit == 1.5
    assert predictor.asked[1][0][-1] == {
        "role": "tool",
        "content": "Observation: drawn and sent: red heart, happiness",
    }


@pytest.mark.parametrize("with_tool", [False, True])
def test_a_seed_gives_the_same_replies(with_tool):
    from pegs.adapters import EMBEDDED, load_language_model

    model, tokenizer = load_language_model(EMBEDDED)
    pipeline = tiny.make_tiny_decoder() if with_tool else None
    predictor = BaselinePredictor(model, tokenizer, PACK, "untrained", pipeline)
    turns = list(system_turns([make.make_session()], PACK))[:2]
    first, again = predictor(turns, 3), predictor(turns, 3)
    assert [reply.text for reply in first] == [reply.text for reply in again] and all(reply.text for reply in first)
    assert all((reply.sticker_logit is not None) == with_tool for reply in first)
