"""Short names of published models, with the facts of their public `config.json` shipped along.

A plan needs the config alone, so aliases work without a network and without the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ALIASES", "Alias", "find_alias", "short_name"]

_CONFIGS = Path(__file__).parent / "families" / "configs"


@dataclass(frozen=True)
class Alias:
    """A published model.

    Attributes:
        name: What a person types.
        hub_id: Where the checkpoint is published.
        family: Name under `ep_export.families`.
        same_as: The alias whose config and calibration record it shares, for a second name of one checkpoint.
    """

    name: str
    hub_id: str
    family: str
    same_as: str | None = None

    @property
    def config_file(self) -> Path:
        """The shipped config."""
        return _CONFIGS / f"{self.same_as or self.name}.json"


ALIASES: tuple[Alias, ...] = (
    Alias("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl"),
    Alias("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl"),
    Alias("qwen2.5-vl-32b", "Qwen/Qwen2.5-VL-32B-Instruct", "qwen2_5_vl"),
    Alias("qwen2.5-vl-72b", "Qwen/Qwen2.5-VL-72B-Instruct", "qwen2_5_vl"),
    Alias("qwen2-vl-2b", "Qwen/Qwen2-VL-2B-Instruct", "qwen2_vl"),
    Alias("qwen2-vl-7b", "Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl"),
    Alias("qwen2-vl-72b", "Qwen/Qwen2-VL-72B-Instruct", "qwen2_vl"),
    Alias("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", "llava"),
    Alias("llava-1.5-13b", "llava-hf/llava-1.5-13b-hf", "llava"),
    Alias("llava-next-vicuna-7b", "llava-hf/llava-v1.6-vicuna-7b-hf", "llava_next"),
    Alias("llava-next-mistral-7b", "llava-hf/llava-v1.6-mistral-7b-hf", "llava_next"),
    # The paper says LLaVA-NeXT-7B: of the two checkpoints of that size it is taken to be the Vicuna one.
    Alias("llava-next-7b", "llava-hf/llava-v1.6-vicuna-7b-hf", "llava_next", same_as="llava-next-vicuna-7b"),
    Alias("llava-onevision-0.5b", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "llava_onevision"),
    Alias("llava-onevision-7b", "llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava_onevision"),
    Alias("video-llava-7b", "LanguageBind/Video-LLaVA-7B-hf", "video_llava"),
    Alias("smolvlm2-2.2b", "HuggingFaceTB/SmolVLM2-2.2B-Instruct", "smolvlm"),
    Alias("smolvlm2-500m", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "smolvlm"),
    Alias("smolvlm2-256m", "HuggingFaceTB/SmolVLM2-256M-Video-Instruct", "smolvlm"),
)


def find_alias(model: str) -> Alias | None:
    """The alias of that name or hub id, if there is one; case does not matter.

    A second name of a checkpoint gives the alias it stands for.
    """
    wanted = model.lower()
    for alias in ALIASES:
        if wanted in (alias.name, alias.hub_id.lower()):
            return alias if alias.same_as is None else find_alias(alias.same_as)
    return None


def short_name(model: str) -> str:
    """A model's name without the directories before it, for titles."""
    return model.rstrip("/").rsplit("/", maxsplit=1)[-1] or model
