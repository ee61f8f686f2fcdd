r"""Choose which of the teacher's answers a student may learn from.

Needs: the teacher's answers, and the plan's human labels to keep them out. One process, no GPU.
Leaves: curate/<fingerprint> with the training set, and the rows dropped, each with a reason.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/curate_training_set.py --config jobs/configs/curate_training_set.cluster.yaml

Without a cluster: python jobs/curate_training_set.py --config jobs/configs/curate_training_set.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("curate")
