"""The oracle: Hugging Face's own model, pruned. Everything exported is measured against it.

`load_model` gives the model, `prune` a block inside which its `forward` and `generate` run pruned, `capture`
every quantity of one prefill, `greedy` an answer.
"""

from __future__ import annotations

from ep_export.reference.capture import Answer, PrefillStates, capture, greedy, greedy_answer
from ep_export.reference.load import load_model
from ep_export.reference.prune import (
    CutTrace,
    Prunable,
    PruneSpec,
    PruneTrace,
    SelectTokens,
    kept_as,
    prune,
    visual_positions,
)
from ep_export.reference.spans import (
    SpanRecorder,
    cut_tokens,
    layer_arguments,
    layer_states,
    run_layers,
    staying,
)

__all__ = [
    "Answer",
    "CutTrace",
    "PrefillStates",
    "Prunable",
    "PruneSpec",
    "PruneTrace",
    "SelectTokens",
    "SpanRecorder",
    "capture",
    "cut_tokens",
    "greedy",
    "greedy_answer",
    "kept_as",
    "layer_arguments",
    "layer_states",
    "load_model",
    "prune",
    "run_layers",
    "staying",
    "visual_positions",
]
