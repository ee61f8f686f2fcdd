r"""Answer live traffic from the current release: cache, then student, then fallback.

Needs: a published release; a GPU or CPU per realtime replica. Runs until it is stopped, so submit it with --no-wait.
Leaves: an HTTP server on the config's port; clusters/kuberay/rayservice.yaml is the same for Kubernetes.

    ray job submit --runtime-env jobs/runtime_env.yaml --no-wait -- \
        python jobs/serve_release.py --config jobs/configs/serve_release.cluster.yaml

Without a cluster: python jobs/serve_release.py --config jobs/configs/serve_release.laptop.yaml
"""

from headtail.cli import job

if __name__ == "__main__":
    job("serve")
