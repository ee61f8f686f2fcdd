"""vLLM's LLMEngine in a thread of its own: any thread puts in prompts, each gets a Future of its result.

In: how to start the engine; prompts with their sampling. Out: a Future of vLLM's RequestOutput for each; a cancelled one takes its row out
of the batch. LLMEngine is not thread-safe, and the number of OpenMP threads belongs to a thread, so one thread starts the engine and makes
all calls of it. `step` of an engine whose core's process was killed never returns (read in 0.29 to 0.32), so another thread waits for the
end of these processes. Calls vLLM's public methods alone (add_request, step, abort_request).
"""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import active_children
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

from headtail.engines.load import Load

_JOIN_S = 30.0  # a step in progress ends before the engine is closed


_Message = tuple[str, Any, Any]  # name, prompt (None: abort it), params


class EngineStopped(RuntimeError):
    """The engine broke or its process is dead. No row of it will be answered; another engine may be started."""


class RowRefused(ValueError):
    """The engine does not take this row; others are not touched."""


class EngineThread:
    """The engine that `start` makes. `refusals`: what its `add_request` raises for a bad row. Raises what `start` raises.

    `processes`: those that the engine started; it is dead when one of them ends.
    """

    def __init__(self, start: Callable[[], Any], slots: int, refusals: tuple[type[Exception], ...]) -> None:
        self.load, self.fed = Load(slots), False  # `fed`: whether the caller still has rows to ask, for `load`
        self.error: EngineStopped | None = None
        self._refusals = refusals
        self._numbers = itertools.count()
        self._inbox: queue.SimpleQueue[_Message | None] = queue.SimpleQueue()  # None: the end
        self._futures: dict[str, Future[Any]] = {}
        self._since = 0.0  # end of the step before, or when the engine last had nothing to do
        before, started = set(active_children()), Future[Any]()
        self._thread = Thread(target=self._run, args=(start, started), name="vllm-engine", daemon=True)
        self._thread.start()
        self.engine = started.result()
        self.processes = [process for process in active_children() if process not in before]
        if self.processes:
            Thread(target=self._watch, name="vllm-watch", daemon=True).start()

    def submit(self, prompt: Any, params: Any) -> Future[Any]:
        """A Future of the RequestOutput of a prompt. RowRefused in it: bad row; EngineStopped: the engine is gone."""
        name, future = str(next(self._numbers)), Future[Any]()
        future.add_done_callback(lambda done: self._inbox.put((name, None, None)) if done.cancelled() else None)
        self._futures[name] = future
        self._inbox.put((name, prompt, params))
        if self.error is not None:
            self._stop(self.error)
        return future

    def close(self) -> None:
        """End the thread after the step in progress. It does not end when the core's process is dead: it waits for it for ever."""
        self._inbox.put(None)
        if self.error is None:
            self._thread.join(_JOIN_S)
        self._stop(EngineStopped("the engine was closed"))

    def _run(self, start: Callable[[], Any], started: Future[Any]) -> None:
        try:
            engine = start()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(engine)
        try:
            while self._receive(engine):
                self._step(engine)
        except BaseException as error:
            stopped = EngineStopped(f"vLLM's engine broke: {type(error).__name__}: {error}")
            stopped.__cause__ = error
            self._stop(stopped)

    def _receive(self, engine: Any) -> bool:
        """Take what was put in; wait for something when there is nothing to do. False at the end."""
        idle = not engine.has_unfinished_requests()
        while idle or not self._inbox.empty():
            message = self._inbox.get()
            if message is None:
                return False
            self._take(engine, *message)
            if idle and engine.has_unfinished_requests():
                self._since, idle = time.monotonic(), False
        return True

    def _take(self, engine: Any, name: str, prompt: Any, params: Any) -> None:
        if prompt is None:
            if self._futures.pop(name, None) is not None:
                engine.abort_request([name])
        elif name in self._futures:
            try:
                engine.add_request(name, prompt, params)
            except self._refusals as error:
                self._finish_row(name, RowRefused(str(error)))

    def _step(self, engine: Any) -> None:
        begun, rows = time.monotonic(), min(engine.get_num_unfinished_requests(), self.load.slots)
        outputs = engine.step()
        now = time.monotonic()
        self.load.step(rows, now - self._since, now - begun, self.fed)
        self._since = now
        for output in outputs:
            self._finish_row(output.request_id, output)

    def _finish_row(self, name: str, outcome: Any) -> None:
        if (future := self._futures.pop(name, None)) is not None:
            _set(future, outcome)

    def _watch(self) -> None:
        wait([process.sentinel for process in self.processes])
        self._stop(EngineStopped("vLLM's engine died: a process of it has ended"))

    def _stop(self, error: EngineStopped) -> None:
        """No more rows: those that are under way get `error`."""
        self.error = self.error or error
        while self._futures:
            with suppress(KeyError):  # another thread took the last one
                _set(self._futures.popitem()[1], self.error)


def _set(future: Future[Any], outcome: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
