"""A run of a precompute job on a real Ray cluster that this process starts: what the harness kills parts of.

    python -m chaos.driver SPEC.json     fields of the job's config, and `nodes`: 0, or how many further nodes to keep alive

With nodes, workers may run on them alone, and a node whose raylet is gone is replaced, as a cloud's autoscaler would: the
driver and the head live on. Without, there is one node, and the driver ends with it. Exit codes are those of spec.py.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

DONE, DELIBERATE, UNFORESEEN = 0, 3, 4
PLACE = "replaceable"  # the custom resource that further nodes have


def main(spec: dict[str, Any]) -> int:
    from headtail.adapters.cluster import stop_cluster
    from headtail.core.config import build_config
    from headtail.core.errors import HeadtailError
    from headtail.stages import precompute

    fields, close = spec["fields"], _nothing
    if spec["nodes"]:
        fields = {**fields, "model": {**fields["model"], "resources": {PLACE: 0.1}}}
        close = _nodes(int(spec["nodes"]))
    try:
        precompute.run(build_config(precompute.Config, fields, "chaos"))
        stop_cluster()
    except HeadtailError as error:
        print(error, flush=True)
        return DELIBERATE
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        return UNFORESEEN
    finally:
        close()
    return DONE


def _nothing() -> None:
    pass


def _nodes(count: int) -> Callable[[], None]:
    """A head without room for workers, `count` nodes that have it, a thread that replaces those that die; what ends all of it."""
    import ray
    from ray.cluster_utils import Cluster

    from headtail.adapters.cluster import quiet_data

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes: list[Any] = []
    while len(nodes) < count:
        _add(cluster, nodes, wait=True)
    path = {"env_vars": {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}}
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error", runtime_env=path)
    quiet_data()
    ray._private.utils.set_sigterm_handler = lambda _: None  # only a main thread may set one, and the keeper is none

    over = threading.Event()

    def keep() -> None:
        while not over.wait(0.3):
            for node in [node for node in nodes if not node.remaining_processes_alive()]:
                nodes.remove(node)
                node.kill_all_processes(check_alive=False, allow_graceful=False)
            while len(nodes) < count and not over.is_set():
                _add(cluster, nodes, wait=False)

    def close() -> None:
        over.set()
        keeper.join(30)
        ray.shutdown()
        for node in [*nodes, cluster.head_node]:
            node.kill_all_processes(check_alive=False, allow_graceful=False)

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    return close


def _add(cluster: Any, nodes: list[Any], wait: bool) -> None:
    try:
        nodes.append(cluster.add_node(wait=wait, num_cpus=2, resources={PLACE: 1}))
    except Exception as error:  # Ray gives a node some seconds to start; on a busy machine the next one is in time
        print(f"a node did not start, another one is: {error}", flush=True)


if __name__ == "__main__":
    code = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    sys.stdout.flush()
    os._exit(code)  # Ray's own clean-up has nothing left to do, or nothing left to do it with
