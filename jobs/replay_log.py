r"""Send later traffic to a running server and see what people would have met.

Needs: an ingest with later traffic, and the URL of a server. No GPU.
Leaves: replay/<fingerprint> with every request, hit shares, latency by source and quality where there is gold.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/replay_log.py --config jobs/configs/replay_log.cluster.yaml

Without a cluster: python jobs/replay_log.py --config jobs/configs/replay_log.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("replay")
