"""One module per foreign system: storage, MLflow, the Ray cluster, the terminal, charts."""
