r"""Compare designs of a server on a day of requests: latency, machines, cost and quality of each, before any is built.

Needs: ingest, plan, evaluate and a published release in the store; service times from the config or from a running server. No GPU.
Leaves: simulate/<fingerprint> with one tree of figures per design, quantiles of latency and a picture.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/simulate_designs.py --config jobs/configs/simulate_designs.cluster.yaml

Without a cluster: python jobs/simulate_designs.py --config jobs/configs/simulate_designs.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("simulate")
