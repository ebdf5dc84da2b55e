"""Bridges to evaluation harnesses: a pruned model under the name a harness knows it by.

`manifest` is the entry point through which lmms-eval finds `ep_export_pruned`. README.md beside this file has
the command lines for the paper's tables.
"""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """What lmms-eval asks for by its entry point `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="ep_export_pruned", simple_class_path="ep_export.harness.lmms_eval_model.PrunedModel"
    )
