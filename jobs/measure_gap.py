r"""What side inputs are worth: a teacher, and perhaps a student, asked with them and without, on the same human labels.

Needs: human labels in a plan, some of them with side inputs; the teacher; the student's receipt when it is to be measured too.
Leaves: gap/<fingerprint> with the table by stratum, a verdict for each model and a figure; answers and one evaluation as ordinary receipts.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/measure_gap.py --config jobs/configs/measure_gap.cluster.yaml

Without a cluster: python jobs/measure_gap.py --config jobs/configs/measure_gap.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("gap")
