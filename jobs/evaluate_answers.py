r"""Score answers against human labels, by stratum, with intervals.

Needs: a plan with human labels and the answers of teacher, student or both. One process, no GPU.
Leaves: evaluate/<fingerprint> with the quality table, every scored row and a report.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/evaluate_answers.py --config jobs/configs/evaluate_answers.cluster.yaml

Without a cluster: python jobs/evaluate_answers.py --config jobs/configs/evaluate_answers.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("evaluate")
