r"""Train the shipped models from nothing on the example data: the placeholder teacher and the students' base.

Needs: nothing. Half an hour on 2 CPU cores.
Leaves: reference/<fingerprint>, and the two model folders with their cards where `into` says (a folder of the driver's node).

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/train_reference.py --config jobs/configs/train_reference.cluster.yaml

Without a cluster: python jobs/train_reference.py --config jobs/configs/train_reference.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("reference")
