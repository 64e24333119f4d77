"""Preference optimisation: its pairs are real pairs of dialogues, and it learns what is preferred."""

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F

from modeling_pegs import PegsModel
from pegs.training.align import AlignArguments, Pairs, emotion_loss, find_decisions, timing_loss
from pegs.training.data_collator import DataCollatorForPegs
from pegs.training.stages import main
from tests.fixtures import tiny
from tests.pegs.test_stage_configs import make_pack, make_session


def dialogue(*answers: str) -> list[dict]:
    """Answers; those that end with `*` have a sticker."""
    messages = []
    for answer in answers:
        content = [{"type": "text", "text": answer.rstrip("*")}]
        if answer.endswith("*"):
            content.append({"type": "image", "image": tiny.picture("red"), "sticker_id": "red"})
        messages += [
            {"role": "user", "content": [{"type": "text", "text": "so"}]},
            {"role": "assistant", "content": content},
        ]
    return messages


def test_a_pair_of_decisions_is_the_pair_of_dialogues(processor):
    """DPO's log-ratio of a reply with its sticker against the same reply without one, from two passes, is the margin of one pass."""
    model = tiny.make_tiny_model()
    collator = DataCollatorForPegs(processor, model.config, None, 600)
    batch = collator([{"messages": dialogue("ok*", "and then?", "I see*")}, {"messages": dialogue("no", "yes*")}])
    where = find_decisions(batch["input_ids"], batch["labels"], model.config, tiny.EOS)
    assert where.sum(1).tolist() == [3, 2]
    following = batch["labels"][:, 1:][where]
    first = model.config.img_token_ids[0]
    assert (following == first).tolist() == [True, False, True, False, True]
    assert set(following.tolist()) == {first, tiny.EOS}
    with torch.no_grad():
        hidden = model(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state
        log_probs = model.score(hidden[:, :-1][where]).log_softmax(-1)
        for row, (position, with_sticker) in enumerate(
            ((w, s) for w, s in zip(where.nonzero(), following == first, strict=True))
        ):
            b, t = position.tolist()
            prefix = batch["input_ids"][b : b + 1, : t + 1]
            images = int((prefix == model.config.image_token_id).sum()) // model.config.num_query_tokens
            start = 0 if b == 0 else 2  # pictures of the dialogue before
            again = model(
                input_ids=prefix, pixel_values=batch["pixel_values"][start : start + images] if images else None
            )
            alone = again.logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(
                log_probs[row, first] - log_probs[row, tiny.EOS], alone[first] - alone[tiny.EOS], rtol=1e-3, atol=1e-4
            )
            assert with_sticker == (batch["input_ids"][b, t + 1] == first)


def test_losses_are_dpos():
    generator = torch.Generator().manual_seed(0)
    gain, sent = torch.randn(3, generator=generator), torch.tensor([True, False, True])
    assert timing_loss(torch.zeros(3), sent, 0.1).item() == pytest.approx(0.6931, abs=1e-4)
    by_hand = [-F.logsigmoid(0.1 * (1 if s else -1) * g) for s, g in zip(sent, gain, strict=True)]
    torch.testing.assert_close(timing_loss(gain, sent, 0.1), torch.stack(by_hand).mean())
    policy, reference = (torch.randn(2, 4, generator=generator).log_softmax(-1) for _ in range(2))
    emotions, gold = torch.tensor([0, 1, 0, 2]), torch.tensor([2, 1])
    by_hand = []
    for row, g in enumerate(gold.tolist()):
        wrong = [i for i in range(4) if emotions[i] != emotions[g]]
        weights = reference[row, wrong].softmax(0)
        gains = policy[row] - reference[row]
        by_hand.append(
            sum(-w * F.logsigmoid(0.5 * (gains[g] - gains[i])) for w, i in zip(weights, wrong, strict=True))
        )
    torch.testing.assert_close(emotion_loss(policy, reference, gold, emotions, 0.5), torch.stack(by_hand).mean())
    assert emotion_loss(policy, reference, gold, torch.zeros(4), 0.5) == 0


def test_stickers_of_all_emotions_come_equally_often():
    states = {"ends": torch.zeros(2, 1), "sent": torch.zeros(2), "spans": torch.arange(10.0).view(10, 1, 1)}
    states["gold"] = torch.tensor([0] * 8 + [1, 2])  # eight of one emotion, one each of two others
    pairs = Pairs(states, torch.tensor([4, 0, 6]), AlignArguments("", 300, 4, 1e-3))
    drawn = torch.tensor([int(pairs[i]["gold"]) for i in range(len(pairs))]).bincount(minlength=3)
    assert (drawn / len(pairs) - 1 / 3).abs().max() < 0.05


def test_the_stage_learns_what_is_preferred_and_leaves_the_words(tmp_path):
    start = tiny.make_tiny_model(lora={"r": 2, "target_modules": ["q_proj", "v_proj"]})
    start.save_pretrained(tmp_path / "start")
    tiny.make_tiny_processor(start.config).save_pretrained(tmp_path / "start")
    pack = make_pack()
    pack.stickers[:] = [
        sticker.model_copy(update={"emotion": ("sadness", "anger")[number % 2]})
        for number, sticker in enumerate(pack.stickers)
    ]
    pack.save(tmp_path / "pack")
    sessions = [make_session(number, "train") for number in range(4)] + [make_session(6, "validation")]
    (tmp_path / "sessions.jsonl").write_text("\n".join(session.model_dump_json() for session in sessions))
    values = {"stage": "align", "init_from": str(tmp_path / "start"), "output_dir": str(tmp_path / "out")}
    values |= {"stickers": str(tmp_path / "pack"), "sessions": str(tmp_path / "sessions.jsonl"), "noise": 0.0}
    values |= {"max_steps": 100, "batch_size": 16, "learning_rate": 3e-2, "warmup_steps": 1}
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "align.yaml")]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"retrieval_head.text_projection.weight"}
    assert set(after) - set(before) == {"timing_head.weight", "timing_head.bias"}
    states = load_file(tmp_path / "out" / "state" / "sessions.safetensors")
    assert states["sent"].any() and not states["sent"].all()
    scores = [
        PegsModel.from_pretrained(tmp_path / name).score(states["ends"]).log_softmax(-1) for name in ("start", "out")
    ]
    ends = [tiny.EOS, start.config.img_token_ids[0]]
    words = [i for i in range(scores[0].shape[1]) if i not in ends]
    torch.testing.assert_close(scores[0][:, words], scores[1][:, words], rtol=0, atol=1e-5)
    gaps = []
    for score in scores:
        odds = score[:, ends[1]] - score[:, ends[0]]
        gaps.append((odds[states["sent"]].mean() - odds[~states["sent"]].mean()).item())
    assert gaps[1] > gaps[0] + 0.2
    values["init_from"] = str(tmp_path / "gen")
    tiny.make_tiny_model(num_retrieval_tokens=0, variant="gen").save_pretrained(tmp_path / "gen")
    tiny.make_tiny_processor(start.config).save_pretrained(tmp_path / "gen")
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "align.yaml")]) == 2
