"""What the oracle computes on the way: every quantity the exported components are compared with."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ep_export.families import family_of
from ep_export.reference.prune import CutTrace, Prunable, PruneTrace, SelectTokens, prune
from ep_export.reference.spans import SpanRecorder

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

    from ep_export.families.base import Family, PromptInputs

__all__ = ["Answer", "PrefillStates", "capture", "greedy", "greedy_answer"]


@dataclass(frozen=True)
class PrefillStates:
    """One pruned prefill of the oracle. Tensors are on the CPU, in the model's type unless said otherwise.

    Attributes:
        inputs_embeds: [1, S, d] what enters the decoder, visual embeddings in place.
        position_ids: [A, 1, S] int64 as Hugging Face computed them for the rotary embedding.
        visual_embeds: [N, d] the rows of `inputs_embeds` that the vision encoder made.
        visual_index: [N] int64.
        cuts: What every cut did; empty for a prompt without pictures.
        hidden_before: For every cut [1, S_i, d], what arrives there.
        hidden_after: For every cut [1, M_i, d], what enters its layer.
        kept_index: [M] int64 prompt positions that reach the last layer.
        logits: [V] float32 at the last position.
        caches: Per layer (key, value), [1, kv_heads, tokens its span holds, head_dim].
    """

    inputs_embeds: torch.Tensor
    position_ids: torch.Tensor
    visual_embeds: torch.Tensor
    visual_index: torch.Tensor
    cuts: tuple[CutTrace, ...]
    hidden_before: tuple[torch.Tensor, ...]
    hidden_after: tuple[torch.Tensor, ...]
    kept_index: torch.Tensor
    logits: torch.Tensor
    caches: tuple[tuple[torch.Tensor, torch.Tensor], ...]


def capture(
    model: PreTrainedModel, prompt: PromptInputs, plan: Prunable, *, select: SelectTokens | None = None
) -> PrefillStates:
    """Run one pruned prefill and keep what it computed.

    Args:
        model: From `load_model`.
        prompt: The prompt; Hugging Face computes its own position ids.
        plan: See `prune`.
        select: See `prune`.

    Raises:
        UserError: See `prune`.
    """
    family = family_of(model.config.model_type)
    decoder = family.decoder(model)
    inputs = _on_device(family.reference_inputs(prompt, model.config), model)
    cuts = [cut.layer for cut in plan.schedule.cuts]
    # One is installed before `prune`, so that it sees what arrives, and one after
    before, after = (SpanRecorder(decoder, [0, *cuts], projections=False) for _ in range(2))
    positions: list[torch.Tensor] = []

    with ExitStack() as undo, torch.inference_mode():
        undo.callback(_record_positions(decoder.rotary, positions))
        before.install(undo)
        trace = undo.enter_context(prune(model, plan, select=select))
        after.install(undo)
        output = model(**inputs, use_cache=True)
    return _states(
        trace,
        embeds=before.hidden[0].cpu(),
        positions=positions[-1].cpu(),
        before=tuple(before.hidden[layer].cpu() for layer in cuts),
        after=tuple(after.hidden[layer].cpu() for layer in cuts),
        output=output,
    )


@dataclass(frozen=True)
class Answer:
    """A greedy answer with what it was chosen from.

    Attributes:
        token_ids: The new ids, the end token included when it came.
        scores: [tokens, V] float32, each row what its token is the argmax of: logits after the penalty.
    """

    token_ids: tuple[int, ...]
    scores: torch.Tensor


def greedy(
    model: PreTrainedModel,
    family: Family,
    config: PreTrainedConfig,
    prompt: PromptInputs,
    max_new_tokens: int,
    *,
    plan: Prunable | None = None,
    select: SelectTokens | None = None,
    eos_token_ids: Sequence[int] | None = None,
) -> list[int]:
    """Token ids of the plain argmax answer, without any penalty the checkpoint asks for.

    Args:
        model: From `load_model`.
        family: The model's family.
        config: The model's config.
        prompt: The prompt.
        max_new_tokens: At most so many tokens.
        plan: Prune by it; None runs the whole model (or inside the caller's own `prune` block).
        select: See `prune`.
        eos_token_ids: Where to stop; the checkpoint's own when None.

    Returns:
        The new token ids, the end token included when it came.
    """
    stop = eos_token_ids if eos_token_ids is not None else model.generation_config.eos_token_id
    settings = _greedy_settings(max_new_tokens, stop, repetition_penalty=1.0)
    return list(_answer(model, family.reference_inputs(prompt, config), settings, plan, select).token_ids)


def greedy_answer(
    model: PreTrainedModel,
    prompt: PromptInputs,
    max_new_tokens: int,
    *,
    plan: Prunable | None,
    eos_token_ids: Sequence[int],
    repetition_penalty: float,
    select: SelectTokens | None = None,
) -> Answer:
    """Greedy answer with the scores it was chosen from.

    Args:
        model: From `load_model`.
        prompt: The prompt.
        max_new_tokens: At most so many tokens.
        plan: See `prune`; None: nothing is pruned.
        eos_token_ids: Where to stop.
        repetition_penalty: 1 is plain argmax.
        select: See `prune`.
    """
    inputs = family_of(model.config.model_type).reference_inputs(prompt, model.config)
    settings = _greedy_settings(max_new_tokens, eos_token_ids, repetition_penalty)
    return _answer(model, inputs, settings, plan, select)


def _answer(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    settings: GenerationConfig,
    plan: Prunable | None,
    select: SelectTokens | None,
) -> Answer:
    block = prune(model, plan, select=select) if plan is not None else nullcontext()
    with block, torch.inference_mode():
        out = model.generate(**_on_device(inputs, model), generation_config=settings)
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    return Answer(tuple(new.tolist()), torch.cat(out.scores).float().cpu())


def _on_device(inputs: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.to(model.device) for name, value in inputs.items()}


def _greedy_settings(max_new_tokens: int, stop: Any, repetition_penalty: float) -> GenerationConfig:
    """Everything that changes an answer, said here: what stays None is taken from the checkpoint's file."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=repetition_penalty,
        eos_token_id=list(stop) if isinstance(stop, Sequence) else stop,
        pad_token_id=0,  # batch 1 never pads; without it generate warns
        output_scores=True,
        return_dict_in_generate=True,
    )


def _record_positions(rotary: torch.nn.Module, seen: list[torch.Tensor]) -> Any:
    """Keep the position ids that enter the rotary embedding; returns the hook's remover."""
    name = list(inspect.signature(rotary.forward).parameters)[1]

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[1] if len(args) > 1 else kwargs[name])

    return rotary.register_forward_pre_hook(hook, with_kwargs=True).remove


def _states(
    trace: PruneTrace,
    *,
    embeds: torch.Tensor,
    positions: torch.Tensor,
    before: tuple[torch.Tensor, ...],
    after: tuple[torch.Tensor, ...],
    output: Any,
) -> PrefillStates:
    if trace.visual_index is None:
        raise RuntimeError("the forward did not fill the trace")  # unreachable: a prefill always does
    return PrefillStates(
        inputs_embeds=embeds,
        position_ids=positions.reshape(-1, 1, positions.shape[-1]),
        visual_embeds=embeds[0, trace.visual_index],
        visual_index=trace.visual_index,
        cuts=trace.cuts,
        hidden_before=before,
        hidden_after=after,
        kept_index=trace.kept_index,
        logits=output.logits[0, -1].float().cpu(),
        caches=tuple((layer.keys.cpu(), layer.values.cpu()) for layer in output.past_key_values.layers),
    )
