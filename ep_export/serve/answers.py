"""Answers as OpenAI's clients read them, and what pruning did to them, for whoever wants to know.

The object `ep_export` in the last event of a stream, or in the whole answer, has what was kept of every
picture at every cut as cells of a grid, and what that did to the caches.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ep_export.runtime.generate import Finish
from ep_export.serving import Answer, PromptReport, cache_need

if TYPE_CHECKING:
    from ep_export.bundle import Manifest
    from ep_export.policy import Keep

__all__ = ["Reply", "model_card"]

_REASONS = {Finish.END: "stop", Finish.STOP: "stop", Finish.LENGTH: "length", Finish.CONTEXT: "length"}


@dataclass(frozen=True)
class Reply:
    """One answer under its own id.

    Attributes:
        model: As it is served.
        manifest: The bundle's.
        id: Of the answer.
        created: Seconds since 1970.
    """

    model: str
    manifest: Manifest
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def first_chunk(self) -> dict[str, Any]:
        """The event that opens a stream."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def text_chunk(self, piece: str) -> dict[str, Any]:
        """More text."""
        return self._chunk({"content": piece}, None)

    def last_chunk(self, answer: Answer) -> dict[str, Any]:
        """Why the answer ended, and what pruning did."""
        return {**self._chunk({}, _REASONS[answer.finish]), "ep_export": self._details(answer)}

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """Tokens counted, for clients that asked for it."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(answer)}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer in one piece."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": _REASONS[answer.finish],
        }
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": _usage(answer),
            "ep_export": self._details(answer),
        }

    def _chunk(self, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _details(self, answer: Answer) -> dict[str, Any]:
        prompt = _prompt(answer)
        cuts = [{"layer": cut.layer, "policy": cut.policy} for cut in prompt.cuts]
        for cut, kept in zip(cuts, prompt.kept_visual_tokens, strict=True):
            cut["kept_visual_tokens"] = kept
        return {
            "layers": self.manifest.dims.layers,
            "keep": _keep(prompt.keep),
            "cuts": cuts,
            "pictures": [
                {"grid": part.token_grid, "view": part.view, "kept_by_cut": part.kept_by_cut}
                for part in prompt.pictures
            ],
            "cache_bytes": self._cache_bytes(prompt, pruned=True),
            "cache_bytes_unpruned": self._cache_bytes(prompt, pruned=False),
            "timings_ms": {name: round(value, 3) for name, value in answer.timings_ms.items()},
        }

    def _cache_bytes(self, prompt: PromptReport, *, pruned: bool) -> int:
        """Keys and values of the prompt, as it was answered or as it would have been without pruning."""
        schedule = self.manifest.scheduled(prompt.policies) if pruned and prompt.cuts else None
        need = cache_need(
            self.manifest,
            schedule,
            prompt_tokens=prompt.prompt_tokens,
            visual_tokens=prompt.visual_tokens,
            kept=prompt.kept_visual_tokens if schedule else (),
            max_new_tokens=1,
        )
        return need.bytes


def model_card(name: str, manifest: Manifest, *, created: int, pictures: int) -> dict[str, Any]:
    """The served model as `/v1/models` lists it.

    Args:
        name: It is asked for by.
        manifest: The bundle's.
        created: Seconds since 1970.
        pictures: In a request at most.
    """
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "ep-export",
        "ep_export": {
            "family": manifest.family,
            "layers": manifest.dims.layers,
            "max_positions": manifest.dims.max_positions,
            "cuts": [{"layer": c.layer, "policy": c.chooser.name} for c in manifest.schedule.cuts],
            "policies": manifest.policies,
            "keep": _keep(manifest.keep),
            "smallest_keep": _smallest_keep(manifest),
            "pictures": pictures,
        },
    }


def _keep(keep: Keep) -> dict[str, Any]:
    """An adaptive one's ratio is its average over prompts; what a prompt kept is said beside it."""
    return {"ratio": keep.ratio, "tokens": keep.tokens, "adaptive": keep.adaptive}


def _smallest_keep(manifest: Manifest) -> float:
    """The average over layers below which no keep can go: layers before the first cut see every token."""
    return manifest.schedule.cuts[0].layer / manifest.dims.layers


def _prompt(answer: Answer) -> PromptReport:
    assert answer.prompt is not None  # noqa: S101 - only a cancelled request has none
    return answer.prompt


def _usage(answer: Answer) -> dict[str, Any]:
    """`visual_tokens` and `kept_visual_tokens` (cut by cut) stand beside OpenAI's details."""
    prompt = _prompt(answer)
    kept: Sequence[int] = prompt.kept_visual_tokens
    return {
        "prompt_tokens": prompt.prompt_tokens,
        "completion_tokens": len(answer.token_ids),
        "total_tokens": prompt.prompt_tokens + len(answer.token_ids),
        "prompt_tokens_details": {
            "cached_tokens": 0,
            "visual_tokens": prompt.visual_tokens,
            "kept_visual_tokens": kept,
        },
    }
