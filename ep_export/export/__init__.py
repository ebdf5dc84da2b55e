"""Export: a checkpoint and a schedule become a bundle of ONNX components; policies are added later."""

from __future__ import annotations

from ep_export.export.export import export_bundle
from ep_export.export.policies import add_policies

__all__ = ["add_policies", "export_bundle"]
