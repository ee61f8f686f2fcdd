r"""Read a query log: normalise, redact, count, and hold the last days out.

Needs: a log (CSV, TSV, JSONL, Parquet) that every node can read. No GPU.
Leaves: ingest/<fingerprint> with queries, holdout, human_labels, human_labels_train and the rows set aside, each with a reason.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/ingest_log.py --config jobs/configs/ingest_log.cluster.yaml

Without a cluster: python jobs/ingest_log.py --config jobs/configs/ingest_log.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("ingest")
