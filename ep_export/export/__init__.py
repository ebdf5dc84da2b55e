"""Export: a checkpoint and a policy become a bundle of ONNX components."""

from __future__ import annotations

from ep_export.export.export import export_bundle
from ep_export.export.prune_node import prune_function, scores_model, strip_body

__all__ = ["export_bundle", "prune_function", "scores_model", "strip_body"]
