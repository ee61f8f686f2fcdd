"""Whether a student of some kind can answer a task, and how it writes.

In: a distill config, a task. Out: yes or no; the config with the output that the task's answers allow. What was found is printed.
Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Mapping

from headtail.adapters.progress import say
from headtail.core import io_format, tagging
from headtail.core.config import StageConfig
from headtail.core.errors import ConfigError
from headtail.core.task import Task
from headtail.stages.distill.stage import Config


def choose_output(config: Config, task: Task) -> Config:
    """With answers in JSON where the task's cannot be compact; prints why."""
    if config.io_format.output == "json":
        return config
    try:
        io_format.format_for(task, config.io_format, config.student)
    except ConfigError as error:
        say(f"distill      answers in JSON: {error.what} ({error.where})")
        return config.model_copy(update={"io_format": config.io_format.model_copy(update={"output": "json"})})
    return config


def can_answer(config: Config, task: Task) -> bool:
    """Whether a student of this kind can answer the task; prints why when it cannot."""
    if config.student != "encoder":
        return True
    try:
        tagging.scheme(task.schema, task.name)
    except ConfigError as error:
        say(f"realtime     none: {error.what}; the batch student answers misses too")
        return False
    return True


def refuse_ignored(students: Mapping[str, Config | None], answering: StageConfig, side_inputs: bool) -> None:
    """ConfigError when a field is set that another field makes a pipeline overwrite. `students`: by the name of their group."""
    for name, student in students.items():
        if student is None:
            continue
        if student.two_stage and side_inputs and "side_inputs" in answering.model_fields_set:
            what = f"a student of {name}.two_stage answers without side inputs"
            fix = f"leave precompute_batch.side_inputs out, or set {name}.two_stage to false"
            raise ConfigError(what, where="precompute_batch.side_inputs", value=True, fix=fix)
        if student.base.model == "teacher" and student.base.revision:
            what, fix = "a student that starts from the teacher has the teacher's revision", "set precompute_teacher.model.revision"
            raise ConfigError(what, where=f"{name}.base.revision", value=student.base.revision, fix=fix)
