r"""Have a model judge answers, and say how far it agrees with people's labels.

Needs: answers, human labels, and nodes that can hold the judge's model (or an endpoint). Killed, the same command goes on where it stopped.
Leaves: judge/<fingerprint> with a score per judged answer, which the gate reads, and the figures of the judge.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/judge_answers.py --config jobs/configs/judge_answers.cluster.yaml

Without a cluster: python jobs/judge_answers.py --config jobs/configs/judge_answers.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("judge")
