r"""Turn what callers said of answers into a review queue and labels.

Needs: feedback/ and requests/ in the store, which a server with request_log=true writes. One process, no GPU.
Leaves: feedback/<fingerprint> with suspects for review, labels, and the rows set aside, each with a reason.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/collect_feedback.py --config jobs/configs/collect_feedback.cluster.yaml

Without a cluster: python jobs/collect_feedback.py --config jobs/configs/collect_feedback.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("feedback")
