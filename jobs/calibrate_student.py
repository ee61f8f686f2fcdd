r"""From where a student's answers are sure: its confidence calibrated, a threshold with a promise, what escalation costs and gains.

Needs: an evaluation whose scored rows include the student's. One process, no GPU.
Leaves: calibrate/<fingerprint> with the result and a figure; a promise that cannot be made says how many labels it would take.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/calibrate_student.py --config jobs/configs/calibrate_student.cluster.yaml

Without a cluster: python jobs/calibrate_student.py --config jobs/configs/calibrate_student.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("calibrate")
