"""Decode and prefill against onnxruntime-genai's own graphs of the same weights, float32 and int4.

A LLaVA of random weights is exported for ONNX Runtime (two spans, a cut at layer 2); its language model alone
is written by onnxruntime-genai's builder. All sides run in ONNX Runtime on the same threads, in turns, each
with its inputs and outputs bound and caches that input and output share. In 4 bits genai's graph stands there
twice: as its builder writes it by default, by which ours is judged, and laid out as ours. Prints medians with
quartiles and ratios taken turn by turn. Exits 1 when a decode step with full caches takes longer than
genai's, or one with kept tokens longer than one with all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bundles import export_tiny
from tiny_llava import make_tiny_llava

from ep_export.bundle import Bundle, Dialect
from ep_export.checkpoint import open_checkpoint
from ep_export.families.base import PromptInputs
from ep_export.numerics import WeightKind, Weights
from ep_export.planning import kept_tokens
from ep_export.policy import Cut, Keep, Schedule
from ep_export.runtime import Components, Continuation, OnnxRuntimeOptions, OnnxRuntimeRunner, Prefill
from ep_export.runtime.components import open_component
from ep_export.runtime.prefill import Timer, run_prefill
from ep_export.weights.packing import nearest

OWN = "genai"
PRECISIONS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "fp32": {OWN: ()},
    "int4": {
        OWN: (),  # blocks of 32, lm_head in 4 bits
        "genai, laid out as ours": ("block_size=128", "matmul_mixed_precision=last_matmul:int8"),
    },
}
"""Graphs of genai by what they are called, and what its builder is told; ours is judged by the first."""

CUT = 2
_BURST = 8
# Both sides compute the same products; what is left is measuring noise.
NOISE = 1.02


@dataclass(frozen=True)
class Ours:
    """A bundle opened without its vision encoder, and what it is asked."""

    components: Components
    prompt: PromptInputs
    cuts: tuple[Schedule, tuple[int, ...]]

    def prefill(self, *, pruned: bool) -> Prefill:
        return run_prefill(self.components, self.prompt, [], self.cuts if pruned else None, Timer())


class Genai:
    """A graph of onnxruntime-genai's builder, with caches of fixed capacity that a run writes into."""

    def __init__(
        self, folder: Path, *, layers: int, capacity: int, shape: tuple[int, int], threads: int
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
        heads, width = shape
        self._caches = {
            f"{i}.{part}": onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros((1, heads, capacity, width), np.float32)
            )
            for i in range(layers)
            for part in ("key", "value")
        }
        self._inputs = {each.name for each in self._session.get_inputs()}

    def run(self, ids: np.ndarray, past: int) -> np.ndarray:
        """[1, T] behind `past` filled rows -> logits [1, T or 1, vocab_size]."""
        total = past + ids.shape[1]
        binding = self._session.io_binding()
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total)[None],
        }
        for name in self._inputs & feeds.keys():
            binding.bind_cpu_input(name, feeds[name])
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", cache)
            binding.bind_ortvalue_output(f"present.{name}", cache)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        logits: np.ndarray = binding.get_outputs()[-1].numpy()
        return logits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("genai", type=Path, help="folder that onnxruntime-genai is installed in")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--ffn-size", type=int, default=2816)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--visual-tokens", type=int, default=576)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--repeat", type=int, default=5, help="prefills of each side")
    parser.add_argument("--bursts", type=int, default=24, help=f"of {_BURST} decode steps, of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", choices=list(PRECISIONS), action="append")
    parser.add_argument("--dir", type=Path, help="keep checkpoint and graphs here for the next run")
    options = parser.parse_args()
    precisions = options.precision or list(PRECISIONS)
    with tempfile.TemporaryDirectory(prefix="bench-decode-") as temporary:
        root = options.dir or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        write(root, options, precisions)
        length = options.visual_tokens + options.text_tokens
        print(
            f"d={options.hidden_size} L={options.layers} vocabulary {options.vocab_size}, prompt of {length} "
            f"tokens, {options.threads} threads; medians (quartiles) of {options.repeat} prefills and "
            f"{options.bursts} bursts of {_BURST} decode steps, all sides in turn"
        )
        fine = [measure(root, precision, options) for precision in precisions]
    return 0 if all(fine) else 1


def write(root: Path, options: argparse.Namespace, precisions: Sequence[str]) -> None:
    """Checkpoint, its language model alone, bundles and genai's graphs, as far as they are not there."""
    checkpoint, text = root / "checkpoint", root / "text"
    if not checkpoint.exists():
        shape = {
            "hidden_size": options.hidden_size,
            "intermediate_size": options.ffn_size,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads,
            "num_key_value_heads": options.kv_heads,
            "vocab_size": options.vocab_size,
            "max_position_embeddings": 4096,
        }
        make_tiny_llava(checkpoint, text=shape)
        write_text_model(checkpoint, text)
    opened = open_checkpoint(str(checkpoint))
    for precision in precisions:
        bundle = root / f"ours-{precision}"
        if not bundle.exists():
            int4 = Weights(WeightKind.INT4, 128, "nearest")
            packing = nearest(opened.tensors, int4, compute="fp32") if precision == "int4" else None
            schedule = Schedule((Cut(CUT),))
            export_tiny(
                checkpoint, bundle, schedule=schedule, dialect=Dialect.ONNXRUNTIME, packing=packing, keep=0.25
            )
        for name, told in PRECISIONS[precision].items():
            graph = graph_of(root, precision, name)
            if not graph.exists():
                builder = options.genai / "onnxruntime_genai" / "models" / "builder.py"
                command = [sys.executable, str(builder), "-i", str(text), "-o", str(graph), "-p", precision]
                command += ["-e", "cpu", "-c", str(root / "cache")]
                command += ["--extra_options", *told] if told else []
                path = {**os.environ, "PYTHONPATH": str(options.genai)}
                subprocess.run(command, check=True, env=path, capture_output=True)


def graph_of(root: Path, precision: str, name: str) -> Path:
    """Folder of one of genai's graphs."""
    return root / f"{precision}-{name}".replace(", ", "-").replace(" ", "-")


def write_text_model(checkpoint: Path, out: Path) -> None:
    """The language model of a LLaVA as a checkpoint of its own."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer, LlamaForCausalLM

    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    alone = LlamaForCausalLM(model.config.text_config)
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    alone.save_pretrained(out)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(out)


def measure(root: Path, precision: str, options: argparse.Namespace) -> bool:
    """Print one precision; whether it holds what the module says."""
    ours = opened(Bundle.open(root / f"ours-{precision}", verify=False), options)
    length = ours.prompt.input_ids.shape[1]
    room = (options.bursts + 1) * (_BURST + 1) + 1
    theirs = {
        name: Genai(
            graph_of(root, precision, name),
            layers=options.layers,
            capacity=length + room,
            shape=(options.kv_heads, options.hidden_size // options.heads),
            threads=options.threads,
        )
        for name in PRECISIONS[precision]
    }
    prefill = interleaved(
        {
            **{name: partial(graph.run, ours.prompt.input_ids, 0) for name, graph in theirs.items()},
            "ours, all tokens": partial(ours.prefill, pruned=False),
            "ours, pruned": partial(ours.prefill, pruned=True),
        },
        options.repeat,
    )
    full, pruned = (
        Continuation(ours.components, ours.prefill(pruned=pruned), room) for pruned in (False, True)
    )
    for name, graph in theirs.items():
        logits = graph.run(ours.prompt.input_ids, 0)[0, -1]
        apart = np.abs(logits - full.logits).max() / np.abs(logits).max()
        print(f"\n{precision}: logits of the prompt are {apart:.1e} of the largest from those of {name}")
    decode = interleaved(
        {
            **{name: partial(step, graph, iter(range(length, 10**6))) for name, graph in theirs.items()},
            "ours, all tokens cached": partial(full.feed, 7),
            "ours, kept tokens cached": partial(pruned.feed, 7),
        },
        options.bursts,
        burst=_BURST,
    )
    report("prefill", prefill)
    *_, with_all, with_kept = report("decode step", decode)
    return with_all <= NOISE and with_kept <= with_all


def step(graph: Genai, lengths: Iterator[int]) -> None:
    """One more token."""
    graph.run(np.array([[7]]), next(lengths))


def opened(bundle: Bundle, options: argparse.Namespace) -> Ours:
    settings = OnnxRuntimeOptions(threads=options.threads)
    runner = partial(OnnxRuntimeRunner, options=settings)
    components = Components(bundle.manifest, lambda component: open_component(bundle, component, runner))
    length = options.visual_tokens + options.text_tokens
    ids = np.random.default_rng(0).integers(0, options.vocab_size, (1, length))
    visual = np.arange(35, 35 + options.visual_tokens)
    prompt = PromptInputs(ids, np.arange(length)[None, None], visual, next_position=length, pictures=())
    schedule, layers = bundle.manifest.schedule, bundle.manifest.dims.layers
    kept = kept_tokens(Keep(ratio=options.keep), schedule, layers=layers, visual_tokens=options.visual_tokens)
    return Ours(components, prompt, (schedule, kept))


def report(title: str, times: Mapping[str, Sequence[float]]) -> list[float]:
    """Print one table; milliseconds of each side over those of the first, turn by turn."""
    first = next(iter(times))
    ratios = []
    for name, milliseconds in times.items():
        low, middle, high = statistics.quantiles(milliseconds, n=4)
        ratio = statistics.median(a / b for a, b in zip(milliseconds, times[first], strict=True))
        ratios.append(ratio)
        print(f"  {title:12} {name:26} {middle:9.2f} ms ({low:.2f} to {high:.2f})  {ratio:.3f} x {OWN}")
    return ratios[1:]


_PAUSE_S = 0.1


def interleaved(
    programs: Mapping[str, Callable[[], Any]], repeat: int, *, burst: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of each, in turns, so that the machine's mood hits all alike; the first turn warms.

    A pause stands before each: threads of the one before may spin on, on the cores of the next. What an
    answer does many times on end is measured so: a burst behind a first one, which finds threads asleep.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeat + 1):
        for name, program in programs.items():
            time.sleep(_PAUSE_S)
            if burst > 1:
                program()
            start = time.perf_counter()
            for _ in range(burst):
                program()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start) / burst)
    return times


if __name__ == "__main__":
    sys.exit(main())
