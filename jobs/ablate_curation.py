r"""What curation is worth: a student from raw, filtered, reviewed and human answers, all judged on the same human labels.

Needs: a teacher's answers and human labels; what train_student and precompute_answers need, once for each kind.
Leaves: ablate/<fingerprint> with the table by stratum and its figure; students, answers and one evaluation as ordinary receipts.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/ablate_curation.py --config jobs/configs/ablate_curation.cluster.yaml

Without a cluster: python jobs/ablate_curation.py --config jobs/configs/ablate_curation.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("ablate")
