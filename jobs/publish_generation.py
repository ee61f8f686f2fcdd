r"""Publish answers as an immutable generation and point CURRENT at a release that holds it.

Needs: one or more precomputes; a student when misses are to be answered live. One process, no GPU.
Leaves: generations/<id> (Parquet, LMDB, manifest), releases/<id>.json and a moved CURRENT.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/publish_generation.py --config jobs/configs/publish_generation.cluster.yaml

Without a cluster: python jobs/publish_generation.py --config jobs/configs/publish_generation.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("publish")
