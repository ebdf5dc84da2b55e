"""A bundle opened for questions: prompt, prefill and decode with one backend. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep_export.bundle import Bundle
from ep_export.errors import UsageError, UserError
from ep_export.families import family_named
from ep_export.families.base import PromptBuilder, PromptInputs, Visual
from ep_export.plan import kept_tokens
from ep_export.policy import Keep
from ep_export.runtime.base import Feed, RunnerFactory
from ep_export.runtime.generate import Decoding, Finish, Generation, KeptPicture, run_decode
from ep_export.runtime.onnxruntime_runner import OnnxRuntimeOptions, OnnxRuntimeRunner
from ep_export.runtime.prefill import Components, Prefill, Timer, run_prefill
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
        prompts: Builds prompts and decodes answers.
    """

    def __init__(
        self, bundle: Bundle, config: PreTrainedConfig, prompts: PromptBuilder, components: Components
    ) -> None:
        self.bundle = bundle
        self.config = config
        self.prompts = prompts
        self._components = components
        self._family = family_named(bundle.manifest.family)

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
        prepack: bool = True,
        runner: RunnerFactory | None = None,
    ) -> Session:
        """Open every component of a bundle.

        Args:
            bundle: An opened (verified) bundle.
            providers: ONNX Runtime execution providers, in order of preference.
            threads: CPU threads; ONNX Runtime's own choice when None.
            prepack: See `OnnxRuntimeOptions`.
            runner: Another backend; the three options above are then not read.

        Raises:
            UserError: A component cannot be loaded or the processor files are broken.
        """
        manifest = bundle.manifest
        options = OnnxRuntimeOptions(tuple(providers), threads, prepack)
        factory = runner or partial(OnnxRuntimeRunner, options=options)
        processor = bundle.file(_PROCESSOR)
        config = _load_config(bundle)
        prompts = family_named(manifest.family).prompt_builder(processor, config)
        with ExitStack() as opened:
            runners = {
                component.name: opened.enter_context(factory(bundle.file(component.file)))
                for component in manifest.components
            }
            opened.pop_all()  # all open: the session closes them
        return cls(bundle, config, prompts, Components(runners, manifest.dims, manifest.policy.layer))

    def __enter__(self) -> Session:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every component."""
        for runner in self._components.runners.values():
            runner.close()

    def run(self, component: str, feeds: Mapping[str, Feed]) -> dict[str, NDArray[Any]]:
        """Run one component, for tests and validation.

        Raises:
            UserError: No such component, or wrong inputs.
        """
        self.bundle.manifest.component(component)
        made = self._components.runners[component].run(feeds)
        return {name: value.numpy() for name, value in made.items()}

    def prefill(self, prompt: PromptInputs, keep: Keep | None = None) -> Prefill:
        """Everything up to the first logits.

        Args:
            prompt: From `prompts.build`.
            keep: Amount kept; the bundle's when None.

        Raises:
            UserError: The prompt is longer than the context, or `keep` is impossible.
        """
        return self._prefill(prompt, keep or self.bundle.manifest.keep, Timer())

    def generate(
        self,
        visuals: Sequence[Visual],
        prompt: str,
        *,
        max_new_tokens: int,
        keep: Keep | None = None,
        sampling: Sampling | None = None,
        on_token: Callable[[int], None] | None = None,
        ignore_eos: bool = False,
    ) -> Generation:
        """Answer a question about pictures and videos, or about none.

        The repetition penalty of the checkpoint's generation_config.json is applied, also when greedy, as
        Hugging Face's `generate` does.

        Args:
            visuals: In prompt order; they share one budget unless the bundle's policy says per picture.
            prompt: The question.
            max_new_tokens: Longest answer in tokens.
            keep: Amount kept; the bundle's when None.
            sampling: How to draw tokens; greedy when None.
            on_token: Called with every generated id as soon as it is known.
            ignore_eos: Go on to `max_new_tokens` whatever the model says, for measurements.

        Raises:
            UserError: See `PromptBuilder.build` and `prefill`.
        """
        if max_new_tokens < 1:
            raise UsageError(f"max-new-tokens is {max_new_tokens}, expected 1 or more")
        start, timer = time.perf_counter(), Timer()
        keep = keep or self.bundle.manifest.keep
        with timer.stage("prepare"):
            ready = self.prompts.build(visuals, prompt)
        prefill = self._prefill(ready, keep, timer)
        length = ready.input_ids.shape[1]
        room = self.bundle.manifest.dims.max_positions - length + 1  # the last token is never fed back
        decoding = Decoding(
            next_position=ready.next_position,
            limit=min(max_new_tokens, room),
            eos_token_ids=() if ignore_eos else self.prompts.eos_token_ids,
            chooser=TokenChooser(
                ready.input_ids[0].tolist(),
                repetition_penalty=self.prompts.repetition_penalty,
                sampling=sampling,
            ),
            on_token=on_token,
        )
        tokens = run_decode(self._components, prefill, decoding, timer)
        return Generation(
            answer=self.prompts.decode(tokens),
            token_ids=tokens,
            prompt_tokens=length,
            visual_tokens=ready.visual_index.shape[0],
            kept_index=tuple(prefill.kept_index.tolist()),
            timings_ms=_timings(timer, len(tokens), start),
            keep=keep,
            finish=_finish(tokens, decoding, max_new_tokens),
            pictures=_kept_pictures(ready, prefill.kept_index),
        )

    def _prefill(self, prompt: PromptInputs, keep: Keep, timer: Timer) -> Prefill:
        manifest = self.bundle.manifest
        length, context = prompt.input_ids.shape[1], manifest.dims.max_positions
        if length > context:
            raise UserError(
                f"prompt has {length} tokens, the model's context holds {context}",
                hint="use fewer or smaller pictures, or a shorter question",
            )
        visual_tokens = prompt.visual_index.shape[0]
        kept = kept_tokens(
            keep, layers=manifest.dims.layers, layer=manifest.policy.layer, visual_tokens=visual_tokens
        )
        with timer.stage("prepare"):
            feeds = [self._family.vision_feeds(picture, self.config) for picture in prompt.pictures]
        return run_prefill(self._components, prompt, feeds, kept, timer)


def _load_config(bundle: Bundle) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            bundle.file(_PROCESSOR), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"bundle {bundle.path} has no usable {_PROCESSOR}/config.json: {first}",
            hint="build the bundle again",
        ) from error


def _timings(timer: Timer, tokens: int, start: float) -> dict[str, float]:
    decode = timer.ms.get("decode", 0.0)
    steps = max(1, tokens - 1)  # the first token comes from prefill
    total = 1e3 * (time.perf_counter() - start)
    names = ("prepare", "vision", "embed", "head_prefill", "tail_prefill")
    return {
        **{name: timer.ms[name] for name in names},
        "decode": decode,
        "decode_per_token": decode / steps,
        "total": total,
    }


def _finish(tokens: Sequence[int], decoding: Decoding, max_new_tokens: int) -> Finish:
    if tokens[-1] in decoding.eos_token_ids:
        return Finish.END
    return Finish.LENGTH if len(tokens) == max_new_tokens else Finish.CONTEXT


def _kept_pictures(prompt: PromptInputs, kept_index: NDArray[np.int64]) -> tuple[KeptPicture, ...]:
    """Kept tokens by picture: which of the visual positions survived, cut at the pictures' ends."""
    kept = np.isin(prompt.visual_index, kept_index)
    made, start = [], 0
    for picture in prompt.pictures:
        stop = start + picture.visual_tokens
        cells = np.flatnonzero(picture.kept_cells(kept[start:stop]))
        made.append(KeptPicture(picture.token_grid, tuple(cells.tolist()), picture.view, picture.video))
        start = stop
    return tuple(made)
