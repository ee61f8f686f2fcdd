"""The stages of the pipeline, one module or package each: a `Config` and `run(config)`. They do not import one another."""
