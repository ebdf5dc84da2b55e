"""Prune a Hugging Face model while it runs: hooks on unmodified `forward` and `generate`.

On a prefill, the layers before the first cut see the whole prompt. Where a cut stands, a chooser says which
visual tokens stay; they are gathered with all text, and the layers from there on run on those positions with
their original rotary positions. The KV cache therefore has a length for each span of layers. A decode step
passes untouched: the cache still tells the full length, which is what positions are counted from; only a
mask, where there is one, is cut to the columns that a span's layers hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ep_export.adaptive import check_adaptive, own_tokens
from ep_export.choosers import CutTokens, choose
from ep_export.errors import UserError
from ep_export.families import family_of
from ep_export.planning import check_keep, check_schedule, kept_tokens
from ep_export.policy import Keep, Schedule, Source, scored_source
from ep_export.reference.caches import note_columns, past_columns, plain_length
from ep_export.reference.spans import SpanRecorder, cut_tokens, layer_arguments, staying

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "CutTrace",
    "Prunable",
    "PruneSpec",
    "PruneTrace",
    "SelectTokens",
    "kept_as",
    "prune",
    "visual_positions",
]

SelectTokens = Callable[[int, CutTokens, int], torch.Tensor]
"""(number of the cut, what arrived there, k) -> [k] positions that stay, in the arriving sequence, in any
order."""

_VISUAL_TOKEN_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")

_pruned: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


class Prunable(Protocol):
    """What `prune` reads: a `Plan` or a `PruneSpec`."""

    @property
    def schedule(self) -> Schedule:
        """Where and how tokens are pruned."""
        ...

    @property
    def keep(self) -> Keep:
        """How much is kept, as an average over the layers."""
        ...


@dataclass(frozen=True)
class PruneSpec:
    """The two fields of a plan that pruning needs, for prompts whose size is not known beforehand."""

    schedule: Schedule
    keep: Keep


@dataclass(frozen=True)
class CutTrace:
    """What one cut did with one prompt. Everything is on the CPU.

    Attributes:
        visual_index: [N_i] int64, prompt positions of the visual tokens that arrived.
        arrived: [S_i] int64, prompt positions of the sequence that arrived.
        tokens: What the chooser looked at; its positions are those of the arriving sequence.
        kept_index: [M_i] int64, prompt positions that go on.
        scores: [N_i] float64, exact; None when `select` was given, and for `Nothing`.
    """

    visual_index: torch.Tensor
    arrived: torch.Tensor
    tokens: CutTokens
    kept_index: torch.Tensor
    scores: torch.Tensor | None

    @property
    def kept_visual(self) -> torch.Tensor:
        """[k_i] int64, prompt positions of the visual tokens that go on."""
        return self.visual_index[torch.isin(self.visual_index, self.kept_index)]


@dataclass
class PruneTrace:
    """What the last prefill inside `prune` did; empty before the first one.

    Attributes:
        visual_index: [N] int64, positions of the visual tokens in the prompt.
        length: Tokens of the prompt.
        cuts: What every cut did; empty for a prompt without visual tokens.
    """

    visual_index: torch.Tensor | None = None
    length: int = 0
    cuts: tuple[CutTrace, ...] = ()

    @property
    def kept_index(self) -> torch.Tensor:
        """[M] int64, prompt positions that reach the last layer (so far)."""
        return self.cuts[-1].kept_index if self.cuts else torch.arange(self.length)


@contextmanager
def prune(
    model: PreTrainedModel, plan: Prunable, *, select: SelectTokens | None = None
) -> Iterator[PruneTrace]:
    """Inside the block, `model(...)` and `model.generate(...)` run pruned. The model is restored on leaving.

    Prompts without pictures and decode steps pass through untouched. Logits of a pruned forward have as many
    positions as reach the last layer; the last is the prompt's last. Batch 1 only, hence no beam search.

    Args:
        model: A Hugging Face model of a supported family, with `sdpa` or `eager` attention.
        plan: A plan or `PruneSpec`; the numbers kept are worked out from `keep` for each prompt's own N.
        select: Chooses the kept tokens instead of the schedule's choosers, e.g. those of another runtime.

    Yields:
        The trace, filled by each prefill.

    Raises:
        UserError: Unsupported family, an impossible schedule, nested use, another attention implementation;
            and, from the forward, more than one prompt in the batch, embeddings without ids, labels, a static
            or sliding cache, one pruned at other layers, or a keep the cuts cannot reach.
    """
    _check(model, plan)
    hooks = _Hooks(model, plan, select)
    _pruned.add(model)
    with ExitStack() as undo:
        undo.callback(_pruned.discard, model)
        hooks.install(undo)
        yield hooks.trace


def kept_as(kept: Sequence[torch.Tensor | NDArray[np.int64]]) -> SelectTokens:
    """Choose at every cut what somebody else chose there.

    Args:
        kept: For every cut the prompt positions that go on, text included, ascending.
    """
    positions = [torch.as_tensor(index) for index in kept]

    def select(cut: int, tokens: CutTokens, _k: int) -> torch.Tensor:
        # positions of what arrives, which before the first cut is the prompt
        stays = positions[0]
        if cut:
            stays = torch.isin(positions[cut - 1], positions[cut]).nonzero()[:, 0]
        index = tokens.visual_index.cpu()
        return index[torch.isin(index, stays.cpu())]

    return select


def visual_positions(input_ids: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Positions of image and video placeholders.

    Args:
        input_ids: [S] int64.
        config: The model's config; `image_token_id`, `video_token_id` or their `_index` spellings.

    Returns:
        [N] int64, ascending.
    """
    known = [getattr(config, name, None) for name in _VISUAL_TOKEN_IDS]
    ids = torch.tensor([value for value in known if value is not None], device=input_ids.device)
    return torch.isin(input_ids, ids).nonzero()[:, 0]


def _check(model: PreTrainedModel, plan: Prunable) -> None:
    dims = family_of(model.config.model_type).dims(model.config)
    if model in _pruned:
        raise UserError(
            "this model is being pruned already", hint="leave the inner `prune`; one block holds at a time"
        )
    check_keep(plan.keep)
    check_schedule(plan.schedule, dims.layers)
    check_adaptive(plan.keep, plan.schedule)
    attention = model.config.get_text_config()._attn_implementation  # noqa: SLF001 - the only place it is kept
    if attention not in {"sdpa", "eager"}:
        # Flash attention takes gaps in position_ids for borders between packed sequences.
        raise UserError(
            f"attention implementation {attention!r} cannot run pruned, expected 'sdpa' or 'eager'",
            hint='load the model with attn_implementation="sdpa"',
        )


@dataclass(frozen=True)
class _Prompt:
    """One forward of the model.

    Attributes:
        visual: [N] int64 positions in this forward's tokens; empty when nothing is to be pruned.
        length: Tokens of this forward.
        past: Tokens in the cache before it.
        budgets: For every cut the visual tokens that go on; zeros when nothing is to be pruned.
    """

    visual: torch.Tensor
    length: int
    past: int
    budgets: tuple[int, ...]


@dataclass(frozen=True)
class _Span:
    """What the layers between two cuts see of the forward they are in.

    Attributes:
        rows: [M] positions of this forward's tokens; None for all.
        columns: [P + M] columns of the full-length cache after this forward; None for all.
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None


class _Hooks:
    """The hooks of one `prune` block and the state of the forward they are in."""

    def __init__(self, model: PreTrainedModel, plan: Prunable, select: SelectTokens | None) -> None:
        family = family_of(model.config.model_type)
        self.trace = PruneTrace()
        self._model = model
        self._decoder = family.decoder(model)
        self._dims = family.dims(model.config)
        self._plan = plan
        self._select = select
        self._cut_layers = tuple(cut.layer for cut in plan.schedule.cuts)
        self._recorder = SpanRecorder(self._decoder, self._cut_layers)
        self._prompt: _Prompt | None = None
        self._span = _Span()

    def install(self, undo: ExitStack) -> None:
        """Register every hook; `undo` removes them."""
        layers, model = self._decoder.layers, self._model
        undo.callback(model.register_forward_pre_hook(self._enter_forward, with_kwargs=True).remove)
        # always_call: a forward that fails must not leave its prompt behind
        undo.callback(model.register_forward_hook(self._leave_forward, always_call=True).remove)
        undo.callback(layers[0].register_forward_pre_hook(self._refuse_bypass).remove)
        self._recorder.install(undo)  # before the hooks that prune: it sees what arrives
        for index in range(self._cut_layers[0], len(layers)):
            cut = self._cut_layers.index(index) if index in self._cut_layers else None
            hook = layers[index].register_forward_pre_hook(self._enter_layer(cut), with_kwargs=True)
            undo.callback(hook.remove)

    def _enter_forward(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise UserError(
                "pruning needs input_ids to find the visual tokens, got only embeddings",
                hint="pass input_ids and pixel values, not inputs_embeds",
            )
        if ids.shape[0] != 1:
            raise UserError(
                f"pruning runs one prompt at a time, got a batch of {ids.shape[0]}",
                hint="call it for each prompt; num_beams and num_return_sequences must be 1",
            )
        if kwargs.get("labels") is not None:
            raise UserError(
                "a pruned forward has fewer positions than labels",
                hint="compute the loss from the logits outside",
            )
        length = ids.shape[1]
        # one token is a decode step, whatever its id
        visual = visual_positions(ids[0], self._model.config) if length > 1 else ids.new_empty(0)
        budgets = kept_tokens(
            self._plan.keep.largest, self._plan.schedule, layers=self._dims.layers, visual_tokens=len(visual)
        )
        self._prompt = _Prompt(visual, length, plain_length(kwargs.get("past_key_values")), budgets)
        if length > 1:
            self.trace.visual_index, self.trace.length, self.trace.cuts = visual.cpu(), length, ()

    def _leave_forward(self, *_: Any) -> None:
        self._prompt, self._span = None, _Span()
        self._recorder.clear()

    def _refuse_bypass(self, _module: Any, _args: Any) -> None:
        if self._prompt is None:
            raise UserError(
                "the decoder was called without its model, so the visual tokens are unknown",
                hint="inside `prune` call the model itself, or its generate",
            )

    def _enter_layer(self, cut: int | None) -> Any:
        """The hook of a layer from the first cut on; `cut` is the number of the cut that stands before it."""

        def hook(
            _layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden = args[0] if args else kwargs["hidden_states"]
            if cut is not None:
                hidden = self._pass_cut(cut, hidden, kwargs.get("past_key_values"))
            span = self._span
            kwargs = layer_arguments(
                kwargs,
                None if span.rows is None else [span.rows],
                None if span.columns is None else [span.columns],
            )
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return hook

    def _pass_cut(self, cut: int, hidden: torch.Tensor, cache: Any) -> torch.Tensor:
        """Choose what goes on at a cut, and note what the layers after it hold.

        Args:
            cut: Its number.
            hidden: [1, S, d] what arrives.
            cache: The forward's cache, if it has one.

        Returns:
            [1, M, d] what goes on.
        """
        prompt = self._prompt
        if prompt is None:  # unreachable: layer 0 refuses first
            raise RuntimeError("a decoder layer ran outside the model's forward")
        rows = self._span.rows
        if len(prompt.visual):
            arrived = torch.arange(prompt.length, device=hidden.device) if rows is None else rows
            local = self._choose(cut, hidden[0], arrived, prompt)
            if len(local) < len(arrived):
                rows, hidden = arrived[local], hidden.index_select(1, local)
        self._recorder.clear()  # projections of a long prompt are large, and no later cut reads these
        self._span = _Span(rows, self._place(cut, cache, rows, prompt, hidden.device))
        return hidden

    def _choose(self, cut: int, hidden: torch.Tensor, arrived: torch.Tensor, prompt: _Prompt) -> torch.Tensor:
        """[M] positions of the arriving sequence [S, d] that go on."""
        settings, k = self._plan.schedule.cuts[cut], prompt.budgets[cut]
        before = self.trace.cuts[-1].kept_visual.to(hidden.device) if self.trace.cuts else prompt.visual
        projections = self._recorder.projected(settings.layer)
        if scored_source(settings.chooser) is Source.ATTENTION:
            projections[Source.ATTENTION] = self._recorder.attention(settings.layer, self._dims)
        tokens = cut_tokens(
            settings,
            self._dims,
            hidden=hidden,
            projections=projections,
            visual_index=torch.isin(arrived, before).nonzero()[:, 0],
        )
        if self._select is None:
            choice = choose(settings.chooser, tokens, k)
            if self._plan.keep.threshold is not None and choice.scores is not None:
                choice = choose(settings.chooser, tokens, self._own_tokens(choice.scores, prompt))
            kept, scores = choice.kept.to(hidden.device), choice.scores
        else:
            kept, scores = self._selected(cut, tokens, k), None
        local = staying(len(arrived), tokens.visual_index, kept)
        trace = CutTrace(
            visual_index=before.cpu(),
            arrived=arrived.cpu(),
            tokens=_on_cpu(tokens),
            kept_index=arrived[local].cpu(),
            scores=None if scores is None else scores.cpu(),
        )
        self.trace.cuts = (*self.trace.cuts, trace)
        return local

    def _own_tokens(self, scores: torch.Tensor, prompt: _Prompt) -> int:
        """Where every prompt has a keep of its own, how many of its visual tokens go on."""
        size = {"layers": self._dims.layers, "visual_tokens": len(prompt.visual)}
        return own_tokens(self._plan.keep, scores.cpu().numpy(), self._plan.schedule, **size)

    def _selected(self, cut: int, tokens: CutTokens, k: int) -> torch.Tensor:
        """What the caller's `select` keeps: k tokens, or where every prompt has its own keep at most k.

        Raises:
            ValueError: It broke its contract.
        """
        if self._select is None:  # unreachable: `_choose` asks
            raise RuntimeError("there is no select")
        kept = self._select(cut, tokens, k).to(tokens.visual_index.device)
        count = len(set(kept.tolist()))
        right = count <= k if self._plan.keep.threshold is not None else count == k
        if not right or count < len(kept) or not torch.isin(kept, tokens.visual_index).all():
            expected = f"{k} different positions of visual tokens"
            raise ValueError(f"select must return {expected}, got {kept.tolist()}")
        return kept

    def _place(
        self, cut: int, cache: Any, rows: torch.Tensor | None, prompt: _Prompt, device: torch.device
    ) -> torch.Tensor | None:
        """[P + M] columns of the full-length cache that the layers after a cut hold; None for all."""
        layer, length = self._cut_layers[cut], prompt.past + prompt.length
        past = past_columns(cache, layer, prompt.past, cuts=self._cut_layers)
        new = torch.arange(prompt.length) if rows is None else rows.cpu()
        columns = torch.cat([past, prompt.past + new])
        if cache is not None:
            note_columns(cache, layer, columns, length, fresh=not prompt.past and cut == 0)
        return columns.to(device) if len(columns) < length else None


def _on_cpu(tokens: CutTokens) -> CutTokens:
    return CutTokens(
        hidden=tokens.hidden.detach().cpu(),
        states=None if tokens.states is None else tokens.states.detach().cpu(),
        visual_index=tokens.visual_index.cpu(),
    )
