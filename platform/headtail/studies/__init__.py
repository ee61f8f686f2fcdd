"""Experiments over the stages: the value of curation and of side inputs, and the training of the shipped models."""
