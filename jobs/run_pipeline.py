r"""The whole way, once round: from a log to a served, measured release and a report.

Needs: whatever its stages need. Stages that are done are found and not done again.
Leaves: the outputs of every stage, report.html and summary.json.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/run_pipeline.py --config jobs/configs/run_pipeline.cluster.yaml

Without a cluster: python jobs/run_pipeline.py --config jobs/configs/run_pipeline.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("pipeline")
