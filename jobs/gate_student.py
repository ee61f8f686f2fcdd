r"""Test whether a student may be promoted: bounds that hold at any number of labels, and the evidence.

Needs: an evaluation whose scored rows include the student's. One process, no GPU.
Leaves: gate/<fingerprint> with the verdict, its evidence and a figure; a refusal says what is missing and exits with 0.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/gate_student.py --config jobs/configs/gate_student.cluster.yaml

Without a cluster: python jobs/gate_student.py --config jobs/configs/gate_student.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("gate")
