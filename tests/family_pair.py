"""A family's bundles beside the Hugging Face model they were made from: what every family has to show."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from bundles import export_tiny
from kept_sets import difference_from_exact

from ep_export.adaptive import fit_threshold
from ep_export.bundle import Dialect
from ep_export.checkpoint import open_checkpoint
from ep_export.choosers import KeptDifference
from ep_export.errors import UsageError
from ep_export.families.base import Picture, PromptInputs, Visual
from ep_export.planning import average_keep, kept_tokens
from ep_export.policy import (
    Budget,
    Coverage,
    Cut,
    Keep,
    Schedule,
    Scorer,
    Source,
    TopK,
    chooser_named,
)
from ep_export.reference import PruneSpec, kept_as, load_model, prune
from ep_export.runtime import Prefill, Session, open_picture, open_video
from ep_export.weights.store import bundle_layers

__all__ = ["QUESTION", "FamilyPair", "FamilyTests"]

QUESTION = "which digits are in the picture?"
TOKENS = 6
LOGIT_TOLERANCE = 1e-3  # float32 through two runtimes that sum in different orders
FEATURE_TOLERANCE = 1e-4
ONE_CUT, TWO_CUTS = (0.3,), (0.6, 0.3)
"""Shares of the visual tokens that go on at every cut."""
_WITHOUT_TORCH = Path(__file__).parent / "runtime" / "without_torch.py"


class FamilyPair:
    """An exported checkpoint and its Hugging Face model.

    `bundle` and `session` have one cut; those with two, where another chooser follows at a later layer or
    goes before, are made when first asked for.
    """

    def __init__(self, checkpoint: Path, out: Path, **settings: Any) -> None:
        opened = open_checkpoint(str(checkpoint))
        self.family = opened.family
        self.bundle = export_tiny(checkpoint, out, **settings)
        self.session = Session.open(self.bundle, threads=1, exact=True)
        self.model = load_model(opened, quantised=bundle_layers(self.bundle))
        self._checkpoint, self._settings = checkpoint, settings

    @functools.cached_property
    def twice(self) -> Session:
        """The same with two cuts, so three spans; in ONNX Runtime's own dialect unless one is told."""
        dialect = self._settings.get("dialect", Dialect.ONNXRUNTIME)
        out = self.bundle.path.with_name("two-cuts")
        cut, layers = self.bundle.manifest.schedule.cuts[0], self.bundle.manifest.dims.layers
        cuts = [(cut.layer, cut.chooser), (cut.layer + 1, Coverage(Scorer.NORM, source=Source.ATTENTION))]
        if cut.layer == layers - 1:
            cuts = [(cut.layer - 1, chooser_named("norm-highest-attention")), (cut.layer, cut.chooser)]
        schedule = Schedule(
            tuple(Cut(layer, each, share) for (layer, each), share in zip(cuts, TWO_CUTS, strict=True))
        )
        keep = average_keep(schedule, layers=layers).ratio
        bundle = export_tiny(self._checkpoint, out, schedule=schedule, keep=keep, dialect=dialect)
        return Session.open(bundle, threads=1, exact=True)

    def with_cuts(self, count: int) -> Session:
        return self.session if count == 1 else self.twice

    def prompt(self, visuals: Sequence[Visual]) -> PromptInputs:
        return self.session.prompts.build(visuals, QUESTION)

    def output(self, prompt: PromptInputs) -> Any:
        with torch.inference_mode():
            return self.model(**self.family.reference_inputs(prompt, self.model.config))

    def tokens(self, prompt: PromptInputs) -> list[int]:
        """`generate` with the checkpoint's own generation settings."""
        inputs = self.family.reference_inputs(prompt, self.model.config)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        return ids[0, prompt.input_ids.shape[1] :].tolist()

    def check_everything_kept(self, visuals: Sequence[Visual], cuts: int = 1) -> None:
        """Keep 1.0 answers as Hugging Face, token for token, through as many spans as there are."""
        session, prompt, everything = self.with_cuts(cuts), self.prompt(visuals), Keep(ratio=1.0)
        ours = session.prefill(prompt, everything)
        assert len(ours.cuts) == (cuts if visuals else 0)
        assert np.array_equal(ours.kept_index, np.arange(prompt.input_ids.shape[1]))
        assert_computes(ours, self.output(prompt))
        answer = session.generate(visuals, QUESTION, max_new_tokens=TOKENS, keep=everything)
        assert list(answer.token_ids) == self.tokens(prompt)

    def check_pruned(self, visuals: Sequence[Visual], shares: Sequence[float] = ONE_CUT) -> None:
        """Kept sets at every cut, logits, caches and answer as the oracle's, which keeps what we keep."""
        session, prompt = self.with_cuts(len(shares)), self.prompt(visuals)
        manifest = session.bundle.manifest
        pairs = zip(manifest.schedule.cuts, shares, strict=True)
        schedule = Schedule(tuple(replace(cut, share=share) for cut, share in pairs))
        keep = average_keep(schedule, layers=manifest.dims.layers)
        ours = session.prefill(prompt, keep)
        kept = [cut.kept_index for cut in ours.cuts]
        with prune(self.model, PruneSpec(schedule, keep), select=kept_as(kept)) as trace:
            expected, tokens = self.output(prompt), self.tokens(prompt)
        assert_computes(ours, expected)
        budgets = kept_tokens(
            keep, schedule, layers=manifest.dims.layers, visual_tokens=len(prompt.visual_index)
        )
        assert np.array_equal(trace.visual_index, prompt.visual_index)
        for cut, index, exact, budget in zip(schedule.cuts, kept, trace.cuts, budgets, strict=True):
            assert np.isin(index, prompt.visual_index).sum() == budget
            difference = difference_from_exact(exact, index, cut.chooser, manifest.degree)
            assert difference is not KeptDifference.DIFFERENT
        answer = session.generate(visuals, QUESTION, max_new_tokens=TOKENS, keep=keep)
        assert list(answer.token_ids) == tokens
        assert answer.kept_index == tuple(ours.kept_index.tolist())

    def check_adaptive(self, visuals: Sequence[Visual]) -> None:
        """A prompt with a keep of its own keeps as many tokens as the oracle, and answers the same."""
        session, prompt = self.session, self.prompt(visuals)
        manifest = session.bundle.manifest
        schedule, layers = manifest.schedule, manifest.dims.layers
        chooser = schedule.cuts[0].chooser
        scores = session.prefill(prompt, Keep(ratio=1.0)).cuts[0].scores
        if isinstance(chooser, TopK) and chooser.budget is Budget.PER_PICTURE:
            with pytest.raises(UsageError, match="no scores that an adaptive keep could go by"):
                fit_threshold(0.5, schedule, [scores], layers=layers)
            return
        others = [scores + distance * scores.std() for distance in (-1, 0.5)]
        least = schedule.cuts[0].layer / layers
        keep = fit_threshold((1 + least) / 2, schedule, [scores, *others], layers=layers)
        ours, fixed = session.prefill(prompt, keep), session.prefill(prompt, Keep(ratio=keep.ratio))
        assert len(ours.kept_index) != len(fixed.kept_index)
        with prune(self.model, PruneSpec(schedule, keep)) as trace:
            expected, tokens = self.output(prompt), self.tokens(prompt)
        assert len(trace.kept_index) == len(ours.kept_index)
        exact = difference_from_exact(trace.cuts[0], ours.kept_index, chooser, manifest.degree)
        assert exact is not KeptDifference.DIFFERENT
        if exact is KeptDifference.EQUAL:
            assert_computes(ours, expected)
            answer = session.generate(visuals, QUESTION, max_new_tokens=TOKENS, keep=keep)
            assert list(answer.token_ids) == tokens

    def check_vision(self, visuals: Sequence[Visual]) -> None:
        """What stands at the visual tokens is what Hugging Face puts there, for each of them alone."""
        for visual in visuals:
            prompt = self.prompt([visual])
            ours = np.concatenate([self._encoded(picture) for picture in prompt.pictures])
            expected = self._visual_embeds(prompt)
            assert ours.shape == expected.shape
            assert np.abs(ours - expected).max() < FEATURE_TOLERANCE

    def check_without_torch(self, path: Path) -> None:
        """The same answer about a picture, or a folder of frames, on a machine that has no torch."""
        command = [sys.executable, str(_WITHOUT_TORCH), str(self.bundle.path), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        ours = json.loads(done.stdout)
        shown = open_video(path) if path.is_dir() else open_picture(path)
        expected = self.session.generate([shown], "which digits?", max_new_tokens=5)
        assert ours == {"token_ids": list(expected.token_ids), "loaded": []}

    def _encoded(self, picture: Picture) -> np.ndarray:
        feeds = self.family.vision_feeds(picture, self.model.config)
        return self.session.run(picture.encoder, feeds)["visual_embeds"]

    def _visual_embeds(self, prompt: PromptInputs) -> np.ndarray:
        seen: list[torch.Tensor] = []
        layer = self.family.decoder(self.model).layers[0]
        hook = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        try:
            self.output(prompt)
        finally:
            hook.remove()
        return seen[0][0, torch.from_numpy(prompt.visual_index)].numpy()


def assert_computes(ours: Prefill, expected: Any) -> None:
    """Logits and every layer's cache as in Hugging Face's output."""
    assert np.abs(ours.logits - expected.logits[0, -1].numpy()).max() < LOGIT_TOLERANCE
    for i, layer in enumerate(expected.past_key_values.layers):
        for part, theirs in (("key", layer.keys), ("value", layer.values)):
            cache = ours.caches[f"past_key_values.{i}.{part}"].numpy()
            assert cache.shape == theirs.shape
            assert np.abs(cache - theirs.numpy()).max() < LOGIT_TOLERANCE


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
            shown = {name: v for name, v in self.prompts.items() if v or "shares" not in names}
            metafunc.parametrize("shown", shown.values(), ids=shown)
        if "cuts" in names:
            metafunc.parametrize("cuts", [1, 2], ids=["two spans", "three spans"])
        if "shares" in names:
            metafunc.parametrize("shares", [ONE_CUT, TWO_CUTS], ids=["one cut", "two cuts"])

    def test_everything_kept_answers_as_huggingface(
        self, pair: FamilyPair, shown: Sequence[Visual], cuts: int
    ) -> None:
        pair.check_everything_kept(shown, cuts)

    def test_pruned_answers_as_the_oracle(
        self, pair: FamilyPair, shown: Sequence[Visual], shares: Sequence[float]
    ) -> None:
        pair.check_pruned(shown, shares)

    def test_a_keep_of_its_own_answers_as_the_oracle(self, pair: FamilyPair) -> None:
        pair.check_adaptive(next(visuals for visuals in self.prompts.values() if visuals))

    def test_vision_features_equal_huggingface(self, pair: FamilyPair) -> None:
        pair.check_vision(self.shapes)
