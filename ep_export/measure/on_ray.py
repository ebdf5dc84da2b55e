"""Measuring on a Ray cluster: one actor a worker, each with the model; a free one gets the next question.

Every machine has the same ep-export, and sees the model and the pictures under the same paths. What a lost
machine or a killed worker had is measured again elsewhere, and a new worker starts where there is room.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ep_export.errors import UserError, reason
from ep_export.measure.bench import Setting, gpus_of
from ep_export.measure.executors import Job, Outcome, Unit, open_bench, outcome_of
from ep_export.measure.provenance import tool_versions

__all__ = ["OnRay"]

_MOST_LOSSES = 3
"""Workers that may die on one unit, or one after the other before they are ready."""

_PATIENCE_S = 600.0
"""How long a cluster may offer no worker at all; starting one loads the model."""

_REACHED_WITHIN_S = 10.0
"""How long the machine of an address may take to answer."""


@dataclass(frozen=True)
class OnRay:
    """Workers of a Ray cluster.

    Attributes:
        address: "auto" for the cluster of this machine, "HOST:PORT", "ray://HOST:PORT", or "local" to start
            one here.
        workers: So many; None for as many as the cluster has room for.
    """

    address: str
    workers: int | None = None

    def run(self, job: Job, units: Sequence[Unit]) -> Generator[tuple[Unit, Outcome], None, None]:
        """See `Executor`."""
        with _connected(self.address) as ray:
            crew = _Crew(ray, job, room=_room(ray, job.setting))
            try:
                yield from crew.measure(units, workers=self.workers)
            finally:
                crew.dismiss()


@dataclass(frozen=True)
class _Room:
    """What one worker takes, and how many of them the cluster's machines hold."""

    threads: int
    gpus: int
    workers: int


class _Worker:
    """What runs on a machine of the cluster."""

    def __init__(self, path: Path, setting: Setting, threads: int, versions: dict[str, str]) -> None:
        here = tool_versions()
        if here != versions:
            different = ", ".join(f"{name} {here[name]}" for name in here if here[name] != versions.get(name))
            self._bench: Any = UserError(
                f"machine {os.uname().nodename} has {different}, other versions than this one",
                hint="install the same versions on every machine: other ones give other numbers",
            )
        else:
            self._bench = open_bench(path, setting, threads)

    def ready(self) -> UserError | None:
        """Why it cannot work, if so."""
        return self._bench if isinstance(self._bench, UserError) else None

    def outcome(self, unit: Unit) -> Outcome | UserError:
        """Measure a unit. What is wrong with the machine and not with the unit is an error."""
        path = unit.question.picture.path
        if not path.is_file():
            return UserError(
                f"machine {os.uname().nodename} does not see {path}",
                hint="put the pictures where all machines see them under the same path",
            )
        return outcome_of(self._bench, unit)


class _Crew:
    """The workers of one job, and what each is doing."""

    def __init__(self, ray: Any, job: Job, *, room: _Room) -> None:
        self._ray = ray
        self._job = job
        self._room = room
        self._busy: dict[Any, tuple[Any, Unit | None]] = {}  # what is waited for -> worker, its unit
        self._idle: list[Any] = []
        self._left: deque[Unit] = deque()
        self._losses: Counter[str] = Counter()
        self._stillborn = 0

    def measure(self, units: Sequence[Unit], *, workers: int | None) -> Iterator[tuple[Unit, Outcome]]:
        """Every unit with its outcome, as they come."""
        self._left.extend(units)
        for _ in range(min(workers or self._room.workers, len(units))):
            self._hire()
        unfinished = len(units)
        while unfinished:
            reference = self._next()
            worker, unit = self._busy.pop(reference)
            try:
                said = self._ray.get(reference)
            except self._ray.exceptions.RayActorError as error:
                self._replace(unit, error)
                continue
            if isinstance(said, UserError):
                raise said
            self._idle.append(worker)
            if unit is not None:
                unfinished -= 1
                yield unit, said
            else:
                self._stillborn = 0
            self._give_out()

    def dismiss(self) -> None:
        """Every worker ends."""
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            self._ray.kill(worker)

    def _hire(self) -> None:
        job, room = self._job, self._room
        kind = self._ray.remote(num_cpus=room.threads, num_gpus=room.gpus)(_Worker)
        worker = kind.remote(job.checkpoint.path, job.setting, room.threads, tool_versions())
        self._busy[worker.ready.remote()] = worker, None

    def _next(self) -> Any:
        """The next thing that is done; a cluster without any worker is not waited for for ever."""
        while True:
            alone = all(unit is None for _, unit in self._busy.values())
            done, _ = self._ray.wait(list(self._busy), timeout=_PATIENCE_S if alone else None)
            if done:
                return done[0]
            if alone:
                raise UserError(
                    f"the Ray cluster has offered no worker for {_PATIENCE_S / 60:.0f} minutes",
                    hint="see `ray status`; the same command goes on with what was measured",
                )

    def _give_out(self) -> None:
        while self._idle and self._left:
            worker, unit = self._idle.pop(), self._left.popleft()
            self._busy[worker.outcome.remote(unit)] = worker, unit

    def _replace(self, unit: Unit | None, error: Exception) -> None:
        """A worker is gone: its unit comes next, a new one starts where there is room."""
        if unit is None:
            self._stillborn += 1
            losses, what = self._stillborn, "before they had loaded the model"
        else:
            self._losses[unit.question.key] += 1
            losses, what = self._losses[unit.question.key], f"on {unit.question.name!r}"
            self._left.appendleft(unit)
        if losses == _MOST_LOSSES:
            raise UserError(
                f"{losses} workers of the Ray cluster died {what}: {reason(error)}",
                hint="is ep-export installed on every machine, and is their memory enough for the model?",
            )
        self._hire()
        self._give_out()


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, as somebody set it up in this process or else joined for the length of the block."""
    try:
        import ray
    except ImportError as error:
        raise UserError("Ray is not installed", hint="pip install 'ep-export[ray]'") from error

    if ray.is_initialized():
        yield ray
        return
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at {address}: {reason(error)}",
            hint="start one with `ray start --head`, then give --ray auto on that machine",
        ) from error
    try:
        if main:
            signal.signal(signal.SIGTERM, handler)  # Ray's own would end this process without clean-up
        yield ray
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Ask early whether anybody listens: Ray itself tries for minutes.

    Raises:
        OSError: Nobody does.
        ValueError: It is no HOST:PORT.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHED_WITHIN_S).close()


def _room(ray: Any, setting: Setting) -> _Room:
    """How many workers the machines hold.

    As many threads each as this process would use, so that numbers are the same; or the largest machine's.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = gpus_of(setting.device)
    if gpus:
        workers = sum(int(machine.get("GPU", 0)) // gpus for machine in machines)
        threads = 1
    else:
        cpus = [int(machine.get("CPU", 0)) for machine in machines]
        threads = max(1, min(torch.get_num_threads(), max(cpus, default=0)))
        workers = sum(count // threads for count in cpus)
    if not workers:
        wanted = f"{gpus} GPUs" if gpus else "a CPU"
        raise UserError(
            f"no machine of the Ray cluster has {wanted} for device {setting.device}",
            hint="see `ray status`, or give another --device",
        )
    return _Room(threads, gpus, workers)
