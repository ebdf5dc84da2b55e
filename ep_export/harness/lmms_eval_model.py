"""`ep_export_pruned` for lmms-eval: Hugging Face's own model, pruned by `ep_export.reference.prune`.

    lmms-eval --model ep_export_pruned --model_args pretrained=qwen2.5-vl-7b,keep=0.25 --tasks mmstar

Prompts are built as the exported bundle builds them, so that a figure measured here stands for the bundle
too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from ep_export.calibrate.choose import ScheduleRequest, settle
from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UsageError
from ep_export.policy import Chooser, Cut, Keep, Scorer, Select, TopK, chooser_named
from ep_export.reference import PruneSpec, load_model, prune

if TYPE_CHECKING:
    from ep_export.families.base import PromptInputs

__all__ = ["PrunedModel"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MAX_NEW_TOKENS = 1024  # lmms-eval's own default where a task names none
_AUTO = "auto"


class PrunedModel(lmms):  # type: ignore[misc] # lmms-eval ships no types
    """One model, full or pruned, answering one prompt at a time.

    Attributes:
        is_simple: Tasks give one text and a list of pictures or videos, which stand before it.
        kept_tokens: Visual tokens that reach the last layer, of every prompt with a picture so far.
        visual_tokens: Those there were.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        *,
        keep: float | None = None,
        keep_tokens: int | None = None,
        policy: str = _AUTO,
        layer: int | None = None,
        cuts: str | None = None,
        calibration: str | None = None,
        dtype: str = "float16",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # noqa: ARG002 - lmms-eval passes it to every model
    ) -> None:
        """Load the model; every argument but the last four means what the flag of `ep-export build` means.

        Args:
            pretrained: Alias, hub id in the local cache, or checkpoint directory.
            keep: Average share of visual tokens; with none of this, `keep_tokens` and `cuts` nothing is
                pruned.
            keep_tokens: Average number of visual tokens.
            policy: A policy's name, e.g. norm-lowest, or "auto": what the record says.
            layer: K.
            cuts: LAYER:SHARE[:NAME] as `--cut` takes it, several joined by "+", since commas part arguments.
            calibration: A record made by `ep-export calibrate`.
            dtype: float16, bfloat16 or float32.
            device: "cuda" where there is one, else "cpu".
            batch_size: 1; pruning runs one prompt at a time.
            max_batch_size: Not read.

        Raises:
            UserError: See `open_checkpoint`, `settle`, `load_model`.
            UsageError: An unknown dtype or a batch.
        """
        super().__init__()
        if dtype not in _DTYPES:
            raise UsageError(f"dtype is {dtype!r}", hint=f"give one of {', '.join(_DTYPES)}")
        if int(batch_size) != 1:
            raise UsageError(f"batch_size is {batch_size}, pruning runs one prompt at a time", hint="give 1")
        checkpoint = open_checkpoint(str(pretrained))
        self._family = checkpoint.family
        self._spec: PruneSpec | None = None
        if keep is not None or keep_tokens is not None or cuts is not None:
            request = ScheduleRequest(
                cuts=_cuts(cuts) if cuts is not None else None,
                layer=layer,
                chooser=None if policy == _AUTO else _chooser(policy),
                calibration=Path(calibration) if calibration else None,
            )
            told = Keep(keep, keep_tokens) if (keep, keep_tokens) != (None, None) else None
            settled = settle(checkpoint, request, keep=told)
            wanted, schedule = settled.average_keep, settled.schedule
            self._spec = PruneSpec(schedule, wanted)
            print(f"ep_export_pruned: keep {wanted}, {schedule} ({settled.evidence.summary})")  # noqa: T201
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = load_model(checkpoint, _DTYPES[dtype]).to(self._device)
        self.prompts = self._family.prompt_builder(checkpoint.path, checkpoint.config)
        self.kept_tokens: list[int] = []
        self.visual_tokens: list[int] = []

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer every request, in order."""
        answers = []
        for request in tqdm(requests, desc="ep_export_pruned", disable=self.rank != 0):
            context, settings, doc_to_visual, doc_id, task, split = request.args
            visuals = doc_to_visual(self.task_dict[task][split][doc_id])
            answer = self._answer(context, list(_opened(visuals)), settings)
            self.cache_hook.add_partial("generate_until", (context, settings), answer)
            answers.append(answer)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:  # noqa: ARG002
        """Refused: a pruned forward has fewer positions than the prompt.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "ep_export_pruned does not score continuations",
            hint="choose a task of output_type generate_until",
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:  # noqa: ARG002
        """Refused: one question a prompt.

        Raises:
            UsageError: Always.
        """
        raise UsageError("ep_export_pruned answers single questions", hint="choose a single-round task")

    def _answer(self, context: str, visuals: list[Any], settings: Mapping[str, Any]) -> str:
        # Tasks written for LLaVA put a placeholder into the text; pictures stand before the question here.
        prompt = self.prompts.build(visuals, context.replace("<image>", "").replace("<video>", "").strip())
        temperature = float(settings.get("temperature") or 0.0)
        sampling = {"temperature": temperature, "top_p": settings.get("top_p")} if temperature > 0 else {}
        with self._pruned() as trace, torch.inference_mode():
            ids = self.model.generate(
                **self._inputs(prompt),
                max_new_tokens=int(settings.get("max_new_tokens", _MAX_NEW_TOKENS)),
                num_beams=int(settings.get("num_beams") or 1),
                do_sample=temperature > 0,
                **sampling,
            )
        if trace is not None and trace.visual_index is not None and len(trace.visual_index):
            self.visual_tokens.append(len(trace.visual_index))
            self.kept_tokens.append(len(trace.cuts[-1].kept_visual))
        answer = self.prompts.decode(ids[0, prompt.input_ids.shape[1] :].tolist())
        return _cut(answer, settings.get("until", ()))

    def _pruned(self) -> AbstractContextManager[Any]:
        return nullcontext(None) if self._spec is None else prune(self.model, self._spec)

    def _inputs(self, prompt: PromptInputs) -> dict[str, torch.Tensor]:
        inputs = self._family.reference_inputs(prompt, self.model.config)
        # Pixels in the model's type; other floats (seconds between video frames) keep their precision.
        return {
            name: value.to(self._device, self.model.dtype if name.startswith("pixel_values") else None)
            for name, value in inputs.items()
        }


def _cuts(text: str) -> tuple[Cut, ...]:
    """Cuts as one argument of lmms-eval's holds them.

    Raises:
        UsageError: One is not LAYER:SHARE or LAYER:SHARE:NAME.
    """
    cuts = []
    for part in text.split("+"):
        layer, _, rest = part.partition(":")
        share, _, name = rest.partition(":")
        try:
            cuts.append(Cut(int(layer), _chooser(name) if name else TopK(), float(share)))
        except ValueError:
            raise UsageError(
                f"cut {part!r} is not LAYER:SHARE or LAYER:SHARE:NAME",
                hint="e.g. cuts=2:0.5+14:0.2:norm-lowest",
            ) from None
    return tuple(cuts)


def _chooser(name: str) -> Chooser:
    """A policy's name; a score alone means its highest."""
    return chooser_named(f"{name}-{Select.HIGHEST.value}" if name in set(Scorer) else name)


def _opened(visuals: Iterable[Any] | None) -> Iterable[Any]:
    """Pictures as they are; paths of videos opened."""
    for visual in visuals or ():
        if isinstance(visual, (str, Path)):
            from ep_export.runtime.videos import open_video

            yield open_video(Path(visual))
        elif isinstance(visual, Image.Image):
            yield visual
        else:
            raise UsageError(
                f"the task gives a {type(visual).__name__}, expected pictures or paths of videos",
                hint="choose a task about pictures or videos",
            )


def _cut(answer: str, until: str | Sequence[str]) -> str:
    """The answer up to the first stop string."""
    for stop in (until,) if isinstance(until, str) else until:
        if stop:
            answer = answer.split(stop, 1)[0]
    return answer
