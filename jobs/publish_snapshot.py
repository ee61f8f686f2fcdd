r"""Publish answers as an immutable snapshot and point CURRENT at a release that holds it.

Needs: one or more precomputes; a student when misses are to be answered live. One process, no GPU.
Leaves: snapshots/<id> (Parquet, LMDB, manifest), releases/<id>.json and a moved CURRENT.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/publish_snapshot.py --config jobs/configs/publish_snapshot.cluster.yaml

Without a cluster: python jobs/publish_snapshot.py --config jobs/configs/publish_snapshot.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("publish")
