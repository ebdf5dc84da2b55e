"""The engines of a bundle as a backend: found, checked against bundle, software and GPU, then opened.

Prune components that stayed ONNX files run beside them with ONNX Runtime on the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ep_export.bundle import Bundle, hash_file
from ep_export.engine_record import (
    EngineRecord,
    check_engine,
    check_engine_files,
    compiled_targets,
    engine_directory,
    engine_of,
    read_record,
)
from ep_export.errors import UserError, as_user_error, near_matches
from ep_export.runtime.base import Runner
from ep_export.runtime.device import CudaDevice, Device, DeviceMemory
from ep_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ep_export.runtime.tensorrt_runner import Scratch, TensorRtRunner, open_engine
from ep_export.targets import Flavour

__all__ = ["EngineBackend"]

_MODULES = {Flavour.TENSORRT: "tensorrt", Flavour.TENSORRT_RTX: "tensorrt_rtx"}
_SOURCES = {
    Flavour.TENSORRT: "install NVIDIA's tensorrt package (a Jetson has it from JetPack)",
    Flavour.TENSORRT_RTX: "pip install 'ep-export[rtx]'",
}
_INSTEAD = "the bundle runs without TensorRT too: leave out --runtime, or give --runtime onnxruntime"


class EngineBackend:
    """Opens components as engines; a `RunnerFactory`.

    The GPU's memory is given back with the last runner, and asked for again by the next.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: str | None = None,
        *,
        verify: bool = True,
        module: Callable[[Flavour], Any] | None = None,
        device: Callable[[], Device] = CudaDevice,
    ) -> None:
        """Find the engines and refuse what is not for this bundle, this software or this GPU.

        Args:
            bundle: The bundle.
            target: Whose engines; may be left out where there is one.
            verify: Also compute the engines' checksums (sizes are always checked).
            module: Imports a flavour's Python package.
            device: Opens the GPU.

        Raises:
            UserError: No engines, several and no target, TensorRT or a GPU is missing, the engines are for
                something else or were changed, or their plugin is missing.
        """
        self._bundle = bundle
        self._directory = engine_directory(bundle.path, _one(bundle, target))
        self._record = read_record(self._directory)
        self._module = (module or _module)(self._record.flavour)
        version = str(self._module.__version__)
        # first what needs no GPU to be told, then the GPU
        check_engine(self._record, bundle, flavour=self._record.flavour, version=version, sm=None)
        self._device = device
        opened = device()
        self._memory = DeviceMemory(opened)
        try:
            check_engine(self._record, bundle, flavour=self._record.flavour, version=version, sm=opened.sm)
            check_engine_files(self._directory, self._record, verify=verify)
            if self._record.plugin:
                _load_plugin(self._module, self._record, self._directory)
        except BaseException:
            self._memory.close()
            raise
        self._scratch = Scratch(self._memory)
        self._runners, self._gone = 0, False

    def __call__(self, file: Path) -> Runner:
        """Open the engine of a component's file, or the file itself where the record says so.

        Raises:
            UserError: No such component, or TensorRT or ONNX Runtime refuses it.
        """
        component = next(c for c in self._bundle.manifest.components if c.file == file.name)
        engine = engine_of(self._record, self._bundle, component)
        if engine is None:
            return OnnxRuntimeRunner(file)
        if self._gone and not self._runners:
            self._memory = DeviceMemory(self._device())
            self._scratch = Scratch(self._memory)
            self._gone = False
        opened = open_engine(
            self._module,
            self._directory / engine.file,
            name=component.name,
            profiles=engine.profiles,
            limits=self._record.limits,
        )
        runner = TensorRtRunner(opened, self._memory, self._scratch, self._closed)
        self._runners += 1
        return runner

    def _closed(self) -> None:
        self._runners -= 1
        if not self._runners:
            self._scratch.close()
            self._memory.close()
            self._gone = True


def _one(bundle: Bundle, target: str | None) -> str:
    targets = compiled_targets(bundle.path)
    compile_hint = f"compile some: ep-export compile {bundle.path} --target T; {_INSTEAD}"
    if not targets:
        raise UserError(f"bundle {bundle.path} has no engines", hint=compile_hint)
    if target is None and len(targets) > 1:
        raise UserError(
            f"bundle {bundle.path} has engines for {len(targets)} targets",
            hint=f"add --target {'|'.join(targets)}",
        )
    name = target or targets[0]
    if name not in targets:
        raise UserError(
            f"bundle {bundle.path} has no engines for {name!r}",
            hint=f"{near_matches(name, targets)} Or: ep-export compile {bundle.path} --target {name}",
        )
    return name


def _module(flavour: Flavour) -> Any:
    name = _MODULES.get(flavour)
    if name is None:
        raise UserError(f"engines of {flavour.value} are no engines", hint="give --runtime onnxruntime")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"these engines need {flavour.value}, which is not installed: {error}",
            hint=f"{_SOURCES[flavour]}; {_INSTEAD}",
        ) from error


def _load_plugin(module: Any, record: EngineRecord, directory: Path) -> None:
    """Register the plugin before an engine that holds it is opened; TensorRT-RTX would abort the process.

    It is code that this process is to run, so its checksum is computed whatever else may be skipped.
    """
    assert record.plugin is not None  # noqa: S101 - called only then
    if record.flavour is not Flavour.TENSORRT:
        raise UserError(
            f"engines for {record.target} say they hold a plugin, which {record.flavour.value} has none of",
            hint="compile again with `ep-export compile`",
        )
    library = directory / record.plugin.file
    if hash_file(library) != record.plugin.sha256:
        raise UserError(
            f"plugin {library} was changed: its SHA-256 differs from its record's",
            hint="do not run it; build it again with `ep-export plugin build`, and compile again",
        )
    with as_user_error(f"plugin {library} cannot be loaded", hint="build it again: ep-export plugin build"):
        module.get_plugin_registry().load_library(str(library))
