"""The verbs of the command line for Python: plan, build, open, prune.

They take what the command line takes, as values: a keep of 0.25 (NumPy's numbers are numbers) or "25%", a
policy or a cut by its name or as `ep_export.policy` has it. Errors a person can act on are `UserError`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ep_export.calibrate.choose import ScheduleRequest, settle
from ep_export.errors import UsageError
from ep_export.numerics import DEFAULT_GROUP, rounded_to
from ep_export.planning import TEXT_TOKENS, Plan, settled_keep
from ep_export.policy import DEFAULT_DEGREE, Chooser, Cut, Keep, Schedule
from ep_export.progress import Progress, silent
from ep_export.spelling import parse_chooser, parse_cut, parse_share

if TYPE_CHECKING:
    from types import TracebackType

    from PIL import Image
    from transformers import PreTrainedModel

    from ep_export.building import BuildResult
    from ep_export.bundle import Bundle
    from ep_export.families.base import Video, Visual
    from ep_export.reference import PruneTrace
    from ep_export.runtime import Generation, Session
    from ep_export.serving import Engine

__all__ = ["OpenBundle", "build", "open_bundle", "plan", "prune"]

Share: TypeAlias = "float | str"
"""How much is kept, as an average over the layers: 0.25 or "25%"."""

Pictures: TypeAlias = "Shown | list[Shown] | tuple[Shown, ...] | None"
Shown: TypeAlias = "str | os.PathLike[str] | Image.Image | Video"
"""A picture's file, a picture, or the frames of a video."""


def plan(
    model: str | os.PathLike[str],
    *,
    keep: Share | None = None,
    keep_tokens: int | None = None,
    layer: int | None = None,
    policy: str | Chooser | None = None,
    cuts: Sequence[str | Cut] = (),
    calibration: str | os.PathLike[str] | None = None,
    text_tokens: int = TEXT_TOKENS,
) -> Plan:
    """What pruning saves for one typical picture, from the config alone.

    >>> import ep_export
    >>> saved = ep_export.plan("qwen2.5-vl-7b", keep=0.25)
    >>> saved.visual_tokens, saved.kept_visual_tokens
    (391, (86,))
    >>> f"{1 - saved.first_token.pruned / saved.first_token.full:.0%} of the FLOPs to the first token"
    '47% of the FLOPs to the first token'

    Args:
        model: Alias, hub id or directory.
        keep: Share of the visual tokens, as an average over the layers.
        keep_tokens: The same in tokens; one of the two, unless the cuts say it.
        layer: Prune before this layer.
        policy: Which tokens stay there.
        cuts: In place of layer and policy, one or more of `LAYER:SHARE[:POLICY]`.
        calibration: A record of `ep-export calibrate`.
        text_tokens: Of the prompt.

    Raises:
        UserError: See `open_config` and `resolve_schedule`.
    """
    from ep_export.checkpoint import open_config
    from ep_export.first_token import processor_settings, typical_work

    config = open_config(os.fspath(model))
    request = _schedule_request(layer, policy, cuts, calibration)
    settled = settle(config, request, keep=_keep(keep, keep_tokens))
    directory = Path(os.fspath(model))
    work = typical_work(config, processor_settings(config, directory) if directory.is_dir() else None)
    return settled.plan(work, text_tokens=text_tokens)


def build(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    keep: Share | None = None,
    keep_tokens: int | None = None,
    layer: int | None = None,
    policy: str | Chooser | None = None,
    cuts: Sequence[str | Cut] = (),
    calibration: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    prompts: str | os.PathLike[str] | None = None,
    weights: str = "none",
    group: int = DEFAULT_GROUP,
    vision_weights: str = "none",
    dialect: str = "onnxruntime",
    precision: str = "fp32",
    overwrite: bool = False,
    validate: bool = True,
    progress: Progress = silent,
) -> BuildResult:
    """Turn a checkpoint into a pruned bundle that was compared with PyTorch. Needs the extra [export].

    >>> import ep_export
    >>> result = ep_export.build("digit-reader", "bundle", keep=0.25, layer=1, policy="divprune")
    >>> result.report.verdict.value, result.bundle.path.name
    ('PASS', 'bundle')

    Args:
        model: Alias, hub id or directory.
        out: The bundle.
        keep: See `plan`.
        keep_tokens: See `plan`.
        layer: See `plan`.
        policy: See `plan`.
        cuts: See `plan`.
        calibration: See `plan`.
        images: Folder of pictures: calibrates where nothing says where to prune; validates on them.
        prompts: JSON file, picture -> questions.
        weights: "none", "int8", "int4" or "fp8".
        group: Inputs that share a scale in int4.
        vision_weights: Of the vision encoder: "none" or "int8", beside `weights`.
        dialect: "onnxruntime", "portable" or "modern"; the last two are for compilers.
        precision: "fp32", "fp16" or "bf16".
        overwrite: Replace an earlier bundle.
        validate: Compare with PyTorch.
        progress: Told about every stage.

    Raises:
        UserError: See `ep_export.building.prepare` and `ep_export.building.build`.
    """
    from ep_export.building import BuildRequest, prepare
    from ep_export.building import build as build_bundle
    from ep_export.bundle import Dialect, Precision, WeightsMode

    request = BuildRequest(
        model=os.fspath(model),
        keep=_keep(keep, keep_tokens),
        schedule=_schedule_request(layer, policy, cuts, calibration),
        out=Path(out),
        overwrite=overwrite,
        dialect=_one_of(Dialect, dialect, "dialect"),
        precision=_one_of(Precision, precision, "precision"),
        shards=WeightsMode.LINK,
        degree=DEFAULT_DEGREE,
        weights=rounded_to(weights, group, vision_weights),
        images=None if images is None else Path(images),
        prompts=None if prompts is None else Path(prompts),
    )
    return build_bundle(prepare(request, progress), check=validate, progress=progress)


def open_bundle(
    bundle: str | os.PathLike[str],
    *,
    providers: Sequence[str] = ("cpu",),
    threads: int | None = None,
    exact: bool = False,
    verify: bool = True,
) -> OpenBundle:
    """Open a bundle for questions, with ONNX Runtime and no torch: `ep_export.open`.

    >>> import ep_export
    >>> with ep_export.open("bundle") as bundle:
    ...     answer = bundle.answer("photo.png", "List the digits.")
    >>> answer.visual_tokens > len(answer.kept_index)
    True

    Args:
        bundle: The bundle's directory.
        providers: Execution providers by short name, the best first: cpu, cuda, tensorrt, ...
        threads: CPU threads; all when None.
        exact: Multiply quantised weights by activations as they are, not rounded to 8 bits.
        verify: Compute every checksum before use.

    Raises:
        UserError: The bundle is broken, or cannot be run here.
    """
    from ep_export.bundle import Bundle
    from ep_export.runtime import Session

    opened = Bundle.open(Path(bundle), verify=verify)
    return OpenBundle(Session.open(opened, providers=providers, threads=threads, exact=exact))


class OpenBundle:
    """A bundle opened for questions. Use as a context manager, or call `close`.

    Attributes:
        session: What runs it, for everything that `answer` and `stream` do not offer.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._engine: Engine | None = None

    @property
    def bundle(self) -> Bundle:
        """The bundle itself: `bundle.manifest` says what it holds."""
        return self.session.bundle

    def answer(
        self,
        pictures: Pictures,
        question: str,
        *,
        max_new_tokens: int = 128,
        keep: Share | None = None,
        policy: str | Sequence[str] = (),
        prune: bool = True,
    ) -> Generation:
        """Answer a question about pictures, greedily.

        >>> import ep_export
        >>> with ep_export.open("bundle") as bundle:
        ...     pruned = bundle.answer("photo.png", "List the digits.")
        ...     full = bundle.answer("photo.png", "List the digits.", prune=False)
        >>> pruned.answer == full.answer
        True

        Args:
            pictures: One, several in prompt order, or None.
            question: The question.
            max_new_tokens: Longest answer.
            keep: The bundle's when None.
            policy: One of the bundle's; or one for each cut.
            prune: False asks the unpruned model.

        Raises:
            UserError: A picture cannot be read, or the prompt is too long.
        """
        return self.session.generate(
            _visuals(pictures),
            question,
            max_new_tokens=max_new_tokens,
            keep=_keep(keep, None),
            policies=(policy,) if isinstance(policy, str) else policy,
            prune=prune,
        )

    def stream(
        self,
        pictures: Pictures,
        question: str,
        *,
        max_new_tokens: int = 128,
        keep: Share | None = None,
        policy: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """The same, piece by piece as the text comes. Arguments as for `answer`.

        >>> import ep_export
        >>> with ep_export.open("bundle") as bundle:
        ...     pieces = list(bundle.stream("photo.png", "List the digits."))
        >>> len(pieces) >= 1
        True
        """
        from ep_export.serving import Engine, Request

        if self._engine is None:
            self._engine = Engine(self.session, slots=1)
        request = Request(
            question=question,
            visuals=tuple(_visuals(pictures)),
            keep=_keep(keep, None),
            policies=(policy,) if isinstance(policy, str) else tuple(policy),
            max_new_tokens=max_new_tokens,
        )
        stream = self._engine.submit(request)
        try:
            yield from stream
        finally:
            stream.cancel()

    def close(self) -> None:
        """Close it."""
        if self._engine is not None:
            self._engine.close(drain=False)
        self.session.close()

    def __enter__(self) -> OpenBundle:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def prune(
    model: PreTrainedModel,
    spec: Any = None,
    *,
    keep: Share | None = None,
    keep_tokens: int | None = None,
    layer: int | None = None,
    policy: str | Chooser = "paper",
    cuts: Sequence[str | Cut] = (),
) -> Iterator[PruneTrace]:
    """Run a Hugging Face model pruned: its own `forward` and `generate`, restored on leaving. Needs torch.

    >>> import ep_export
    >>> from ep_export.checkpoint import open_checkpoint
    >>> from ep_export.reference import load_model
    >>> model = load_model(open_checkpoint("digit-reader"))
    >>> with ep_export.prune(model, keep=0.25, layer=1, policy="divprune") as trace:
    ...     pass  # model.generate(**inputs)
    >>> trace.cuts  # what was kept, after a prefill
    ()

    Args:
        model: Of a known family.
        spec: A `Plan` or `PruneSpec`, in place of all that follows.
        keep: See `plan`.
        keep_tokens: See `plan`.
        layer: Prune before this layer.
        policy: Which tokens stay there.
        cuts: In place of layer and policy.

    Raises:
        UserError: See `ep_export.reference.prune`.
    """
    from ep_export.reference import PruneSpec
    from ep_export.reference import prune as prune_model

    if spec is None:
        if not cuts and layer is None:
            raise UsageError("prune does not know where", hint="give layer=1, cuts=['1:25%'], or a plan")
        request = _schedule_request(layer, policy, cuts, None)
        schedule = Schedule(request.cuts or (Cut(layer or 0, request.chooser),))  # type: ignore[arg-type]
        layers = model.config.get_text_config().num_hidden_layers
        spec = PruneSpec(schedule, settled_keep(_keep(keep, keep_tokens), schedule, layers=layers))
    with prune_model(model, spec) as trace:
        yield trace


def _schedule_request(
    layer: int | None,
    policy: str | Chooser | None,
    cuts: Sequence[str | Cut],
    calibration: str | os.PathLike[str] | None,
) -> ScheduleRequest:
    if cuts:
        if layer is not None:
            raise UsageError("layer and cuts exclude each other", hint="say it in the cut: '2:25%:divprune'")
        return ScheduleRequest(cuts=tuple(parse_cut(cut) if isinstance(cut, str) else cut for cut in cuts))
    return ScheduleRequest(
        layer=None if layer is None else int(layer),
        chooser=parse_chooser(policy) if isinstance(policy, str) else policy,
        calibration=None if calibration is None else Path(calibration),
    )


def _keep(share: Share | None, tokens: int | None) -> Keep | None:
    if share is not None and tokens is not None:
        raise UsageError("keep and keep_tokens exclude each other", hint="give one of them")
    if tokens is not None:
        return Keep(tokens=int(tokens))
    if share is None:
        return None
    try:
        return Keep(ratio=parse_share(share) if isinstance(share, str) else float(share))
    except ValueError:
        raise UsageError(f"keep {share!r} is no share", hint="give a number such as 0.25, or '25%'") from None


def _one_of(kind: Any, value: str, name: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(repr(each.value) for each in kind)
        raise UsageError(f"{name} is {value!r}", hint=f"known: {known}") from None


def _visuals(pictures: Pictures) -> list[Visual]:
    from ep_export.runtime import open_picture

    if pictures is None:
        return []
    several = pictures if isinstance(pictures, (list, tuple)) else (pictures,)
    return [open_picture(Path(each)) if isinstance(each, (str, os.PathLike)) else each for each in several]
