"""A family's bundle beside the Hugging Face model it was made from: what every family has to show."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from bundles import export_tiny
from kept_sets import difference_from_exact

from ep_export.checkpoint import open_checkpoint
from ep_export.entropy import KeptDifference
from ep_export.families.base import Picture, PromptInputs, Visual
from ep_export.policy import Keep
from ep_export.reference import PruneSpec, load_model, prune
from ep_export.runtime import Session, open_picture, open_video

__all__ = ["QUESTION", "FamilyPair", "FamilyTests"]

QUESTION = "which digits are in the picture?"
TOKENS = 6
LOGIT_TOLERANCE = 1e-3  # float32 through two runtimes that sum in different orders
FEATURE_TOLERANCE = 1e-4
_WITHOUT_TORCH = Path(__file__).parent / "runtime" / "without_torch.py"


class FamilyPair:
    """An exported checkpoint and its Hugging Face model."""

    def __init__(self, checkpoint: Path, out: Path, **policy: Any) -> None:
        opened = open_checkpoint(str(checkpoint))
        self.family = opened.family
        self.bundle = export_tiny(checkpoint, out, **policy)
        self.session = Session.open(self.bundle, threads=1)
        self.model = load_model(opened)
        self.policy = self.bundle.manifest.policy

    def prompt(self, visuals: Sequence[Visual]) -> PromptInputs:
        return self.session.prompts.build(visuals, QUESTION)

    def logits(self, prompt: PromptInputs) -> np.ndarray:
        with torch.inference_mode():
            output = self.model(**self.family.reference_inputs(prompt, self.model.config))
        return output.logits[0, -1].numpy()

    def tokens(self, prompt: PromptInputs) -> list[int]:
        """`generate` with the checkpoint's own generation settings."""
        inputs = self.family.reference_inputs(prompt, self.model.config)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        return ids[0, prompt.input_ids.shape[1] :].tolist()

    def check_everything_kept(self, visuals: Sequence[Visual]) -> None:
        """Keep 1.0 answers as Hugging Face, token for token."""
        prompt = self.prompt(visuals)
        made = self.session.prefill(prompt, Keep(ratio=1.0))
        assert np.abs(made.logits - self.logits(prompt)).max() < LOGIT_TOLERANCE
        assert np.array_equal(made.kept_index, np.arange(prompt.input_ids.shape[1]))
        answer = self.session.generate(visuals, QUESTION, max_new_tokens=TOKENS, keep=Keep(ratio=1.0))
        assert list(answer.token_ids) == self.tokens(prompt)

    def check_pruned(self, visuals: Sequence[Visual], share: float) -> None:
        """`share` of what layers 0..K-1 leave to choose: kept set, logits and answer as the oracle's."""
        layers = self.bundle.manifest.dims.layers
        keep = Keep(ratio=(self.policy.layer + share * (layers - self.policy.layer)) / layers)
        prompt = self.prompt(visuals)
        made = self.session.prefill(prompt, keep)
        kept = made.kept_index[np.isin(made.kept_index, prompt.visual_index)]
        with prune(self.model, PruneSpec(self.policy, keep)) as trace:
            self.logits(prompt)
        assert np.array_equal(trace.visual_index, prompt.visual_index)
        assert kept.shape[0] == int(share * prompt.visual_index.shape[0])
        assert difference_from_exact(trace, kept, self.bundle.manifest) is not KeptDifference.DIFFERENT
        ours = torch.from_numpy(kept)
        with prune(self.model, PruneSpec(self.policy, keep), select=lambda *_: ours):
            expected, tokens = self.logits(prompt), self.tokens(prompt)
        assert np.abs(made.logits - expected).max() < LOGIT_TOLERANCE
        answer = self.session.generate(visuals, QUESTION, max_new_tokens=TOKENS, keep=keep)
        assert list(answer.token_ids) == tokens
        assert answer.kept_index == tuple(made.kept_index.tolist())

    def check_vision(self, visuals: Sequence[Visual]) -> None:
        """What stands at the visual tokens is what Hugging Face puts there, for each of them alone."""
        for visual in visuals:
            prompt = self.prompt([visual])
            made = np.concatenate([self._encoded(picture) for picture in prompt.pictures])
            expected = self._visual_embeds(prompt)
            assert made.shape == expected.shape
            assert np.abs(made - expected).max() < FEATURE_TOLERANCE

    def check_without_torch(self, path: Path) -> None:
        """The same answer about a picture, or a folder of frames, on a machine that has no torch."""
        command = [sys.executable, str(_WITHOUT_TORCH), str(self.bundle.path), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        shown = open_video(path) if path.is_dir() else open_picture(path)
        expected = self.session.generate([shown], "which digits?", max_new_tokens=5)
        assert made == {"token_ids": list(expected.token_ids), "loaded": []}

    def _encoded(self, picture: Picture) -> np.ndarray:
        feeds = self.family.vision_feeds(picture, self.model.config)
        return self.session.run(picture.encoder, feeds)["visual_embeds"]

    def _visual_embeds(self, prompt: PromptInputs) -> np.ndarray:
        seen: list[torch.Tensor] = []
        layer = self.family.decoder(self.model).layers[0]
        hook = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        try:
            self.logits(prompt)
        finally:
            hook.remove()
        return seen[0][0, torch.from_numpy(prompt.visual_index)].numpy()


class FamilyTests:
    """The same tests for every family: subclass as `Test...` beside a fixture `pair` that makes its models.

    Attributes:
        prompts: What stands before the question, by name.
        shapes: Pictures and videos whose features are compared.
    """

    prompts: ClassVar[Mapping[str, Sequence[Visual]]]
    shapes: ClassVar[Sequence[Visual]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        names = metafunc.fixturenames
        if "shown" in names:  # of text alone nothing is pruned
            shown = {name: v for name, v in self.prompts.items() if v or "share" not in names}
            metafunc.parametrize("shown", shown.values(), ids=shown)
        if "share" in names:
            metafunc.parametrize("share", [0.5, 0.25])

    def test_everything_kept_answers_as_huggingface(self, pair: FamilyPair, shown: Sequence[Visual]) -> None:
        pair.check_everything_kept(shown)

    def test_pruned_answers_as_the_oracle(
        self, pair: FamilyPair, shown: Sequence[Visual], share: float
    ) -> None:
        pair.check_pruned(shown, share)

    def test_vision_features_equal_huggingface(self, pair: FamilyPair) -> None:
        pair.check_vision(self.shapes)
