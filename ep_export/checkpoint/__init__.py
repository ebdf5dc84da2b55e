"""Opening a checkpoint: what a person typed becomes one checked, frozen description. No weight is read."""

from __future__ import annotations

from ep_export.checkpoint.meta_model import meta_model
from ep_export.checkpoint.opening import Checkpoint, ModelConfig, open_checkpoint, open_config
from ep_export.checkpoint.origin import check_origin, open_origin
from ep_export.safetensors_index import TensorRef

__all__ = [
    "Checkpoint",
    "ModelConfig",
    "TensorRef",
    "check_origin",
    "meta_model",
    "open_checkpoint",
    "open_config",
    "open_origin",
]
