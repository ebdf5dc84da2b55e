"""The oracle: Hugging Face's own model, pruned. Everything exported is measured against it.

`load_model` gives the model, `prune` a block inside which its `forward` and `generate` run pruned, `capture`
every quantity of one prefill, `greedy` an answer.
"""

from __future__ import annotations

from ep_export.reference.capture import Answer, PrefillStates, capture, greedy, greedy_answer
from ep_export.reference.load import load_model
from ep_export.reference.prune import Prunable, PruneSpec, PruneTrace, SelectTokens, prune, visual_positions

__all__ = [
    "Answer",
    "PrefillStates",
    "Prunable",
    "PruneSpec",
    "PruneTrace",
    "SelectTokens",
    "capture",
    "greedy",
    "greedy_answer",
    "load_model",
    "prune",
    "visual_positions",
]
