r"""Send holdout traffic to a running server and see what people would have met.

Needs: an ingest with holdout traffic, and the URL of a server. No GPU.
Leaves: replay/<fingerprint> with every request, hit shares, latency by path and quality where there are human labels.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/replay_log.py --config jobs/configs/replay_log.cluster.yaml

Without a cluster: python jobs/replay_log.py --config jobs/configs/replay_log.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("replay")
