"""ONNX Runtime's execution providers by short names, and what of a graph each of them got.

ONNX Runtime falls back to the CPU on its own. Here it may only where "cpu" is asked for too, and then says
how many nodes went there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ep_export.errors import UsageError, UserError, near_matches

__all__ = [
    "CPU",
    "PROVIDERS",
    "Provider",
    "device_of",
    "node_counts",
    "prepare_providers",
    "short_name",
]

CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Provider:
    """An execution provider.

    Attributes:
        name: ONNX Runtime's.
        needs: What brings it, for a hint.
        device: Where its tensors lie, by ONNX Runtime's name for `bind_output`.
        plugin: Package that ONNX Runtime loads it from, where it is not built in.
    """

    name: str
    needs: str
    device: str = "cpu"
    plugin: str | None = None


# MIGraphX and OpenVINO may have memory of their own; nobody has tried, so their outputs go through the host.
PROVIDERS: Mapping[str, Provider] = {
    "cpu": Provider(CPU, "every build of ONNX Runtime has it"),
    "cuda": Provider(
        "CUDAExecutionProvider", "pip uninstall onnxruntime, then pip install 'ep-export[gpu]'", "cuda"
    ),
    "tensorrt": Provider(
        "TensorrtExecutionProvider", "pip install onnxruntime-gpu and NVIDIA's TensorRT", "cuda"
    ),
    "tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "pip install onnxruntime-ep-nv-tensorrt-rtx on a machine with an RTX GPU and its driver",
        "cuda",
        "onnxruntime_ep_nv_tensorrt_rtx",
    ),
    "migraphx": Provider("MIGraphXExecutionProvider", "AMD's build of ONNX Runtime for ROCm"),
    "openvino": Provider("OpenVINOExecutionProvider", "pip install onnxruntime-openvino"),
}


def prepare_providers(names: Sequence[str], options: Any) -> list[str]:
    """Make the session options ask for providers.

    Args:
        names: Short names or ONNX Runtime's own, in order of preference.
        options: `SessionOptions`; plugin devices and the ban of a silent CPU are written into it.

    Returns:
        ONNX Runtime's names for `InferenceSession`; empty where the options already hold the devices.

    Raises:
        UsageError: No provider of that name is known.
        UserError: It is not available here.
    """
    import onnxruntime

    wanted = list(dict.fromkeys(map(_find, names)))  # one may be given by both of its names
    chosen = [provider.name for provider in wanted]
    if CPU not in chosen:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if chosen != [CPU]:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    builtin = set(onnxruntime.get_available_providers())
    missing = [provider for provider in wanted if provider.name not in builtin]
    if not missing:
        return chosen
    # A session takes either names or devices, and the devices of one provider a call.
    for provider in wanted:
        options.add_provider_for_devices(_devices(provider, builtin), {})
    return []


def device_of(names: Sequence[str]) -> str:
    """Where tensors lie between runs: in the memory of the first provider, the one that is to do the work.

    Args:
        names: As for `prepare_providers`; at least one.
    """
    return _find(names[0]).device


def node_counts(session: Any) -> dict[str, int]:
    """How many nodes of a session's graph each provider got; empty where ONNX Runtime does not tell."""
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    if tell is None:
        return {}
    counts: Counter[str] = Counter()
    for subgraph in tell():
        counts[subgraph.ep_name] += len(subgraph.get_nodes())
    return dict(counts)


def short_name(name: str) -> str:
    """The short name of one of ONNX Runtime's, or itself."""
    return next((short for short, provider in PROVIDERS.items() if provider.name == name), name)


def _find(name: str) -> Provider:
    import onnxruntime

    if name in PROVIDERS:
        return PROVIDERS[name]
    known = {provider.name: provider for provider in PROVIDERS.values()}
    if name in known:
        return known[name]
    available = onnxruntime.get_available_providers()
    if name in available:
        return Provider(name, "")
    raise UsageError(
        f"ONNX Runtime here has no {name}, and no provider of that name is known",
        hint=near_matches(name, [*PROVIDERS, *available]),
    )


def _available() -> list[str]:
    import onnxruntime

    return [short_name(name) for name in onnxruntime.get_available_providers()]


def _devices(provider: Provider, builtin: set[str]) -> list[Any]:
    """The devices a provider drives.

    Raises:
        UserError: It has none here, or its library does not load.
    """
    import onnxruntime

    reason = "this build of ONNX Runtime does not have it"
    if provider.plugin is not None and provider.name not in builtin:
        reason = _register(provider)
    devices = [
        device for device in getattr(onnxruntime, "get_ep_devices", list)() if device.ep_name == provider.name
    ]
    if not devices:
        _refuse_doubled()
        raise UserError(
            f"ONNX Runtime here has no {provider.name}: {reason or 'it drives no device of this machine'}",
            hint=f"{provider.needs}; available here: {', '.join(_available())}",
        )
    return devices[:1]


def _refuse_doubled() -> None:
    """Stop where two builds of ONNX Runtime were installed over each other: the later one's files are there.

    Raises:
        UserError: They were.
    """
    builds = sorted(set(importlib.metadata.packages_distributions().get("onnxruntime", ())))
    if len(builds) > 1:
        raise UserError(
            f"{' and '.join(builds)} are installed over each other",
            hint=f"pip uninstall -y {' '.join(builds)}, then install the one that is meant",
        )


def _register(provider: Provider) -> str:
    """Load a provider's library; empty, or why it cannot be loaded."""
    import onnxruntime

    assert provider.plugin is not None  # noqa: S101 - asked only for those
    try:
        package = importlib.import_module(provider.plugin)
    except ImportError:
        return f"{provider.plugin} is not installed"
    try:
        onnxruntime.register_execution_provider_library(provider.name, package.get_library_path())
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no base class
        text = str(error).strip().split("\n", 1)[0]
        return "" if "already registered" in text else text
    return ""
