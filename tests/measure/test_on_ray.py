"""The same questions on a Ray cluster of two nodes on this machine, one of which dies: the same numbers.

What needs Ray is skipped where it is not installed; `make test-ray` installs it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import ep_export
from measuring import question_about
from tiny import make_tiny, tiny_picture

from ep_export.checkpoint import Checkpoint, open_checkpoint
from ep_export.errors import UserError
from ep_export.measure import on_ray
from ep_export.measure.bench import Setting, check_device, gpus_of
from ep_export.measure.executors import Job, Processes, Unit
from ep_export.measure.on_ray import OnRay
from ep_export.measure.provenance import tool_versions
from ep_export.measure.ways import one_cut
from ep_export.methods import find_methods
from ep_export.policy import Keep
from ep_export.sweep import SweepOptions, sweep

RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not RAY, reason="Ray is not installed: make test-ray")

SETTING = Setting(
    (one_cut(1, "norm-lowest", Keep(ratio=0.5)),), draws=2, seed=0, max_new_tokens=2, device="cpu"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return open_checkpoint(str(make_tiny(path, layers=4, heads=4, vision_depth=1, vision_full_blocks=(0,))))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        tiny_picture(112, 84, seed=number).save(folder / f"{number:02}.png")
    (folder / "zz-broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one CPU each."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # it would call home
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = {"num_cpus": 1, "object_store_memory": 80 << 20}
    running = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    try:
        running.add_node(**options)
        running.wait_for_nodes()
        yield running
    finally:
        ray.shutdown()
        running.shutdown()


def lose_machine(cluster: Any) -> None:
    """The node that is not the head, and every process that runs on it, are gone at once."""
    (node,) = cluster.worker_nodes
    (raylet,) = node.all_processes["raylet"]
    children = Path(f"/proc/{raylet.process.pid}/task/{raylet.process.pid}/children").read_text().split()
    cluster.remove_node(node, allow_graceful=False)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGKILL)


# Ray leaves sockets to the garbage collector, and says on import what will change in it.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@needs_ray
def test_a_sweep_on_two_machines_one_of_which_is_lost_equals_one_in_two_processes(
    checkpoint, pictures, cluster, tmp_path, monkeypatch
) -> None:
    lost = []
    replace_worker = on_ray._Crew._replace
    monkeypatch.setattr(
        on_ray._Crew, "_replace", lambda crew, *worker: (lost.append(worker), replace_worker(crew, *worker))
    )
    crews = []
    measure = on_ray._Crew.measure
    monkeypatch.setattr(
        on_ray._Crew, "measure", lambda crew, *job, **how: (crews.append(crew), measure(crew, *job, **how))[1]
    )
    options = SweepOptions(
        keeps=(0.5,), methods=find_methods(["random", "fastv"]), timed_prompts=0, gallery_pictures=0
    )
    done = []

    def progress(stage: str, number: int, total: int) -> None:
        if stage == "asking":
            done.append((number, total))
            # once both machines work: one has just answered, the other is at it
            if cluster.worker_nodes and number < total - 1 and any(unit for _, unit in busy()):
                lose_machine(cluster)

    def busy() -> list[Any]:
        return list(crews[-1]._busy.values()) if crews else []

    def ran_by(executor: Any, name: str, **told: Any) -> Any:
        record = sweep(
            checkpoint,
            pictures,
            None,
            out=tmp_path / name,
            options=replace(options, executor=executor),
            **told,
        )
        return replace(record, seconds=0.0, date="")

    together = ran_by(OnRay(cluster.address), "ray", progress=progress)
    assert len(lost) == 1
    assert together == ran_by(Processes(2), "processes")
    assert together.dataset.questions == 12
    assert len(together.dataset.skipped) == 1
    assert done == [(number, 13) for number in range(14)]


def test_a_machine_with_other_versions_or_without_the_pictures_says_so(checkpoint, pictures) -> None:
    other = on_ray._Worker(checkpoint.path, SETTING, 1, {**tool_versions(), "torch": "0.1"})
    assert "has torch" in str(other.ready())
    assert "same versions on every machine" in other.ready().hint
    question = question_about(pictures / "00.png", "What?")
    gone = replace(question, picture=replace(question.picture, path=pictures / "gone.png"))
    worker = on_ray._Worker(checkpoint.path, SETTING, 1, tool_versions())
    assert worker.ready() is None
    said = worker.outcome(Unit(gone, entropies=False))
    assert isinstance(said, UserError)
    assert "does not see" in str(said)
    assert worker.outcome(Unit(question, entropies=True)).key == question.key


def test_a_model_that_a_machine_cannot_open_is_told_by_its_first_word(checkpoint, tmp_path) -> None:
    worker = on_ray._Worker(tmp_path / "gone", SETTING, 1, tool_versions())
    assert "gone" in str(worker.ready())


class DyingRay:
    """Ray as far as `_Crew` uses it; its workers die in one of their methods."""

    exceptions = SimpleNamespace(RayActorError=ConnectionError)

    def __init__(self, dies_in: str) -> None:
        self._dies_in = dies_in
        self.hired = 0
        self.alive = 0

    def remote(self, **_: Any) -> Any:
        return lambda _: SimpleNamespace(remote=self._hire)

    def _hire(self, *_: Any) -> Any:
        self.hired += 1
        self.alive += 1
        calls = {
            name: SimpleNamespace(remote=lambda *_, name=name: (name, object()))
            for name in ("ready", "outcome")
        }
        return SimpleNamespace(**calls)

    def wait(self, references: list[Any], **_: Any) -> Any:
        return references[:1], references[1:]

    def get(self, reference: Any) -> None:
        if reference[0] == self._dies_in:
            self.alive -= 1
            raise ConnectionError("the actor died")

    def kill(self, _worker: Any) -> None:
        self.alive -= 1


@pytest.mark.parametrize(
    ("dies_in", "said"), [("ready", "before they had loaded the model"), ("outcome", "on '00.png: What")]
)
def test_workers_that_die_again_and_again_end_the_run(checkpoint, pictures, dies_in, said) -> None:
    units = [Unit(question_about(pictures / "00.png", "What?"), entropies=False)]
    ray = DyingRay(dies_in)
    crew = on_ray._Crew(ray, Job(checkpoint, SETTING), room=on_ray._Room(threads=1, gpus=0, workers=2))
    with pytest.raises(UserError, match=f"3 workers of the Ray cluster died {re.escape(said)}"):
        list(crew.measure(units, workers=None))
    crew.dismiss()
    assert (ray.hired, ray.alive) == (3, 0)


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense:port"])
def test_an_address_where_nobody_answers_is_told_in_one_line(checkpoint, pictures, address) -> None:
    units = [Unit(question_about(pictures / "00.png", "What?"), entropies=False)]
    with pytest.raises(UserError, match=f"no Ray cluster answers at {address}") as caught:
        list(OnRay(address).run(Job(checkpoint, SETTING), units))
    assert "ray start --head" in caught.value.hint


def test_without_ray_the_option_says_what_to_install(checkpoint, pictures, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    verb = ("calibrate", "--model", str(checkpoint.path), "--images", str(pictures), "--keep", "0.5")
    result = ep_export(*verb, "--ray", "auto", "--out", str(tmp_path / "record.json"))
    assert (result.code, result.err.splitlines()[-1]) == (1, "hint: pip install 'ep-export[ray]'")


@pytest.mark.parametrize(
    ("device", "gpus"), [("cpu", 0), ("cuda", 1), ("cuda:1", 1), ("auto", 1), ("auto:4", 4)]
)
def test_a_worker_gets_the_gpus_that_its_device_needs(device, gpus) -> None:
    assert gpus_of(device) == gpus


@pytest.mark.parametrize("device", ["auto:0", "auto:two"])
def test_a_device_without_a_number_of_gpus_is_refused(device) -> None:
    with pytest.raises(UserError, match="names no number of GPUs"):
        check_device(device)
