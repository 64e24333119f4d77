"""The baselines of section 6.2: what they are told, and the loop around their tool."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from pegs.errors import InputError
from pegs.evaluation.baselines import SYSTEM, TOOL, BaselinePredictor, StickerChooser, baseline_chat, context_chat
from pegs.evaluation.predict import Reply, read_predictions, run_predictions, system_turns
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

    def _draw(self, decoder, captions, seeds):
        self.captions += captions
        embeds = torch.zeros(len(captions), 5, decoder.unet.config.cross_attention_dim)
        return decoder(prompt_embeds=embeds, generator=seeds, num_inference_steps=1).images


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


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.mark.parametrize("with_tool", [False, True])
def test_a_seed_gives_the_same_replies(with_tool):
    config = tiny.make_tiny_config()
    torch.manual_seed(0)
    tokenizer = tiny.make_tiny_tokenizer(config)
    tokenizer.chat_template = CHATML
    pipeline = tiny.make_tiny_decoder() if with_tool else None
    predictor = BaselinePredictor(LlamaForCausalLM(config.text_config), tokenizer, PACK, "untrained", pipeline)
    turns = list(system_turns([make.make_session()], PACK))[:2]
    first, again, other = predictor(turns, 3), predictor(turns, 3), predictor(turns, 4)
    texts = [[reply.text for reply in replies] for replies in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and all(texts[0])
    assert all((reply.sticker_logit is not None) == with_tool for reply in first)


def by_colour(texts):
    """Vectors of texts: which colours they name."""
    rows = np.array([[1e-6, *(text.count(color) for color in make.EMOTIONS)] for text in texts], np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_replies(path, session, said):
    """Predictions of a model that says so in a session; `None` for no sticker."""

    def other(turns, seed):
        return [Reply(*said[turn.turn.turn - 1]) for turn in turns]

    other.model = "other"
    return run_predictions(other, list(system_turns([session], PACK))[: len(said)], PACK, path)


def chosen(folder, says, encoder, seed=0):
    """What a chooser makes of a session's replies that say so; the second turn is without a sticker."""
    session = make.make_session("one", len(says))
    (folder / "other.jsonl").unlink(missing_ok=True)
    replies = write_replies(folder / "other.jsonl", session, [(text, "red" if n != 1 else None) for n, text in enumerate(says)])  # fmt: skip
    return StickerChooser(replies, PACK, "chooser", encoder)(list(system_turns([session], PACK)), seed)


def test_a_chooser_keeps_words_and_turns_and_sends_the_nearest_of_the_database(tmp_path):
    replies = chosen(tmp_path, ["so blue", "white", "a red blue"], by_colour)
    assert [reply.text for reply in replies] == ["so blue", "white", "a red blue"]
    assert [reply.sticker_id for reply in replies] == ["blue", None, "blue"]  # red is of another database
    again = chosen(tmp_path, ["white", "yellow", "yellow white white"], by_colour)
    assert [reply.sticker_id for reply in again] == ["white", None, "white"]  # the System's past is the dataset's
    seen = chosen(tmp_path, ["blue", "blue", "yellow yellow white"], by_colour)
    assert seen[2].sticker_id == "white"  # the dataset's System sent the yellow one before


def test_a_chooser_is_scored_on_the_references_words(tmp_path):
    """Every reference says `system line n`, which names no colour: the order of the database, where yellow is first, white second."""
    replies = chosen(tmp_path, ["blue", "blue", "blue"], by_colour)
    assert [(reply.gold_rank, reply.candidates) for reply in replies] == [(0, 3), (None, None), (1, 3)]
    assert all(reply.sticker_logit is None for reply in replies)


def test_chance_is_chance_and_the_same_with_the_same_seed(tmp_path):
    one, same, other = (chosen(tmp_path, ["x"] * 300, None, seed) for seed in (0, 0, 1))
    assert [reply.sticker_id for reply in one] == [reply.sticker_id for reply in same]
    ranks = [[reply.gold_rank for reply in replies if reply.gold_rank is not None] for replies in (one, same, other)]
    assert ranks[0] == ranks[1] != ranks[2]
    assert len(ranks[0]) == 200 and all(50 < ranks[0].count(rank) < 85 for rank in range(3))


def test_a_turn_that_the_other_model_did_not_answer_is_named(tmp_path):
    replies = write_replies(tmp_path / "other.jsonl", make.make_session(), [("x", None)])
    turns = list(system_turns([make.make_session()], PACK))
    with pytest.raises(InputError, match=r"--replies .*other.jsonl: has no turn one/2"):
        StickerChooser(replies, PACK, "chooser", None)(turns, 0)


def test_the_command_chooses_by_minilm(tmp_path):
    PACK.save(tmp_path / "pack")
    (tmp_path / "sessions.jsonl").write_text(make.make_session().model_dump_json() + "\n", "utf-8")
    other = write_replies(tmp_path / "pegs.jsonl", make.make_session(), [("I am so sad, blue and sad", "red")] * 3)
    command = ("predict", "--sessions", tmp_path / "sessions.jsonl", "--stickers", tmp_path / "pack", "--out", tmp_path / "out.jsonl")  # fmt: skip
    done = make.pegs(*command, "--variant", "minilm", "--replies", other.path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"predictions": str(tmp_path / "out.jsonl"), "model": "baseline-minilm", "turns": 3, "stickers": 3}  # fmt: skip
    run = read_predictions(tmp_path / "out.jsonl")
    assert [row.predicted.sticker.id for row in run.rows] == ["blue"] * 3  # "blue, sadness"
    make.write(other.path, [row.model_copy(update={"predicted": row.reference}) for row in other.rows])
    changed = make.pegs(*command, "--variant", "minilm", "--replies", other.path)
    assert changed.returncode == 2 and "was begun with other replies" in changed.stderr
    assert "--variant random needs --replies" in make.pegs(*command, "--variant", "random").stderr
    wrong = ("--variant", "text", "--baseline", tmp_path, "--replies", other.path)
    assert "--replies does not go with --variant text" in make.pegs(*command, *wrong).stderr
