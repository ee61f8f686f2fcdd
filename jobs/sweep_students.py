r"""Train a student for each point of a grid, each an ordinary distill run under one parent in MLflow; name the best.

Needs: a training set, and what train_student needs, once at a time.
Leaves: sweep/<fingerprint> with the table of trials, and distill/<fingerprint> for each; killed, it goes on with what is not there.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/sweep_students.py --config jobs/configs/sweep_students.cluster.yaml

Without a cluster: python jobs/sweep_students.py --config jobs/configs/sweep_students.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("sweep")
