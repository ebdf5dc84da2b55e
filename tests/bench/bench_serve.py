"""Many requests at once: tokens a second and time to first token, full and pruned, in one run.

The shipped model answers held-out questions about pictures. So many clients each send a request when their
last one is answered. Beside the engine stand `Session.generate` and Hugging Face's `generate`, one request
after the other on as many threads. Answers run on to one length, so that all sides do the same work; with
--tokens 0 they end where the model ends them, after a few tokens, and prefill is nearly all there is. CPU
time is that of the whole process: on a machine that does something else too it says more than the wall does.
Exits 1 where the engine at 8 clients makes less than 2.5 times the tokens a second of `Session.generate`, or
answers differ. At the end: how many requests fit where 8 of the full model do, and are answered at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))

from bundles import export_tiny
from digit_scenes import held_out

from ep_export.bundle import Bundle, Dialect
from ep_export.planning import kept_tokens
from ep_export.policy import MaxMin
from ep_export.runtime import Generation, Session
from ep_export.serving import Answer, Engine, Request, cache_need, requests_that_fit

READER = Path(__file__).resolve().parents[1] / "fixtures" / "digit-reader"
NEVER_SAID = 7  # <|video_pad|>, of which the model saw none in training
LONGEST_PROMPT = 384  # of these scenes
OWN_LENGTH = 16  # more than any right answer has
AT, LEAST = 8, 2.5


@dataclass(frozen=True)
class Figures:
    """One side of the comparison.

    Attributes:
        name: What answered.
        tokens: Generated, of all requests.
        wall: Seconds.
        cpu: Seconds of all threads of this process.
        first_token_ms: Of every request, from when it was sent.
    """

    name: str
    tokens: int
    wall: float
    cpu: float
    first_token_ms: Sequence[float]

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.wall

    def line(self, base: Figures) -> str:
        """As it is printed, beside another."""
        middle, late = np.percentile(self.first_token_ms, (50, 95))
        cpu = base.cpu / base.tokens * self.tokens / self.cpu
        return (
            f"  {self.name:22} {self.rate:8.1f} tokens/s x{self.rate / base.rate:5.2f} (CPU time x{cpu:5.2f})"
            f"   first token p50 {middle:7.1f} ms, p95 {late:7.1f} ms"
        )


class Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=(1, 2, 4, 8, 16))
    parser.add_argument("--requests", type=int, default=48, help="of every side")
    parser.add_argument(
        "--tokens", type=int, default=128, help="of every answer; 0: as many as the model says"
    )
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as root:
        bundle = reader_bundle(Path(root), keep=options.keep, endless=options.tokens > 0)
        with Session.open(bundle, threads=options.threads) as session:
            print(
                f"{bundle.manifest.model_name}, float32, {options.threads} threads, {options.requests} "
                f"requests a side, answers of {options.tokens or 'their own number of'} tokens"
            )
            fine = [compare(session, options, prune=prune) for prune in (False, True)]
            print_fitting(session, questions(options, prune=True)[0])
    return 0 if all(fine) else 1


def reader_bundle(root: Path, *, keep: float, endless: bool) -> Bundle:
    """The shipped model's bundle, and in `root / READER.name` the checkpoint it was made from.

    Args:
        root: Folder to write into.
        keep: Of the bundle.
        endless: Nothing ends an answer but its longest length, on every side: so says generation_config.json.
    """
    checkpoint = shutil.copytree(READER, root / READER.name)
    if endless:
        file = checkpoint / "generation_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**settings, "eos_token_id": NEVER_SAID}), encoding="utf-8")
    return export_tiny(
        checkpoint, root / "bundle", layer=1, chooser=MaxMin(), dialect=Dialect.ONNXRUNTIME, keep=keep
    )


def compare(session: Session, options: argparse.Namespace, *, prune: bool) -> bool:
    """Print full or pruned; whether it holds what the module says."""
    requests = questions(options, prune=prune)
    print(f"\n{f'pruned, keep {options.keep:g}' if prune else 'full'}")
    alone(session, requests[0])  # warm
    base, expected = in_a_loop("Session.generate", lambda request: alone(session, request), requests)
    print(base.line(base), flush=True)
    same, fast = True, True
    for clients in options.clients:
        figures, answers = served(session, requests, clients)
        print(figures.line(base), flush=True)
        same &= [a.token_ids for a in answers] == [g.token_ids for g in expected]
        fast &= clients != AT or figures.rate >= LEAST * base.rate
    if not prune:
        print(huggingface(session, requests, options.threads).line(base))
    print(f"  answers {'equal' if same else 'DIFFER FROM'} those of Session.generate", flush=True)
    return same and fast


def print_fitting(session: Session, request: Request) -> None:
    """How many of one request fit where 8 of the full model do: computed, and answered at once."""
    manifest = session.bundle.manifest
    prompt = session.prompts.build_chat(request.conversation)
    length, visual = prompt.input_ids.shape[1], prompt.visual_index.shape[0]
    shape = {"prompt_tokens": length, "visual_tokens": visual, "max_new_tokens": request.max_new_tokens}
    memory = AT * cache_need(manifest, None, **shape, kept=()).bytes
    print(f"\ncaches of {memory / 2**20:.1f} MiB, prompts of {length} tokens, {visual} of them visual")
    for name, schedule in (("full", None), ("pruned", manifest.schedule)):
        count = requests_that_fit(manifest, memory, **shape, prune=schedule is not None)
        kept = (
            kept_tokens(manifest.keep, schedule, layers=manifest.dims.layers, visual_tokens=visual)
            if schedule
            else ()
        )
        rows, most = cache_need(manifest, schedule, **shape, kept=kept).rows, 0
        with Engine(session, slots=count, capacity=rows) as engine:
            each = replace(request, prune=schedule is not None)
            streams = [engine.submit(each) for _ in range(count)]
            while not all(stream.done for stream in streams):
                most = max(most, engine.stats().slots_in_use)
                time.sleep(0.001)
            held = engine.stats().cache_bytes / memory
        print(
            f"  {name:8} {count} requests fit, {most} were answered at once in {held:.0%} of it", flush=True
        )


def questions(options: argparse.Namespace, *, prune: bool) -> list[Request]:
    return [
        Request(
            question=question.text,
            visuals=(scene.picture,),
            prune=prune,
            max_new_tokens=options.tokens or OWN_LENGTH,
        )
        for scene, question in held_out(options.requests, seed=1)
    ]


def alone(session: Session, request: Request) -> Generation:
    return session.generate(
        request.visuals,
        request.question,
        max_new_tokens=request.max_new_tokens,
        prune=request.prune,
    )


def in_a_loop(
    name: str, answer: Callable[[Request], Any], requests: Sequence[Request]
) -> tuple[Figures, list[Generation]]:
    """One request after the other; the first token comes when everything before the decoding is done."""
    clock = Clock()
    answers = [answer(request) for request in requests]
    spent = clock.read()
    tokens = sum(len(each.token_ids) for each in answers)
    first = [each.timings_ms["total"] - each.timings_ms["decode"] for each in answers]
    return Figures(name, tokens, *spent, first), answers


def served(session: Session, requests: Sequence[Request], clients: int) -> tuple[Figures, list[Answer]]:
    """So many clients, each with one request at a time."""
    answers: dict[int, Answer] = {}
    capacity = max(LONGEST_PROMPT + each.max_new_tokens for each in requests)
    with Engine(session, slots=clients, capacity=capacity) as engine:

        def client(number: int) -> None:
            for index in range(number, len(requests), clients):
                answers[index] = engine.submit(requests[index]).answer

        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        clock = Clock()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        spent = clock.read()
    ordered = [answers[index] for index in range(len(requests))]
    tokens = sum(len(each.token_ids) for each in ordered)
    first = [each.timings_ms["first_token"] for each in ordered]
    return Figures(f"engine, {clients} at once", tokens, *spent, first), ordered


def huggingface(session: Session, requests: Sequence[Request], threads: int) -> Figures:
    """`generate` of the same checkpoint in a loop."""
    import torch

    from ep_export.checkpoint import open_checkpoint
    from ep_export.reference import load_model

    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(str(session.bundle.path.with_name(READER.name)))
    model = load_model(checkpoint)
    first, tokens, clock = [], 0, Clock()
    for number, request in enumerate([requests[0], *requests]):
        if number == 1:  # the one before warmed up
            first, tokens, clock = [], 0, Clock()
        watch = _Watch()
        prompt = session.prompts.build_chat(request.conversation)
        inputs = checkpoint.family.reference_inputs(prompt, checkpoint.config)
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=request.max_new_tokens, do_sample=False, streamer=watch)
        first.append(1e3 * (watch.times[0] - watch.start))
        tokens += len(watch.times)
    return Figures("Hugging Face generate", tokens, *clock.read(), first)


class _Watch:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.start, self.times, self._prompt_came = time.perf_counter(), [], False

    def put(self, _ids: Any) -> None:
        if self._prompt_came:  # the first thing that comes is the prompt
            self.times.append(time.perf_counter())
        self._prompt_came = True

    def end(self) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main())
