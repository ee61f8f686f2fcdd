"""Distil: fine-tune a student on the training rows."""

from headtail.stages.distill.logits import Logits
from headtail.stages.distill.result import Result
from headtail.stages.distill.rows import TrainingSet, Weights
from headtail.stages.distill.stage import Config, Lora, run, student_fingerprint

__all__ = ["Config", "Logits", "Lora", "Result", "TrainingSet", "Weights", "run", "student_fingerprint"]
