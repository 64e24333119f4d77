"""Spreads a run's shards over a Ray cluster; each shard has its own journal, so that any worker can go on with it after a kill."""

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayTaskError


def run_on_cluster(
    write_shard: Callable[[int], None], shards: int, workers: int, on_progress: Callable[[], object]
) -> None:
    """
    Write shards in the processes of a cluster: that of `RAY_ADDRESS`, or one on this machine.

    Args:
        write_shard (`Callable`): Writes the shard of a number. It is sent to the workers, which must see the same run folder.
        shards (`int`): How many there are.
        workers (`int`): How many are written at once.
        on_progress (`Callable`): Called every second.

    Raises:
        Exception: What the first shard that failed raised; the others are cancelled.

    """
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    remote: Any = ray.remote(num_cpus=1, max_retries=2)(lambda shard: write_shard(shard))  # Ray takes no partial
    waiting = list(range(shards))
    live: list[ray.ObjectRef] = []
    try:
        while waiting or live:
            while waiting and len(live) < workers:
                live.append(remote.remote(waiting.pop(0)))
            done, live = ray.wait(live, timeout=1)
            on_progress()
            for shard in done:
                try:
                    ray.get(shard)
                except RayTaskError as error:
                    raise error.cause from None
    finally:
        for shard in live:
            ray.cancel(shard)
        if started:
            ray.shutdown()
