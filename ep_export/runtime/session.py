"""A bundle opened for questions: prompt, prefill and decode with one backend. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ep_export.adaptive import check_adaptive, own_tokens
from ep_export.bundle import Bundle
from ep_export.errors import UsageError, UserError
from ep_export.families import family_named
from ep_export.families.base import PromptBuilder, PromptInputs, Visual
from ep_export.families.bounds import check_dims
from ep_export.first_token import prompt_plan
from ep_export.planning import kept_tokens
from ep_export.policy import Keep, Schedule
from ep_export.runtime.base import Feed, RunnerFactory
from ep_export.runtime.batch import SlotDecoder, open_decoder
from ep_export.runtime.components import Components, open_component
from ep_export.runtime.generate import (
    AnswerCut,
    Continuation,
    Decoding,
    Finish,
    Generation,
    run_decode,
)
from ep_export.runtime.kept import kept_pictures
from ep_export.runtime.onnxruntime_runner import OnnxRuntimeOptions, OnnxRuntimeRunner
from ep_export.runtime.prefill import Prefill, Timer, run_prefill
from ep_export.runtime.sampling import Sampling, TokenChooser

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Session"]

_PROCESSOR = "processor"


class Session:
    """An opened bundle. Use as a context manager, or call `close`.

    Attributes:
        bundle: The bundle.
        config: The model's config.
        family: The model's family.
        dims: Of its decoder.
        prompts: Builds prompts and decodes answers.
    """

    def __init__(
        self, bundle: Bundle, config: PreTrainedConfig, prompts: PromptBuilder, components: Components
    ) -> None:
        self.bundle = bundle
        self.config = config
        self.prompts = prompts
        self._components = components
        self.family = family_named(bundle.manifest.family)
        self.dims = bundle.manifest.dims

    @property
    def max_batch(self) -> int | None:
        """Most slots a `decoder` may have; None where any number will do."""
        return self._components.max_batch

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
        prepack: bool = True,
        exact: bool = False,
        runner: RunnerFactory | None = None,
    ) -> Session:
        """Open a bundle: every component but those that prune, which are opened when first used.

        Args:
            bundle: An opened (verified) bundle.
            providers: ONNX Runtime execution providers, in order of preference.
            threads: CPU threads; ONNX Runtime's own choice when None.
            prepack: See `OnnxRuntimeOptions`.
            exact: See `OnnxRuntimeOptions`.
            runner: Another backend; the four options above are then not read.

        Raises:
            UserError: A component cannot be loaded or the processor files are broken.
        """
        manifest = bundle.manifest
        options = OnnxRuntimeOptions(tuple(providers), threads, prepack, exact)
        factory = runner or partial(OnnxRuntimeRunner, options=options)
        processor = bundle.file(_PROCESSOR)
        config = _load_config(bundle)
        prompts = family_named(manifest.family).prompt_builder(processor, config)
        components = Components(manifest, lambda component: open_component(bundle, component, factory))
        components.open_all_but_prunes()
        return cls(bundle, config, prompts, components)

    def __enter__(self) -> Session:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every component."""
        self._components.close()

    def run(self, component: str, feeds: Mapping[str, Feed]) -> dict[str, NDArray[Any]]:
        """Run one component, for tests and validation.

        Raises:
            UserError: No such component, or wrong inputs.
        """
        runner = self._components.runner(self.bundle.manifest.component(component))
        return {name: value.numpy() for name, value in runner.run(feeds).items()}

    def prefill(
        self,
        prompt: PromptInputs,
        keep: Keep | None = None,
        policies: Sequence[str] = (),
        *,
        prune: bool = True,
    ) -> Prefill:
        """Everything up to the first logits.

        Args:
            prompt: From `prompts.build`.
            keep: Amount kept; the bundle's when None.
            policies: Which of the bundle's policies; see `Manifest.scheduled`.
            prune: False runs the spans alone: the unpruned model.

        Raises:
            UserError: The prompt is longer than the context, `keep` is impossible, or a policy is not there.
        """
        schedule = self.bundle.manifest.pruned_to(keep, policies) if prune else None
        return self._prefill(prompt, schedule, self._keep(keep, schedule), Timer())

    def continuation(self, prefill: Prefill) -> Continuation:
        """What follows a prefill, token by token, whoever chooses the tokens."""
        return Continuation(self._components, prefill)

    def decoder(self, *, slots: int, capacity: int | Sequence[int]) -> SlotDecoder:
        """Several answers at once, token by token; see `open_decoder`."""
        return open_decoder(self._components, slots=slots, capacity=capacity)

    def generate(
        self,
        visuals: Sequence[Visual],
        prompt: str,
        *,
        max_new_tokens: int,
        keep: Keep | None = None,
        policies: Sequence[str] = (),
        prune: bool = True,
        sampling: Sampling | None = None,
        on_token: Callable[[int], None] | None = None,
        ignore_eos: bool = False,
    ) -> Generation:
        """Answer a question about pictures and videos, or about none.

        The repetition penalty of the checkpoint's generation_config.json is applied, also when greedy, as
        Hugging Face's `generate` does.

        Args:
            visuals: In prompt order; they share one budget unless a policy says per picture.
            prompt: The question.
            max_new_tokens: Longest answer in tokens.
            keep: Amount kept; the bundle's when None.
            policies: Which of the bundle's policies; see `Manifest.scheduled`.
            prune: False runs the spans alone: the unpruned model.
            sampling: How to draw tokens; greedy when None.
            on_token: Called with every generated id as soon as it is known.
            ignore_eos: Go on to `max_new_tokens` whatever the model says, for measurements.

        Raises:
            UserError: See `PromptBuilder.build` and `prefill`.
        """
        if max_new_tokens < 1:
            raise UsageError(f"max-new-tokens is {max_new_tokens}, expected 1 or more")
        start, timer = time.perf_counter(), Timer()
        manifest = self.bundle.manifest
        schedule = manifest.pruned_to(keep, policies) if prune else None
        keep = self._keep(keep, schedule)
        with timer.stage("prepare"):
            ready = self.prompts.build(visuals, prompt)
        prefill = self._prefill(ready, schedule, keep, timer)
        length = ready.input_ids.shape[1]
        limit = min(max_new_tokens, manifest.dims.max_positions - length + 1)  # the last is never fed back
        answer = Continuation(self._components, prefill, limit - 1)
        kept_index, cuts = prefill.kept_index, prefill.cuts
        del prefill  # its caches, which the answer has copied or outgrows
        decoding = Decoding(
            limit=limit,
            eos_token_ids=() if ignore_eos else self.prompts.eos_token_ids,
            chooser=TokenChooser(
                ready.input_ids[0].tolist(),
                repetition_penalty=self.prompts.repetition_penalty,
                sampling=sampling,
            ),
            on_token=on_token,
        )
        tokens = run_decode(answer, decoding, timer)
        kept = tuple(len(cut.kept_index) - length + ready.visual_index.shape[0] for cut in cuts)
        return Generation(
            answer=self.prompts.decode(tokens),
            token_ids=tokens,
            prompt_tokens=length,
            visual_tokens=ready.visual_index.shape[0],
            kept_index=tuple(kept_index.tolist()),
            timings_ms=_timings(timer, len(tokens), start),
            keep=keep,
            finish=_finish(tokens, decoding, max_new_tokens),
            pictures=kept_pictures(ready, [cut.kept_index for cut in cuts]),
            cuts=tuple(AnswerCut(cut.layer, cut.policy, tuple(cut.kept_index.tolist())) for cut in cuts),
            policies=tuple(cut.chooser.name for cut in schedule.cuts) if schedule else (),
            first_token_flops=prompt_plan(
                self, ready, schedule if cuts else None, keep, kept=kept
            ).first_token,
        )

    def _keep(self, keep: Keep | None, schedule: Schedule | None) -> Keep:
        """As told, else the bundle's, where there is anything to choose."""
        if schedule is None:
            return Keep(ratio=1.0)
        own = self.bundle.manifest.keep_for(schedule)
        if keep is not None and keep.adaptive and keep.threshold is None and keep.ratio == own.ratio:
            return own if own.adaptive else keep
        return keep or own

    def _prefill(self, prompt: PromptInputs, schedule: Schedule | None, keep: Keep, timer: Timer) -> Prefill:
        manifest = self.bundle.manifest
        length, context = prompt.input_ids.shape[1], manifest.dims.max_positions
        if length > context:
            raise UserError(
                f"prompt has {length} tokens, the model's context holds {context}",
                hint="use fewer or smaller pictures, or a shorter question",
            )
        cuts: tuple[Schedule, tuple[int, ...]] | None = None
        own: Callable[[NDArray[Any]], int] | None = None
        if schedule is not None:
            visual_tokens = prompt.visual_index.shape[0]
            size = {"layers": manifest.dims.layers, "visual_tokens": visual_tokens}
            check_adaptive(keep, schedule)
            kept = kept_tokens(keep.largest, schedule, **size)
            cuts = (schedule, kept) if visual_tokens else None
            if keep.threshold is not None:
                own = partial(own_tokens, keep, schedule=schedule, **size)
        if cuts is not None:  # opened before anything is timed
            for stage in manifest.stages(cuts[0]):
                self._components.runner(stage)
        with timer.stage("prepare"):
            feeds = [self.family.vision_feeds(picture, self.config) for picture in prompt.pictures]
        return run_prefill(self._components, prompt, feeds, cuts, timer, own=own)


def _load_config(bundle: Bundle) -> PreTrainedConfig:
    from ep_export.checkpoint import open_config

    check_dims(bundle.manifest.dims, f"manifest of {bundle.path}")
    return open_config(str(bundle.file(_PROCESSOR))).config


def _timings(timer: Timer, tokens: int, start: float) -> dict[str, float]:
    decode = timer.ms.get("decode", 0.0)
    steps = max(1, tokens - 1)  # the first token comes from prefill
    total = 1e3 * (time.perf_counter() - start)
    names = ("prepare", "vision", "embed", "prefill", "prune")
    return {
        **{name: timer.ms.get(name, 0.0) for name in names},
        "first_token": sum(timer.ms.get(name, 0.0) for name in names),
        "decode": decode,
        "decode_per_token": decode / steps,
        "total": total,
    }


def _finish(tokens: Sequence[int], decoding: Decoding, max_new_tokens: int) -> Finish:
    if tokens[-1] in decoding.eos_token_ids:
        return Finish.END
    return Finish.LENGTH if len(tokens) == max_new_tokens else Finish.CONTEXT
