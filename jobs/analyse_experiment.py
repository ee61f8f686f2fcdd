r"""Say what an A/B of two releases shows, by stratum, and whether it holds for all traffic.

Needs: the request log of a server with a canary, or files of assignments and outcomes. One process, no GPU.
Leaves: experiment/<fingerprint> with effects by stratum, and their picture.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/analyse_experiment.py --config jobs/configs/analyse_experiment.cluster.yaml

Without a cluster: python jobs/analyse_experiment.py --config jobs/configs/analyse_experiment.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("experiment")
