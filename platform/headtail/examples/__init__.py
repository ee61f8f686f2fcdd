"""What ships with the package to try it: tasks, the example data that makes a log, placeholder models, pretraining tasks."""
