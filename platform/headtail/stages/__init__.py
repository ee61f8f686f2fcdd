"""The stages of the pipeline, one module or package each: a `Config` and `run(config)`. They know nothing of one another."""
