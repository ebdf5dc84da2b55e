"""A stand-in for trtexec: it records its arguments and writes a file where an engine would be.

It refuses what the real one refuses, as far as samples/common/sampleOptions.cpp and sampleEngines.cpp of
NVIDIA/TensorRT 10 and 11 say it, and one thing more: an input without shapes, with which the real one builds
an engine for a single token and only warns. Parsing graphs is beyond it: STANDIN_GRAPHS says what they take.
"""

import json
import os
import sys
import time
from pathlib import Path

HELP = """\
  --onnx=<file> --saveEngine=<file> --minShapes=spec --optShapes=spec --maxShapes=spec --profile
  --memPoolSize=poolspec --noTF32 --stronglyTyped --timingCacheFile=<file> --device=N
  --staticPlugins --dynamicPlugins --skipInference --help
"""
KNOWN = {word.partition("=")[0] for word in HELP.split()}
POOLS = {"workspace", "dlaSRAM", "dlaLocalDRAM", "dlaGlobalDRAM", "tacticSharedMem"}
SHAPES = ("--minShapes", "--optShapes", "--maxShapes")


class RefusedError(Exception):
    """What the real one says."""


def read_profiles(options: list) -> list:
    """Shapes by option and input, a dictionary a profile."""
    shapes = [option for option, _ in options if option in SHAPES]
    profiles: dict = {}
    for place, (option, value) in enumerate(options):
        if option != "--profile":
            continue
        index, given = int(value), {}
        for name, spec in options[place + 1 : place + 1 + len(SHAPES)]:  # they stand right behind it
            if name not in SHAPES or name in given:
                break
            given[name] = read_shapes(spec)
            shapes.remove(name)
        if index in profiles:
            raise RefusedError("Optimization profile index cannot be the same.")
        profiles[index] = given
    if not profiles and len(shapes) == len(set(shapes)):
        return [{name: read_shapes(spec) for name, spec in options if name in SHAPES}] if shapes else []
    if shapes:
        raise RefusedError("Multiple --minShapes/--optShapes/--maxShapes without --profile are not allowed. ")
    for index in range(max(profiles) + 1):
        if not profiles.get(index):
            raise RefusedError(f"Found invalid or missing shape spec at profile index {index}. ")
    return [profiles[index] for index in sorted(profiles)]


def read_shapes(spec: str) -> dict:
    """Input name -> shape."""
    pairs = (pair.rpartition(":")[::2] for pair in spec.split(","))
    return {name: [int(axis) for axis in shape.split("x")] for name, shape in pairs}


def check_options(options: list) -> None:
    """Names, pools and libraries."""
    for option, value in options:
        if option not in KNOWN:
            raise RefusedError(f"Unknown option: {option} {value}")
        if option == "--memPoolSize" and {pool.split(":")[0] for pool in value.split(",")} - POOLS:
            raise RefusedError(f"Unknown memory pool: {value}")
        if option == "--dynamicPlugins" and not Path(value).is_file():
            raise RefusedError(f"Could not load library {value}")
    if not dict(options).get("--onnx"):
        raise RefusedError("Model missing or format not recognized")


def check_profiles(inputs: dict, profiles: list) -> None:
    """Profiles against the graph's inputs, whose varying axes are None."""
    dynamic = {name: shape for name, shape in inputs.items() if None in shape}
    if profiles and not dynamic:
        raise RefusedError("Static model does not take explicit shapes")
    for profile in profiles or [{}]:
        for name in {name for shapes in profile.values() for name in shapes} - set(inputs):
            raise RefusedError(f'Cannot find input tensor with name "{name}" in the network inputs!')
        for name, axes in dynamic.items():
            given = [profile[option][name] for option in SHAPES if name in profile.get(option, {})]
            if not given:
                raise RefusedError(f"Dynamic dimensions required for input: {name}")
            low, middle, high = (profile.get(option, {}).get(name, given[0]) for option in SHAPES)
            if not len(low) == len(middle) == len(high) == len(axes) or not all(
                0 <= a <= b <= c and axis in {None, a} and axis in {None, c}
                for axis, a, b, c in zip(axes, low, middle, high)  # noqa: B905 - their lengths are equal
            ):
                raise RefusedError("Required optimization profile is invalid")


def build(options: list) -> None:
    """Write the engine, or fail in the way that a test asks for."""
    once, ask = dict(options), os.environ.get
    onnx, engine = Path(once["--onnx"]), once.get("--saveEngine")
    graph = json.loads(Path(os.environ["STANDIN_GRAPHS"]).read_text()).get(onnx.name)
    if graph is None or not onnx.is_file():
        raise RefusedError(f"Failed to parse onnx file {onnx}")
    if graph["needs_plugin"] and "--dynamicPlugins" not in once:
        raise RefusedError("Plugin not found, are the plugin name, version, and namespace correct?")
    if graph["open_caches"]:
        raise RefusedError("KV cache tensor must have a static sequence length dimension")
    check_profiles(graph["inputs"], read_profiles(options))
    name = onnx.name.removesuffix(".onnx").removesuffix(".plugin").removesuffix(".settled")
    if name == ask("STANDIN_SLOW"):
        Path(engine).write_text("half an engine")
        time.sleep(60)
    if name == ask("STANDIN_FAIL"):
        raise RefusedError(
            "Error[2]: [virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory"
        )
    if engine and name != ask("STANDIN_EMPTY"):
        Path(engine).write_text(f"a stand-in for the engine of {name}")


def main(arguments: list) -> int:
    """As trtexec."""
    print(f"&&&& RUNNING TensorRT.trtexec [TensorRT v{os.environ['STANDIN_TENSORRT']}] [b30] # trtexec")
    if "--help" in arguments:
        print(HELP)
        return 0
    with Path(os.environ["STANDIN_CALLS"]).open("a") as calls:
        calls.write("\x1f".join(arguments) + "\n")
    options = [argument.partition("=")[::2] for argument in arguments]
    try:
        check_options(options)
        build(options)
    except RefusedError as refused:
        print("[E]", refused)
        print("&&&& FAILED TensorRT.trtexec")
        return 1
    print("&&&& PASSED TensorRT.trtexec")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
