r"""Distil the teacher into a student: LoRA under DeepSpeed, merged, logits compared.

Needs: a training set, and as many workers as the config asks for. Preempted, it goes on from its last whole checkpoint.
Leaves: distill/<fingerprint> with the merged student in Hugging Face format.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/train_student.py --config jobs/configs/train_student.cluster.yaml

Without a cluster: python jobs/train_student.py --config jobs/configs/train_student.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("distill")
