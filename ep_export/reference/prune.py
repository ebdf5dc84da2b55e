"""Prune a Hugging Face model while it runs: hooks on unmodified `forward` and `generate`.

On a prefill, layers 0..K-1 see the whole prompt. At the door of layer K the visual tokens are scored on
states of layer K-1, the kept ones are gathered with all text, and layers K..L-1 run on those M positions with
their original rotary positions. The KV cache therefore has two lengths. A decode step passes untouched: layer
0's cache still has the full length, which is what positions are counted from; only a mask, where there is
one, is cut to the columns the upper layers have.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ep_export.entropy import select_tokens, token_scores
from ep_export.errors import UserError
from ep_export.families import family_of
from ep_export.plan import check_keep, check_layer, kept_tokens
from ep_export.policy import Keep, Policy, Source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ep_export.families.base import DecoderModules

__all__ = ["Prunable", "PruneSpec", "PruneTrace", "SelectTokens", "prune", "visual_positions"]

SelectTokens = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]
"""(states [N, heads, head_dim], k, visual_index [N]) -> [k] kept prompt positions, in any order."""

_VISUAL_TOKEN_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_COLUMNS = "ep_export_columns"
"""Attribute of a cache: which columns of the full-length cache the layers from K on hold. It lives on the
cache so that a deep copy of it (Hugging Face's way to reuse a prompt) takes it along."""

_pruned: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


class Prunable(Protocol):
    """What `prune` reads: a `Plan` or a `PruneSpec`."""

    @property
    def policy(self) -> Policy:
        """Where and how tokens are pruned."""
        ...

    @property
    def keep(self) -> Keep:
        """How much is kept, as an average over the layers."""
        ...


@dataclass(frozen=True)
class PruneSpec:
    """The two fields of a plan that pruning needs, for prompts whose size is not known beforehand."""

    policy: Policy
    keep: Keep


@dataclass
class PruneTrace:
    """What the last prefill inside `prune` did; every field is None before the first one.

    Attributes:
        visual_index: [N] int64, positions of the visual tokens in the prompt.
        kept_index: [M] int64, positions that reach layer K.
        scores: [N] float64, exact; None when `select` was given.
        states: [N, heads, head_dim] as the layer computed them: what was scored.
    """

    visual_index: torch.Tensor | None = None
    kept_index: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    states: torch.Tensor | None = None


@contextmanager
def prune(
    model: PreTrainedModel, plan: Prunable, *, select: SelectTokens | None = None
) -> Iterator[PruneTrace]:
    """Inside the block, `model(...)` and `model.generate(...)` run pruned. The model is restored on leaving.

    Prompts without pictures and decode steps pass through untouched. Logits of a pruned forward have M
    positions; the last is the prompt's last. Batch 1 only, hence no beam search.

    Args:
        model: A Hugging Face model of a supported family, with `sdpa` or `eager` attention.
        plan: A plan or `PruneSpec`; the number kept is worked out from `keep` for each prompt's own N.
        select: Chooses the kept tokens instead of the policy's scores, e.g. at random.

    Yields:
        The trace, filled by each prefill.

    Raises:
        UserError: Unsupported family, K outside 1..L-1, nested use, another attention implementation; and,
            from the forward, more than one prompt in the batch, embeddings without ids, labels, a static or
            sliding cache, or a keep below what K allows.
    """
    decoder = family_of(model.config.model_type).decoder(model)
    _check(model, plan, len(decoder.layers))
    trace = PruneTrace()
    hooks = _Hooks(model, decoder, plan, select, trace)
    _pruned.add(model)
    with ExitStack() as undo:
        undo.callback(_pruned.discard, model)
        hooks.install(undo)
        yield trace


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


def _check(model: PreTrainedModel, plan: Prunable, layers: int) -> None:
    if model in _pruned:
        raise UserError(
            "this model is being pruned already", hint="leave the inner `prune`; one block holds at a time"
        )
    check_keep(plan.keep)
    check_layer(plan.policy.layer, layers)
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
    """

    visual: torch.Tensor
    length: int
    past: int


class _Hooks:
    """The hooks of one `prune` block and the state of the forward they are in."""

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: DecoderModules,
        plan: Prunable,
        select: SelectTokens | None,
        trace: PruneTrace,
    ) -> None:
        self._model = model
        self._decoder = decoder
        self._policy = plan.policy
        self._keep = plan.keep
        self._select = select
        self._trace = trace
        self._prompt: _Prompt | None = None
        self._states: torch.Tensor | None = None
        self._kept: torch.Tensor | None = None  # [M], when this forward was pruned
        self._columns: torch.Tensor | None = None  # full-cache columns of the upper layers, when not all

    def install(self, undo: ExitStack) -> None:
        """Register every hook; `undo` removes them."""
        layers, split = self._decoder.layers, self._policy.layer
        model = self._model
        undo.callback(model.register_forward_pre_hook(self._enter_forward, with_kwargs=True).remove)
        # always_call: a forward that fails must not leave its prompt behind
        undo.callback(model.register_forward_hook(self._leave_forward, always_call=True).remove)
        undo.callback(layers[0].register_forward_pre_hook(self._refuse_bypass).remove)
        if self._policy.source is not Source.HIDDEN:
            attention: Any = layers[split - 1].self_attn
            projection = {
                Source.QUERY: attention.q_proj,
                Source.KEY: attention.k_proj,
                Source.VALUE: attention.v_proj,
            }[self._policy.source]
            undo.callback(projection.register_forward_hook(self._capture_states).remove)
        for index in range(split, len(layers)):
            hook = functools.partial(self._enter_upper_layer, first=index == split)
            undo.callback(layers[index].register_forward_pre_hook(hook, with_kwargs=True).remove)

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
        cache = kwargs.get("past_key_values")
        # one token is a decode step, whatever its id
        visual = visual_positions(ids[0], self._model.config) if length > 1 else ids.new_empty(0)
        self._prompt = _Prompt(visual, length, _plain_cache_length(cache))
        if length > 1:
            self._trace.visual_index = visual.cpu()
            self._trace.kept_index = torch.arange(length)
            self._trace.scores = self._trace.states = None

    def _leave_forward(self, *_: Any) -> None:
        self._prompt = self._states = self._kept = self._columns = None

    def _refuse_bypass(self, _module: Any, _args: Any) -> None:
        if self._prompt is None:
            raise UserError(
                "the decoder was called without its model, so the visual tokens are unknown",
                hint="inside `prune` call the model itself, or its generate",
            )

    def _capture_states(self, _module: Any, _args: Any, output: torch.Tensor) -> None:
        if self._prompt is not None and len(self._prompt.visual):
            self._states = output[0, self._prompt.visual]

    def _enter_upper_layer(
        self, _layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, first: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if first:
            self._choose(hidden)
            self._place(kwargs.get("past_key_values"), hidden.device)
            if self._kept is not None:
                hidden = hidden.index_select(1, self._kept)
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": hidden}
        return args, _cut(kwargs, self._kept, self._columns)

    def _choose(self, hidden: torch.Tensor) -> None:
        """Score the visual tokens at the door of layer K and decide which positions go on."""
        prompt = self._require_prompt()
        count = len(prompt.visual)
        if not count:
            return
        states = self._states if self._states is not None else hidden[0, prompt.visual]
        states = states.view(count, self._heads(), -1)
        keep = kept_tokens(
            self._keep, layers=len(self._decoder.layers), layer=self._policy.layer, visual_tokens=count
        )
        kept_visual, scores = self._selection(states, keep, prompt.visual)
        stays = torch.ones(prompt.length, dtype=torch.bool, device=hidden.device)
        stays[prompt.visual] = False
        stays[kept_visual] = True
        self._kept = stays.nonzero()[:, 0]
        self._trace.kept_index = self._kept.cpu()
        self._trace.scores = scores
        self._trace.states = states.detach().cpu()

    def _selection(
        self, states: torch.Tensor, keep: int, visual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._select is not None:
            chosen = self._select(states, keep, visual)
            if len(set(chosen.tolist())) != keep or not torch.isin(chosen, visual).all():
                expected = f"{keep} different positions of visual tokens"
                raise ValueError(f"select must return {expected}, got {chosen.tolist()}")
            return chosen, None
        policy = self._policy
        scores = token_scores(states, policy.scorer).cpu()
        chosen = select_tokens(
            scores, keep, select=policy.select, visual_index=visual.cpu(), budget=policy.budget
        )
        return chosen.to(visual.device), scores

    def _heads(self) -> int:
        """Rows a token's states are seen as: query heads, or key/value heads for key and value."""
        dims = family_of(self._model.config.model_type).dims(self._model.config)
        return dims.kv_heads if self._policy.source in {Source.KEY, Source.VALUE} else dims.heads

    def _place(self, cache: Any, device: torch.device) -> None:
        """Work out which columns of the full-length cache the layers from K on have after this forward."""
        prompt = self._require_prompt()
        past = torch.arange(prompt.past, device=device)
        if cache is not None:
            if prompt.past:  # else a leftover of a cache that was reset
                past = getattr(cache, _COLUMNS, past)
            held = cache.get_seq_length(self._policy.layer)
            if held != len(past):
                raise UserError(
                    f"the cache holds {held} tokens at layer {self._policy.layer}, expected {len(past)}",
                    hint="a cache pruned at one layer cannot go on at another; start from the prompt",
                )
        new = self._kept if self._kept is not None else torch.arange(prompt.length, device=device)
        columns = torch.cat([past, prompt.past + new])
        if len(columns) == prompt.past + prompt.length:
            return
        self._columns = columns
        if cache is not None:
            setattr(cache, _COLUMNS, columns)

    def _require_prompt(self) -> _Prompt:
        if self._prompt is None:  # unreachable: layer 0 refuses first
            raise RuntimeError("a decoder layer ran outside the model's forward")
        return self._prompt


def _plain_cache_length(cache: Any) -> int:
    """Length of a growing cache.

    Raises:
        UserError: The cache is static, sliding or of another kind: its masks cannot be cut by column.
    """
    if cache is None:
        return 0
    if getattr(cache, "is_compileable", True) or any(getattr(cache, "is_sliding", [True])):
        raise UserError(
            f"a {type(cache).__name__} that is static or sliding cannot be pruned",
            hint="leave cache_implementation out; the default DynamicCache grows",
        )
    return int(cache.get_seq_length())


def _cut(
    kwargs: Mapping[str, Any], rows: torch.Tensor | None, columns: torch.Tensor | None
) -> dict[str, Any]:
    """Keyword arguments of a decoder layer for the positions it is to see.

    Args:
        kwargs: As the model passes them.
        rows: [M] positions of this forward that stay; None for all.
        columns: Columns of the full-length cache that the layer holds; None for all.
    """
    cut = dict(kwargs)
    if rows is not None:
        cos, sin = kwargs["position_embeddings"]
        cut["position_embeddings"] = (cos.index_select(-2, rows), sin.index_select(-2, rows))
        if kwargs.get("position_ids") is not None:
            cut["position_ids"] = kwargs["position_ids"].index_select(-1, rows)
    mask = kwargs.get("attention_mask")
    # None stays None: causal for a prefill, everything for a decode step, both by order
    if mask is not None and columns is not None:
        mask = mask.index_select(-1, columns)
        cut["attention_mask"] = mask if rows is None else mask.index_select(-2, rows)
    return cut
