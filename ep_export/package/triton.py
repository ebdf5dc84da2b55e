"""A Triton Inference Server model repository made of a bundle.

With ONNX Runtime: one model a component, and a Python model that builds the prompt, calls them and decodes
(business logic scripting). An ensemble could not: decoding is a loop, and the caches differ in length.

With TensorRT engines: the Python model alone, with the engines in its own process, and beside them ONNX
Runtime for prune components that stayed graphs. Triton's TensorRT backend opens plugin libraries with dlopen,
which registers none that exports `getCreators` as ours does; and caches then stay on the GPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from string import Template

import ep_export
from ep_export.bundle import MANIFEST, Bundle, Component
from ep_export.data import data_dir
from ep_export.documents import encode
from ep_export.engine_record import ENGINES, RECORD, check_engine_files, engine_directory, read_record
from ep_export.errors import UsageError
from ep_export.links import link_or_copy
from ep_export.package.triton_config import component_config, front_config
from ep_export.package.triton_model import BUNDLE
from ep_export.runtime.backends import Runtime
from ep_export.staging import staged
from ep_export.targets import Flavour, Target

__all__ = ["FRONT", "REPOSITORY", "Repository", "write_repository"]

REPOSITORY = "repository.json"
FRONT = "ep_export"
"""Name of the model that people talk to, and prefix of the others."""

_MODELS = "models"
_VERSION = "1"
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
        models: Names of the models.
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
        UserError: There are no engines for the target, the graphs have tensors that Triton's Python backend
            cannot hand on, or `out` may not be replaced.
        UsageError: A GPU for engines, which have one anyway.
    """
    engines = target if target is not None and target.flavour is not Flavour.ONNXRUNTIME else None
    if engines is not None and gpu:
        raise UsageError(f"--gpu is for ONNX Runtime, and {engines.name} has engines", hint="leave it out")
    with staged(out, overwrite=overwrite, marker=REPOSITORY) as aside:
        models = aside / _MODELS
        front = models / FRONT / _VERSION / BUNDLE
        linked = _link_bundle(bundle, front)
        names = [FRONT]
        if engines is not None:
            parameters = {"runtime": Runtime.TENSORRT.value, "target": engines.name}
            linked &= _link_engines(bundle, engines, front)
        else:
            parameters = {"runtime": "bls", "prefix": FRONT}
            for component in bundle.manifest.components:
                name = f"{FRONT}_{component.name}"
                linked &= _component_model(bundle, component, models / name, gpu=gpu)
                names.append(name)
        (models / FRONT / _VERSION / "model.py").write_text(_MODEL_PY, encoding="utf-8")
        (models / FRONT / "config.pbtxt").write_text(front_config(FRONT, parameters), encoding="utf-8")
        repository = Repository(
            path=out,
            models=tuple(names),
            runtime="tensorrt" if engines is not None else "onnxruntime",
            target=engines.name if engines is not None else None,
            linked=linked,
        )
        _write_texts(bundle, repository, aside, gpu=gpu or engines is not None)
    return repository


def _link_bundle(bundle: Bundle, folder: Path) -> bool:
    """The manifest and the processor files: what the Python model reads."""
    paths = [MANIFEST, *(e.path for e in bundle.manifest.files if e.path.startswith("processor/"))]
    linked = [link_or_copy(bundle.file(path), folder / path) for path in paths]
    return all(linked)


def _link_engines(bundle: Bundle, target: Target, folder: Path) -> bool:
    """The engines and their plugin, and the graphs that run beside them."""
    directory = engine_directory(bundle.path, target.name)
    record = read_record(directory)
    check_engine_files(directory, record, verify=False)  # computed where they are loaded
    names = [RECORD, *(engine.file for engine in record.components.values())]
    if record.plugin is not None:
        names.append(record.plugin.file)
    linked = [link_or_copy(directory / name, folder / ENGINES / target.name / name) for name in names]
    beside = [bundle.manifest.component(name).file for name in record.on_cpu]
    linked += [link_or_copy(bundle.file(file), folder / file) for file in beside]
    return all(linked)


def _component_model(bundle: Bundle, component: Component, folder: Path, *, gpu: bool) -> bool:
    """One ONNX file with the shards it refers to, which ONNX Runtime wants beside it."""
    version = folder / _VERSION
    linked = link_or_copy(bundle.file(component.file), version / "model.onnx")
    for location in _shards(bundle, component):
        linked &= link_or_copy(bundle.file(location), version / location)
    config = component_config(folder.name, component, gpu=gpu)
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    return linked


def _shards(bundle: Bundle, component: Component) -> list[str]:
    """Files that a component's weights lie in, relative to it."""
    import onnx_ir as ir

    model = ir.load(bundle.file(component.file))
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sorted({str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)})


def _write_texts(bundle: Bundle, repository: Repository, aside: Path, *, gpu: bool) -> None:
    templates = data_dir("engines") / "triton"
    needs = "GPU" if gpu else "CPU"
    values = {
        "version": ep_export.__version__,
        "front": FRONT,
        "engines": repository.target or "",
        "models": "\n".join(f"    models/{name}/" for name in repository.models),
        "gpus": "--gpus all " if gpu else "",
        "needs": needs,
        "opset": str(bundle.manifest.opset),
    }
    for name in ("Dockerfile", f"README.{repository.runtime}.md"):
        text = Template((templates / name).read_text(encoding="utf-8")).substitute(values)
        file = "README.md" if name.startswith("README") else name
        (aside / file).write_text(text, encoding="utf-8")
    (aside / ".dockerignore").write_text(f"{_MODELS}\n", encoding="utf-8")
    files = sorted(file.relative_to(aside).as_posix() for file in aside.rglob("*") if file.is_file())
    about = {"path": ".", "files": files, "made_by": {"ep-export": ep_export.__version__}}
    told = json.dumps({**encode(repository), **about}, indent=2)
    (aside / REPOSITORY).write_text(told + "\n", encoding="utf-8")
