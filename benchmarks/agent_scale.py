"""
Agent4SC at scale, with scripted answers. Prints one JSON line.

10,000 sessions live at once: resident memory, and the time of a session late in the run over one early in it. 200 kills (SIGKILL at random moments):
what was lost, doubled or asked for again. Rates over 2,000 sessions.
"""

import asyncio
import json
import resource
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agent_generation.dry import DryLLM
from agent_generation.engine import Engine, Journal, Prices
from agent_generation.run import Run, export_run, journal_file, open_run, plan_sessions, write_sessions
from agent_generation.session import Settings
from tests.agent_generation.test_run import kill_and_resume
from tests.fixtures.agents import PROFILE, encode, make_toolbox


LIVE, RATED, KILLS = 10_000, 2_000, 200
PROFILES = [PROFILE.model_copy(update={"name": f"Name{n}"}) for n in range(100)]


def run(count: int, live: int, folder: Path, settings: Settings) -> tuple[dict, list[float]]:
    """Write `count` sessions, `live` at once; the summary, and when each ended."""
    toolbox, ended = make_toolbox(databases=10, each=50), []
    config = Run(0, "dry", "dry", "pack", "profiles", settings)
    plans = lambda: plan_sessions(count, PROFILES, 10, 0)  # noqa: E731
    with open_run(folder, config):
        engine = Engine(DryLLM(), Journal(journal_file(folder, 0)), live, live_tasks=live, encode=encode)
        asyncio.run(write_sessions(plans(), engine, toolbox, settings, lambda _: ended.append(time.perf_counter())))
        return export_run(folder, config, plans(), Prices()), ended


def main() -> None:
    """Run it."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        started = time.perf_counter()
        rated, ended = run(RATED, 50, base / "rated", Settings(user_rate=0.35, system_rate=0.60))
        early, late = ended[399] - started, ended[-1] - ended[-401]
        whole, _ = run(LIVE, LIVE, base / "live", Settings())
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
        (base / "kills").mkdir()
        problems = kill_and_resume(base / "kills", KILLS, seed=0)
    figures = {
        "benchmark": "agent_scale",
        "live_sessions": LIVE,
        "written": whole["sessions"],
        "resident_gib": round(memory, 2),
        "last_400_over_first_400": round(late / early, 2),
        "rates": rated["rates"],
        "kills": KILLS,
        "problems": problems,
    }
    print(json.dumps(figures))  # noqa: T201


if __name__ == "__main__":
    main()
