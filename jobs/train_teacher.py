r"""Train a placeholder teacher on human labels, for a machine that can reach no real one.

Needs: an ingest with human_labels_train. A real teacher (hub id, folder or endpoint) makes this job needless.
Leaves: distill/<fingerprint> with a model that `precompute_answers` takes as its teacher.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/train_teacher.py --config jobs/configs/train_teacher.cluster.yaml

Without a cluster: python jobs/train_teacher.py --config jobs/configs/train_teacher.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("distill")
