r"""Split the queries of a log into a head, answered ahead of time, and rows for the student.

Needs: a finished ingest in the store. One process on the head node, no GPU.
Leaves: plan/<fingerprint> with the tables head, teacher_sample, student_rows and human_labels, and the coverage curve.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/plan_head.py --config jobs/configs/plan_head.cluster.yaml

Without a cluster: python jobs/plan_head.py --config jobs/configs/plan_head.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("plan")
