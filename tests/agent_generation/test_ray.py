"""The same sessions from a Ray cluster of two nodes, one of which dies."""

import asyncio
import threading
from functools import partial

import pytest

from agent_generation.dry import DryLLM
from agent_generation.engine import Engine, Journal
from agent_generation.run import (
    Run,
    export_run,
    journal_file,
    open_run,
    plan_sessions,
    shard_of,
    write_sessions,
)
from agent_generation.session import Settings
from tests.fixtures.agents import PRICES, PROFILES, Scripted, contents, encode, make_toolbox, write_run


ray = pytest.importorskip("ray")
SHARDS, COUNT = 4, 16


def write_shard(folder, shard):
    """What a worker does."""
    journal = Journal(journal_file(folder, shard))
    engine = Engine(Scripted(dry=DryLLM()), journal, 4, encode=encode)
    plans = (plan for plan in plan_sessions(COUNT, PROFILES, 2, 0) if shard_of(plan.session_id, SHARDS) == shard)
    note = lambda outcome: (folder / f"{outcome.task}.ended").touch()  # noqa: E731
    asyncio.run(write_sessions(plans, engine, make_toolbox(), Settings(), note))
    journal.close()


@pytest.mark.slow
def test_two_nodes_write_what_one_process_does_though_one_dies(tmp_path):
    from ray.cluster_utils import Cluster

    from agent_generation.ray_engine import run_on_cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        seen = []

        def watch():
            seen.append(len(list((tmp_path / "ray").glob("*.ended"))))
            if seen[-1] >= 2 and second in cluster.worker_nodes:
                threading.Thread(target=cluster.remove_node, args=(second,)).start()

        run = Run(0, "m", {}, "pack", "profiles", Settings(), SHARDS)
        with open_run(tmp_path / "ray", run):
            run_on_cluster(partial(write_shard, tmp_path / "ray"), SHARDS, 2, watch)
            export_run(tmp_path / "ray", run, plan_sessions(COUNT, PROFILES, 2, 0), PRICES)
    finally:
        ray.shutdown()
        cluster.shutdown()
    write_run(tmp_path / "local", DryLLM(), COUNT)
    ours, theirs = contents(tmp_path / "local"), contents(tmp_path / "ray")
    assert ours["sessions.jsonl"] == theirs["sessions.jsonl"] and ours["summary.json"] == theirs["summary.json"]
    assert seen[-1] == COUNT
