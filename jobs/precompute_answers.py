r"""Answer every row of some tables with a model: the teacher on the head, or the batch student on student_rows.

Needs: a plan, and nodes that can hold the model. Killed or preempted, the same command goes on where it stopped.
Leaves: precompute/<fingerprint> with shards of answers, each row in one state, and the ledger that says they add up.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/precompute_answers.py --config jobs/configs/precompute_answers.cluster.yaml

`--dry-run` says first which rows would be asked, why and at what price; `--apply` does that and says what came of it.

Without a cluster: python jobs/precompute_answers.py --config jobs/configs/precompute_answers.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("precompute")
