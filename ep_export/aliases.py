"""Short names of published models, with the facts of their public `config.json` shipped along.

A plan needs the config alone, so aliases work without a network and without the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ALIASES", "Alias", "find_alias"]

_CONFIGS = Path(__file__).parent / "families" / "configs"


@dataclass(frozen=True)
class Alias:
    """A published model.

    Attributes:
        name: What a person types.
        hub_id: Where the checkpoint is published.
        family: Name under `ep_export.families`.
    """

    name: str
    hub_id: str
    family: str

    @property
    def config_file(self) -> Path:
        """The shipped config."""
        return _CONFIGS / f"{self.name}.json"


ALIASES: tuple[Alias, ...] = (
    Alias("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl"),
    Alias("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl"),
    Alias("qwen2.5-vl-32b", "Qwen/Qwen2.5-VL-32B-Instruct", "qwen2_5_vl"),
    Alias("qwen2.5-vl-72b", "Qwen/Qwen2.5-VL-72B-Instruct", "qwen2_5_vl"),
    Alias("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", "llava"),
    Alias("llava-1.5-13b", "llava-hf/llava-1.5-13b-hf", "llava"),
    Alias("llava-next-vicuna-7b", "llava-hf/llava-v1.6-vicuna-7b-hf", "llava_next"),
    Alias("llava-next-mistral-7b", "llava-hf/llava-v1.6-mistral-7b-hf", "llava_next"),
)


def find_alias(model: str) -> Alias | None:
    """The alias of that name or hub id, if there is one; case does not matter."""
    wanted = model.lower()
    for alias in ALIASES:
        if wanted in (alias.name, alias.hub_id.lower()):
            return alias
    return None
