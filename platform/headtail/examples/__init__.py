"""Shipped to try the package: tasks, example data, placeholder models, pretraining tasks."""
