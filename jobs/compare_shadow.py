r"""Say how served answers agree with those of the shadow model, and make a review queue of those that differ.

Needs: shadow/ in the store, which a server in shadow mode writes. One process, no GPU.
Leaves: shadow/<fingerprint> with agreement by release and source, and suspects for review.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/compare_shadow.py --config jobs/configs/compare_shadow.cluster.yaml

Without a cluster: python jobs/compare_shadow.py --config jobs/configs/compare_shadow.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("shadow")
