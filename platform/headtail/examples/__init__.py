"""What ships with the package to try it: tasks, the example world that makes a log, stand-in models, pretraining tasks."""
