"""A Triton Inference Server model repository made of a bundle: one Python model with the bundle beside it.

The model opens the bundle in its own process, with ONNX Runtime or TensorRT engines, and answers many
requests in one batch; an ensemble could not, since decoding is a loop and the caches differ in length. The
server's own backends are not used: caches would travel between processes with every token, and its TensorRT
backend opens plugin libraries with dlopen, which registers none that exports `getCreators` as ours does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from string import Template

import ep_export
from ep_export.bundle import ENGINES, MANIFEST, Bundle
from ep_export.data import data_dir
from ep_export.documents import encode
from ep_export.engine_record import RECORD, check_engine_files, engine_directory, read_record
from ep_export.errors import UsageError
from ep_export.links import link_or_copy
from ep_export.package.triton_config import front_config
from ep_export.package.triton_model import BUNDLE
from ep_export.runtime.backends import Runtime
from ep_export.staging import staged
from ep_export.targets import Flavour, Target

__all__ = ["FRONT", "REPOSITORY", "Repository", "write_repository"]

REPOSITORY = "repository.json"
FRONT = "ep_export"
"""Name of the model."""

_MODELS = "models"
_VERSION = "1"
_SIZES = {"slots": "0", "waiting": "64", "capacity": "0"}
"""Of the engine object; whoever serves the repository changes them in config.pbtxt. 0: the engine's own."""
_MODEL_PY = '''"""Made by ep-export; see README.md beside the folder of models."""

from pathlib import Path

from ep_export.package.triton_model import FrontModel

__all__ = ["TritonPythonModel"]


class TritonPythonModel(FrontModel):
    """What Triton's Python backend looks for."""

    bundle = Path(__file__).parent / "bundle"
'''


@dataclass(frozen=True)
class Repository:
    """What was written.

    Attributes:
        path: The directory; `models` in it is the repository.
        models: Names of the models: one.
        runtime: What runs the components: "onnxruntime" or "tensorrt".
        target: Whose engines; None for ONNX Runtime.
        linked: Whether all weights and engines are hard links to the bundle's.
    """

    path: Path
    models: tuple[str, ...]
    runtime: str
    target: str | None
    linked: bool


def write_repository(
    bundle: Bundle,
    out: Path,
    *,
    target: Target | None = None,
    gpu: bool = False,
    overwrite: bool = False,
) -> Repository:
    """Write a model repository, whole or not at all.

    Args:
        bundle: An opened bundle.
        out: Directory to make.
        target: Serve the engines compiled for it; None, or a target without a GPU, serves the ONNX files.
        gpu: Let ONNX Runtime use the server's GPU.
        overwrite: Replace an earlier repository.

    Raises:
        UserError: There are no engines for the target, or `out` may not be replaced.
        UsageError: A GPU for engines, which have one anyway.
    """
    engines = target if target is not None and target.flavour is not Flavour.ONNXRUNTIME else None
    if engines is not None and gpu:
        raise UsageError(f"--gpu is for ONNX Runtime, and {engines.name} has engines", hint="leave it out")
    with staged(out, overwrite=overwrite, marker=REPOSITORY) as aside:
        models = aside / _MODELS
        front = models / FRONT / _VERSION / BUNDLE
        if engines is not None:
            parameters = {"runtime": Runtime.TENSORRT.value, "target": engines.name}
            linked = _link_engines(bundle, engines, front)
        else:
            parameters = {"runtime": Runtime.ONNXRUNTIME.value, "providers": "cuda,cpu" if gpu else "cpu"}
            linked = _link_graphs(bundle, front)
        (models / FRONT / _VERSION / "model.py").write_text(_MODEL_PY, encoding="utf-8")
        on_gpu = gpu or engines is not None
        config = front_config(FRONT, {**parameters, **_SIZES}, gpu=on_gpu)
        (models / FRONT / "config.pbtxt").write_text(config, encoding="utf-8")
        repository = Repository(
            path=out,
            models=(FRONT,),
            runtime=parameters["runtime"],
            target=engines.name if engines is not None else None,
            linked=linked,
        )
        _write_texts(repository, aside, gpu=on_gpu)
    return repository


def _link_graphs(bundle: Bundle, folder: Path) -> bool:
    """Everything that `run` reads: graphs, weights, processor files."""
    left_out = (f"{ENGINES}/", "report/")
    paths = [entry.path for entry in bundle.manifest.files if not entry.path.startswith(left_out)]
    linked = [link_or_copy(bundle.file(path), folder / path) for path in [MANIFEST, *paths]]
    return all(linked)


def _link_engines(bundle: Bundle, target: Target, folder: Path) -> bool:
    """The engines and their plugin, what runs beside them, and the processor files."""
    directory = engine_directory(bundle.path, target.name)
    record = read_record(directory)
    check_engine_files(directory, record, verify=False)  # computed where they are loaded
    names = [RECORD, *(engine.file for engine in record.components.values())]
    if record.plugin is not None:
        names.append(record.plugin.file)
    linked = [link_or_copy(directory / name, folder / ENGINES / target.name / name) for name in names]
    beside = [bundle.manifest.component(name).file for name in record.on_cpu]
    beside += [component.table.file for component in bundle.manifest.components if component.table]
    beside += [MANIFEST, *(e.path for e in bundle.manifest.files if e.path.startswith("processor/"))]
    linked += [link_or_copy(bundle.file(file), folder / file) for file in beside]
    return all(linked)


def _write_texts(repository: Repository, aside: Path, *, gpu: bool) -> None:
    templates = data_dir("engines") / "triton"
    values = {
        "version": ep_export.__version__,
        "front": FRONT,
        "runtime": "ONNX Runtime" if repository.target is None else f"engines for {repository.target}",
        "gpus": "--gpus all " if gpu else "",
        "extra": "cpu,tensorrt" if repository.target else "gpu" if gpu else "cpu",
    }
    for name in ("Dockerfile", "README.md"):
        text = Template((templates / name).read_text(encoding="utf-8")).substitute(values)
        (aside / name).write_text(text, encoding="utf-8")
    (aside / ".dockerignore").write_text(f"{_MODELS}\n", encoding="utf-8")
    files = sorted(file.relative_to(aside).as_posix() for file in aside.rglob("*") if file.is_file())
    about = {"path": ".", "files": files, "made_by": {"ep-export": ep_export.__version__}}
    told = json.dumps({**encode(repository), **about}, indent=2)
    (aside / REPOSITORY).write_text(told + "\n", encoding="utf-8")
