"""
Agent4SC at scale, with scripted answers. Prints one JSON line.

10,000 sessions live at once: resident memory. Rates over 2,000 sessions of a model that forgets JSON in a tenth of its structured answers, has a tenth of
its stickers refused and ends sessions when it likes; and processor time of the last 400 over that of the first 400. 200 kills (SIGKILL at random
moments): what was lost, doubled or asked for again. 2,000 profiles: seconds for the index of novelty, and for comparing all pairs.
"""

import asyncio
import json
import random
import resource
import sys
import tempfile
import time
from collections import deque
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agent_generation.dry import DryLLM
from agent_generation.engine import Engine, Journal, Prices
from agent_generation.llm import LLM
from agent_generation.manager import rouge_l, tokens
from agent_generation.profile import NOVELTY, NoveltyIndex, seed_profiles
from agent_generation.run import Run, export_run, journal_file, open_run, plan_sessions, write_sessions
from agent_generation.session import Settings
from tests.fixtures.agents import PROFILE, Scripted, encode, make_toolbox, reluctant
from tests.fixtures.kills import kill_and_resume


LIVE, RATED, KILLS = 10_000, 2_000, 200
PROFILES = [PROFILE.model_copy(update={"name": f"Name{n}"}) for n in range(100)]


def run(count: int, live: int, folder: Path, settings: Settings, llm: LLM) -> tuple[dict, list[float]]:
    """Write `count` sessions, `live` at once; the summary, and the processor time at the start and at the end of each."""
    toolbox, ended = make_toolbox(databases=10, each=50), [time.process_time()]
    config = Run(0, "dry", {}, "pack", "profiles", settings)
    plans = lambda: plan_sessions(count, PROFILES, 10, 0)  # noqa: E731
    with open_run(folder, config):
        engine = Engine(llm, Journal(journal_file(folder, 0)), live, live_tasks=live, encode=encode)
        asyncio.run(write_sessions(plans(), engine, toolbox, settings, lambda _: ended.append(time.process_time())))
        engine.journal.close()
        return export_run(folder, config, plans(), Prices()), ended


def time_novelty() -> tuple[float, float]:
    """Processor time to sift profiles made of the seeds' sentences: by the index, and by comparing all pairs."""
    rng, texts = random.Random(0), [f"{seed.persona} {seed.situation}" for seed in seed_profiles()]
    sentences = [sentence for text in texts for sentence in text.split(". ")]
    made = [". ".join(rng.sample(sentences, 5)) for _ in range(RATED)]
    index, started = NoveltyIndex(), time.process_time()
    new = []
    for text in made:
        new.append(index.is_new(text))
        if new[-1]:
            index.add(text)
    indexed = time.process_time()
    known: list[tuple[str, ...]] = []
    for text, is_new in zip(made, new, strict=True):
        said = tokens(text)
        assert is_new == all(rouge_l(said, other) < NOVELTY for other in known)
        if is_new:
            known.append(said)
    return indexed - started, time.process_time() - indexed


def main() -> None:
    """Run it."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        rates = Settings(user_rate=0.35, system_rate=0.60)
        rated, ended = run(RATED, 50, base / "rated", rates, Scripted(reluctant(0), asked=deque(maxlen=0)))
        whole, _ = run(LIVE, LIVE, base / "live", Settings(), DryLLM())
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
        (base / "kills").mkdir()
        runs, problems = kill_and_resume(base / "kills", KILLS, seed=0)
    by_index, by_pairs = time_novelty()
    figures = {
        "benchmark": "agent_scale",
        "live_sessions": LIVE,
        "written": whole["sessions"],
        "resident_gib": round(memory, 2),
        "last_400_over_first_400": round((ended[-1] - ended[-401]) / (ended[400] - ended[0]), 2),
        "rates": rated["rates"],
        "absorbed": {**rated["absorbed"], "unusable_answers": rated["unusable_answers"]},
        "kills": KILLS,
        "killed_runs": runs,
        "problems": problems,
        "novelty_seconds": round(by_index, 2),
        "all_pairs_seconds": round(by_pairs, 2),
    }
    print(json.dumps(figures))  # noqa: T201


if __name__ == "__main__":
    main()
