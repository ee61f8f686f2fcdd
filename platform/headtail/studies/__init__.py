"""Experiments over the stages: what curation and side inputs are worth, and how the shipped models are made."""
