"""One door per foreign system: storage, MLflow, the Ray cluster, the terminal, charts."""
