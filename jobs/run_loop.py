r"""The whole way, once round: from a log to a served, measured release and a report.

Needs: whatever its stations need. Stations that are done are found and not done again.
Leaves: the outputs of every station, report.html and summary.json.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/run_loop.py --config jobs/configs/run_loop.cluster.yaml

Without a cluster: python jobs/run_loop.py --config jobs/configs/run_loop.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("loop")
