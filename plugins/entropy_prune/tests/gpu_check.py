#!/usr/bin/env python3
# ruff: noqa: T201 - a script: what it prints is its result
"""Check and time the EntropyPrune kernels on a GPU, with nvcc and PyTorch alone, in about two minutes.

    python3 plugins/entropy_prune/tests/gpu_check.py [--json FILE] [--part check|sanitize|bench]

What it does: compiles the kernels for this GPU; compares all five outputs with PyTorch in float64 for all
types, scorers, shapes and budgets; cuts the outputs of a first cut a second time; breaks the contract of
visual_index and looks for what was written outside the outputs; repeats calls and captures one in a CUDA
graph; runs part of that under compute-sanitizer where it is installed; times N = 576, 4096, 16384 against
batched `torch.linalg.eigvalsh` and against the bytes this card moves. Exit status 0 when every check passed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SCORERS = ("paper", "released", "order2", "norm")
SELECTS = ("highest", "lowest")
BUDGETS = ("joint", "per_picture")
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Nats: a float32 score against float64. Sets may differ only among tokens this close to the last one kept.
TOLERANCE = 2e-6
# Elements on either side of every output that no call may touch: 256 bytes of 2, so that alignment stays.
GUARD = 128
GUARD_VALUE = 77


@dataclass(frozen=True)
class Timing:
    """One row of the bench, in microseconds; floor_us is the time this card needs to move the same bytes."""

    visual: int
    heads: int
    dtype: str
    plugin_us: float
    floor_us: float
    eigvalsh_fp32_us: float
    eigvalsh_fp64_us: float


class Kernels:
    """The launch function, compiled for the GPU at hand."""

    def __init__(self, folder: Path, *, line_info: bool = False) -> None:
        major, minor = torch.cuda.get_device_capability()
        library = folder / "libgpu.so"
        command = [
            shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc",
            *(
                "-std=c++17",
                "-O3",
                "-fmad=false",
                "-shared",
                "-Xcompiler",
                "-fPIC",
                "-diag-suppress",
                "20012",
            ),
            *(("-lineinfo",) if line_info else ()),
            f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}",
            *(str(HERE.parent / "entropy_prune.cu"), str(HERE / "gpu_abi.cu"), "-o", str(library)),
        ]
        subprocess.run(command, check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.ep_gpu_workspace_bytes.restype = ctypes.c_size_t

    def call(self, case: Case) -> None:
        """Enqueue one call on PyTorch's current stream."""
        error = self._library.ep_gpu_launch(
            (ctypes.c_int64 * 7)(*case.shape),
            (ctypes.c_int * 3)(*case.options),
            TYPES[case.states.dtype],
            TYPES[case.hidden.dtype],
            (ctypes.c_void_p * 9)(*[tensor.data_ptr() for tensor in case.tensors]),
            ctypes.c_void_p(case.workspace.data_ptr()),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if error:
            raise RuntimeError(f"launch returned CUDA error {error}")

    def workspace(self, shape: tuple[int, ...]) -> torch.Tensor:
        """As much device memory as the call asks for, filled with what must not matter."""
        size = self._library.ep_gpu_workspace_bytes((ctypes.c_int64 * 7)(*shape))
        return torch.full((size,), 0xA5, dtype=torch.uint8, device="cuda")


class Output:
    """A tensor of the GPU between guards."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        self._memory = torch.empty(math.prod(shape) + 2 * GUARD, dtype=dtype, device="cuda")
        self.values = self._memory[GUARD:-GUARD].view(shape)
        self.forget()

    def forget(self) -> None:
        """Overwrite the values, so that a call which writes nothing cannot pass."""
        self._memory.fill_(GUARD_VALUE)
        self.values.fill_(-1)

    @property
    def whole(self) -> bool:
        """Whether both guards are what they were."""
        guards = torch.cat((self._memory[:GUARD], self._memory[-GUARD:]))
        return bool((guards == GUARD_VALUE).all())


class Case:
    """Inputs, outputs and options of one call; `after` is a first cut whose outputs this one cuts again."""

    def __init__(
        self,
        kernels: Kernels,
        *,
        heads: int,
        dim: int,
        pictures: tuple[int, ...],
        kept: int,
        width: int = 96,
        axes: int = 3,
        states_type: torch.dtype = torch.float16,
        hidden_type: torch.dtype = torch.float16,
        kind: str = "random",
        scorer: str = "paper",
        select: str = "highest",
        budget: str = "joint",
        after: Case | None = None,
    ) -> None:
        if after is None:
            self.visual_index = picture_index(pictures).cuda()
            sequence = int(self.visual_index[-1]) + 9
            self.hidden = torch.randn(sequence, width, device="cuda").to(hidden_type)
            self.position_ids = torch.randint(0, 1 << 40, (axes, sequence), device="cuda")
        else:
            self.visual_index = after.kept_visual_index.clone()
            self.hidden, self.position_ids = after.kept_hidden.clone(), after.kept_position_ids.clone()
            (sequence, width), axes = self.hidden.shape, len(self.position_ids)
        visual = len(self.visual_index)
        rows = sequence - visual + kept
        self.scorer, self.select, self.budget = scorer, select, budget
        self.shape = (sequence, visual, kept, heads, dim, width, axes)
        self.options = (SCORERS.index(scorer), SELECTS.index(select), BUDGETS.index(budget))
        self.states = make_states(kind, sequence, heads, dim).to(states_type)
        self.outputs = (
            Output(rows, width, dtype=self.hidden.dtype),
            Output(axes, rows, dtype=torch.int64),
            Output(rows, dtype=torch.int64),
            Output(kept, dtype=torch.int64),
            Output(visual, dtype=torch.float32),
        )
        values = [output.values for output in self.outputs]
        self.kept_hidden, self.kept_position_ids, self.kept_index, self.kept_visual_index, self.scores = (
            values
        )
        self.workspace = kernels.workspace(self.shape)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In the order of the launch function."""
        inputs = (self.states, self.hidden, self.position_ids, self.visual_index)
        return (*inputs, *(output.values for output in self.outputs))

    def forget(self) -> None:
        """Overwrite the outputs."""
        for output in self.outputs:
            output.forget()


def picture_index(pictures: tuple[int, ...]) -> torch.Tensor:
    """Positions of pictures with 7 text tokens before each."""
    parts, start = [], 0
    for size in pictures:
        start += 7
        parts.append(torch.arange(start, start + size))
        start += size
    return torch.cat(parts)


def make_states(kind: str, sequence: int, heads: int, dim: int) -> torch.Tensor:
    """[S, H, D] float32 on the GPU."""
    x = torch.randn(sequence, heads, dim, device="cuda")
    if kind == "low rank":
        return torch.randn(sequence, heads, 3, device="cuda") @ torch.randn(sequence, 3, dim, device="cuda")
    if kind == "shared mean":
        return x + 100 * torch.randn(sequence, 1, dim, device="cuda")
    if kind == "mixed":  # every way a token can be unusual, in one sequence
        x[::5] = make_states("low rank", sequence, heads, dim)[::5]
        x[1::5] = x[1::5, :1]
        x[2::10] = 0
        x[3::10, 0, 0] = float("nan")
        x[8::10, -1, -1] = float("inf")
    return x


def exact_scores(states: torch.Tensor, scorer: str) -> torch.Tensor:
    """[N, H, D] -> [N] float64; NaN where a token is not finite."""
    finite = torch.isfinite(states).all(-1).all(-1)
    x = torch.where(finite[:, None, None], states.double(), 0.0)
    heads = x.shape[1]
    if scorer == "norm":
        scores = x.square().sum((1, 2)).sqrt()
        return torch.where(finite, scores, torch.nan)
    rows = x - x.mean(1, keepdim=True)
    # A mean of equal heads may be off by a rounding, and a row of roundings must not be normalised.
    rows = torch.where(rows.abs() > 1e-13 * x.abs().amax(1, keepdim=True), rows, 0.0)
    if scorer != "released":
        length = rows.norm(dim=2, keepdim=True)
        rows = rows / torch.where(length > 0, length, 1.0)
    gram = rows @ rows.transpose(1, 2) / heads
    if scorer == "order2":
        purity = gram.square().sum((1, 2))
        scores = torch.where(purity > 0, -torch.log(torch.where(purity > 0, purity, 1.0)), 0.0)
        return torch.where(finite, scores, torch.nan)
    eigenvalues = torch.linalg.eigvalsh(gram)
    if scorer == "released":
        eigenvalues = eigenvalues.clamp(min=1e-10)
        scores = -(eigenvalues * eigenvalues.log()).sum(1) / (math.log(heads) if heads > 1 else 1)
    else:
        eigenvalues = torch.where(eigenvalues > 0, eigenvalues, 1.0)
        scores = -(eigenvalues * eigenvalues.log()).sum(1)
    return torch.where(finite, scores, torch.nan)


def expected_rows(case: Case) -> torch.Tensor:
    """Positions that stay for the scores the kernel computed, by plain sorting on the host."""
    scores, index = case.scores.cpu(), case.visual_index.cpu()
    sequence, visual, kept = case.shape[:3]
    directed = scores if case.select == "highest" else -scores
    goodness = torch.where(torch.isfinite(scores), directed, -torch.inf)
    order = torch.sort(goodness, descending=True, stable=True).indices
    if case.budget == "per_picture":
        picture = torch.cumsum(torch.diff(index, prepend=index[:1]) > 1, 0)
        rank = torch.empty(visual)
        for one in picture.unique():
            mine = order[picture[order] == one]
            rank[mine] = torch.arange(len(mine), dtype=torch.float32)
        share = (rank + 0.5) / torch.bincount(picture)[picture].float()
        order = torch.sort(share, stable=True).indices
    stays = torch.ones(sequence, dtype=torch.bool)
    stays[index[order[kept:]]] = False
    return stays.nonzero()[:, 0].cuda()


def problems(case: Case) -> list[str]:
    """What is wrong with the outputs of the last call."""
    wrong = []
    visual_states = case.states[case.visual_index]
    exact = exact_scores(visual_states, case.scorer)
    error = (case.scores.double() - exact).abs()
    if case.scorer == "released":
        # mean square x (entropy - ln mean square): two terms of the size of the mean square cancel.
        scale = visual_states.double().nan_to_num(0, 0, 0).square().sum((1, 2)) / case.shape[3]
        error = error / torch.maximum(exact.abs(), scale.clamp(min=1))
    elif case.scorer == "norm":
        error = error / exact.abs().clamp(min=1)
    worst = error[torch.isfinite(exact)].max().item() if torch.isfinite(exact).any() else 0.0
    if not worst <= TOLERANCE:
        wrong.append(f"score error {worst:.2e}")
    if not torch.equal(torch.isnan(case.scores), torch.isnan(exact)):
        wrong.append("scores that are NaN are not those of tokens that are not finite")
    if not torch.equal(case.kept_index, expected_rows(case)):
        wrong.append("kept_index")
    if not torch.equal(case.kept_hidden, case.hidden[case.kept_index]):
        wrong.append("kept_hidden")
    if not torch.equal(case.kept_position_ids, case.position_ids[:, case.kept_index]):
        wrong.append("kept_position_ids")
    still_visual = torch.isin(case.kept_index, case.visual_index).nonzero()[:, 0]
    if not torch.equal(case.kept_visual_index, still_visual):
        wrong.append("kept_visual_index")
    return wrong + broken_guards(case)


def broken_guards(case: Case) -> list[str]:
    """Outputs beside which the last call wrote."""
    names = ("kept_hidden", "kept_position_ids", "kept_index", "kept_visual_index", "scores")
    outputs = zip(names, case.outputs, strict=True)
    return [f"memory beside {name}" for name, output in outputs if not output.whole]


def cases(kernels: Kernels, *, short: bool) -> list[Case]:
    """All types, scorers, selections, budgets and kinds at one shape; then shapes over the whole range."""
    out = []
    base = {"heads": 28, "dim": 128, "pictures": (200, 56, 1), "kept": 64}
    floats = tuple(TYPES)
    out += [Case(kernels, **base, states_type=a, hidden_type=b) for a in floats for b in floats]
    out += [
        Case(
            kernels,
            **base,
            scorer=scorer,
            select=select,
            budget=budget,
            kind="mixed",
            states_type=torch.float32,
        )
        for scorer in SCORERS
        for select in SELECTS
        for budget in BUDGETS
    ]
    out += [Case(kernels, **base, kind=kind) for kind in ("low rank", "shared mean")]
    shapes = [(2, 1), (8, 32), (16, 64), (17, 80), (32, 128), (33, 96), (64, 256), (32, 16), (1, 8)]
    for heads, dim in shapes:
        for kind in ("random", "mixed"):
            size = (90,) if short else (300, 40)
            out.append(Case(kernels, heads=heads, dim=dim, pictures=size, kept=31, kind=kind, width=dim + 1))
    if not short:
        out.append(Case(kernels, heads=32, dim=128, pictures=(1,), kept=1))
        out.append(Case(kernels, heads=8, dim=32, pictures=(65536,), kept=16384))
        out.append(Case(kernels, heads=8, dim=32, pictures=(4096,) * 16, kept=9000, budget="per_picture"))
        out.append(Case(kernels, heads=28, dim=128, pictures=(16384,), kept=4096, width=3584))
    return out


def check(kernels: Kernels, *, short: bool) -> int:
    """Run every case; returns how many failed."""
    failed = 0
    all_cases = cases(kernels, short=short)
    for case in all_cases:
        case.forget()
        kernels.call(case)
        torch.cuda.synchronize()
        wrong = problems(case)
        if wrong:
            failed += 1
            print(f"FAIL {case.shape} {case.scorer} {case.select} {case.budget} {case.states.dtype}: {wrong}")
    print(f"{len(all_cases) - failed} passed, {failed} failed")
    return failed


def check_second_cut(kernels: Kernels) -> int:
    """Cut, then cut the outputs: each by itself, and both together against the tensors that went in."""
    failed = 0
    for budget in BUDGETS:
        first = Case(kernels, heads=28, dim=128, pictures=(200, 56, 1), kept=128, budget=budget)
        kernels.call(first)
        second = Case(kernels, heads=16, dim=64, pictures=(), kept=32, budget=budget, after=first)
        kernels.call(second)
        torch.cuda.synchronize()
        wrong = problems(first) + problems(second)
        position = first.kept_index[second.kept_index]  # in what entered the first cut
        if not torch.equal(second.kept_hidden, first.hidden[position]):
            wrong.append("kept_hidden of both")
        if not torch.equal(second.kept_position_ids, first.position_ids[:, position]):
            wrong.append("kept_position_ids of both")
        was_visual = torch.isin(position, first.visual_index).nonzero()[:, 0]
        if not torch.equal(second.kept_visual_index, was_visual):
            wrong.append("kept_visual_index of both")
        if wrong:
            failed += 1
            print(f"FAIL two cuts {budget}: {wrong}")
    print(f"two cuts: {len(BUDGETS) - failed} passed, {failed} failed")
    return failed


def check_broken_index(kernels: Kernels) -> int:
    """visual_index outside its contract: NaN for what is no position, nothing written beside the outputs."""
    failed = 0
    for budget in BUDGETS:
        for kept in (1, 64, 257):
            case = Case(kernels, heads=28, dim=128, pictures=(200, 56, 1), kept=kept, budget=budget)
            sequence = case.shape[0]
            strays = (-(1 << 40), -1, sequence, sequence + 300, 1 << 40)
            for number, stray in enumerate(strays):
                case.visual_index[50 * number] = stray
            kernels.call(case)
            torch.cuda.synchronize()
            wrong = broken_guards(case)
            if not bool(torch.isnan(case.scores[: 50 * len(strays) : 50]).all()):
                wrong.append("scores of what is no position")
            if wrong:
                failed += 1
                print(f"FAIL broken visual_index, {kept} kept, {budget}: {wrong}")
    print(f"broken visual_index: {failed} failed")
    return failed


def check_repetition_and_capture(kernels: Kernels) -> int:
    """The same call gives the same bits, directly and from a CUDA graph."""
    case = Case(kernels, heads=32, dim=128, pictures=(4096,), kept=1000, width=1024, kind="mixed")
    kernels.call(case)
    torch.cuda.synchronize()
    first = [tensor.clone() for tensor in case.tensors[4:]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # an allocation or a synchronisation inside would make this fail
        kernels.call(case)
    failed = 0
    for i in range(20):
        case.forget()
        if i % 2:
            graph.replay()
        else:
            kernels.call(case)
        torch.cuda.synchronize()
        again = case.tensors[4:]
        same = all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, again, strict=True)
        )
        failed += not same
    print(f"repetition and CUDA graph: {20 - failed} of 20 calls equal the first")
    return failed


def sanitize() -> int:
    """A short run of this script under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        print("compute-sanitizer: not installed, not run")
        return 0
    # Only this plugin's kernels: PyTorch's own are not under test, and instrumenting them takes minutes. The
    # option's name changed between versions of the tool.
    known = subprocess.run([tool, "--help"], capture_output=True, text=True, check=False).stdout
    option = next((name for name in ("--kernel-regex", "--kernel-name", "--filter") if name in known), None)
    only_ours = [option, "kns=ep_export"] if option else []
    failed = 0
    for kind in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__, "--part", "short"]
        command[1:1] = only_ours
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        print(f"compute-sanitizer {kind}: {'clean' if run.returncode == 0 else 'FAILED'}")
        if run.returncode:
            print((run.stdout + run.stderr)[-3000:])
            failed += 1
    return failed


def time_us(work: Callable[[], object], repeats: int) -> float:
    """Median of 5 runs of `repeats` calls, in microseconds a call."""
    for _ in range(3):
        work()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / repeats)
    return sorted(times)[2]


def bytes_per_second() -> float:
    """What a copy of 2 GiB moves on this card, reading and writing."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-6 * time_us(lambda: target.copy_(source), 10))


def measure(kernels: Kernels, visual: int, heads: int, dtype: torch.dtype, rate: float) -> Timing:
    """One row: a quarter is kept, hidden width 4096 for 32 heads and 3584 for 28."""
    width = 128 * heads
    case = Case(
        kernels, heads=heads, dim=128, pictures=(visual,), kept=visual // 4, width=width, states_type=dtype
    )
    kernels.call(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.call(case)
    size = case.states.element_size()
    moved = visual * heads * 128 * size + 2 * case.kept_hidden.numel() * case.kept_hidden.element_size()

    def eigvalsh(kind: torch.dtype) -> float:
        def work() -> None:
            x = case.states[case.visual_index].to(kind)
            rows = torch.nn.functional.normalize(x - x.mean(1, keepdim=True), dim=2)
            values = torch.linalg.eigvalsh(rows @ rows.transpose(1, 2) / heads).clamp(min=1e-30)
            torch.topk(-(values * values.log()).sum(1), visual // 4)

        return time_us(work, 2)

    return Timing(
        visual,
        heads,
        str(dtype).removeprefix("torch."),
        round(time_us(graph.replay, 50), 1),
        round(1e6 * moved / rate, 1),
        round(eigvalsh(torch.float32), 1),
        round(eigvalsh(torch.float64), 1),
    )


def bench(kernels: Kernels) -> list[Timing]:
    """The table of PERFORMANCE.md, printed as Markdown."""
    rate = bytes_per_second()
    print(f"\ndevice: {torch.cuda.get_device_name()}, copy {rate / 1e9:.0f} GB/s, torch {torch.__version__}")
    print("| N | H | type | plugin us | floor us | ratio | eigvalsh fp32 us | eigvalsh fp64 us |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for heads in (32, 28):
        for visual in (576, 4096, 16384):
            row = measure(kernels, visual, heads, torch.float16, rate)
            rows.append(row)
            print(
                f"| {row.visual} | {row.heads} | {row.dtype} | {row.plugin_us} | {row.floor_us} "
                f"| {row.plugin_us / row.floor_us:.1f} | {row.eigvalsh_fp32_us} | {row.eigvalsh_fp64_us} |"
            )
    return rows


def main() -> int:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the bench here too")
    parser.add_argument("--part", choices=("check", "sanitize", "bench", "short"), help="only this part")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing was run")
        return 77
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        kernels = Kernels(Path(folder), line_info=options.part == "short")
        if options.part in (None, "check", "short"):
            failed += check(kernels, short=options.part == "short")
            failed += check_second_cut(kernels) + check_broken_index(kernels)
        if options.part in (None, "check"):
            failed += check_repetition_and_capture(kernels)
        if options.part in (None, "sanitize"):
            failed += sanitize()
        if options.part in (None, "bench"):
            rows = bench(kernels)
            if options.json is not None:
                options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
