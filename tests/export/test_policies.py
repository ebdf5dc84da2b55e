"""Policies added to a bundle that stands: what is written, what is left alone, what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundles import two_cuts
from export_helpers import LENGTH, VISUAL, BundleRun, random_prompt

from ep_export.bundle import Bundle, hash_file
from ep_export.errors import UsageError, UserError
from ep_export.export import add_policies, policies
from ep_export.policy import MaxMin, Nothing, Random, Scorer, Source, TopK


@pytest.fixture
def bundle(bundle_of: Callable[..., Bundle], tmp_path: Path) -> Bundle:
    """Two cuts, the first at layer 0; a copy of its own."""
    made = bundle_of("qwen2_5_vl", schedule=two_cuts(0, 2, MaxMin(), TopK()))
    return Bundle.open(shutil.copytree(made.path, tmp_path / "bundle"))


def hashes(path: Path) -> dict[str, str]:
    """Of every file but the manifest."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"]
    return {file.relative_to(path).as_posix(): hash_file(file) for file in files}


def test_only_new_files_appear(bundle: Bundle) -> None:
    before = hashes(bundle.path)
    returned = add_policies(bundle, [Random(3), Nothing()])
    after = hashes(bundle.path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {
        f"prune_{i}.{p}.onnx" for i in (0, 1) for p in ("random-3", "nothing")
    }
    opened = Bundle.open(bundle.path)
    assert opened == returned
    assert opened.manifest.policies == ("random-3", "nothing")


def test_added_policies_run(bundle: Bundle) -> None:
    add_policies(bundle, [Random(3), TopK(Scorer.NORM, source=Source.HIDDEN)])
    opened = Bundle.open(bundle.path)
    prompt = random_prompt(opened.manifest.dims.hidden_size)
    for policy in ("random-3", "norm-highest-hidden"):
        got = BundleRun(opened, policy).prefill(*prompt, [8, 3])
        assert [len(cut["kept_index"]) for cut in got.prunes] == [LENGTH - len(VISUAL) + k for k in (8, 3)]
        assert np.isfinite(got.logits).all()


def test_what_is_added_is_what_an_export_writes(bundle_of: Callable[..., Bundle], tmp_path: Path) -> None:
    first = bundle_of("qwen2_5_vl")
    bundle = Bundle.open(shutil.copytree(first.path, tmp_path / "bundle"))
    add_policies(bundle, [Random(7), TopK(Scorer.ORDER2)])
    whole = bundle_of("qwen2_5_vl", policies=(Random(7), TopK(Scorer.ORDER2)))
    assert hashes(bundle.path) == hashes(whole.path)
    assert Bundle.open(bundle.path).manifest.components == whole.manifest.components


def test_one_cut_alone_can_get_a_policy(bundle: Bundle) -> None:
    add_policies(bundle, [TopK(Scorer.RELEASED)], cuts=[1])
    manifest = Bundle.open(bundle.path).manifest
    assert manifest.prune(1, "released-highest").cut == 1
    with pytest.raises(UserError, match="no policy 'released-highest' at cut 0"):
        manifest.prune(0, "released-highest")


def test_a_warning_is_added_once(bundle: Bundle) -> None:
    sentence = "every token scores the same: key states have only 2 heads"
    for policy in (TopK(source=Source.KEY), TopK(Scorer.ORDER2, source=Source.KEY)):
        bundle = add_policies(bundle, [policy], cuts=[1])
    assert Bundle.open(bundle.path).manifest.warnings == (sentence,)


@pytest.mark.parametrize(
    ("chooser", "cuts", "sentence"),
    [
        (MaxMin(), None, "bundle has policy divprune at cut 0 already"),
        (TopK(), [1], "bundle has policy paper-highest at cut 1 already"),
        (
            TopK(Scorer.NORM),
            None,
            "policy norm-highest scores projections, and there are none before layer 0",
        ),
        (
            TopK(Scorer.NORM, source=Source.ATTENTION),
            [1],
            "norm-highest-attention scores attention, which decoder_0 of this bundle does not give out",
        ),
        (Nothing(), [2], "bundle has no cut 2, it has 2"),
    ],
)
def test_what_cannot_be_added_is_refused_and_nothing_changes(
    chooser: TopK | MaxMin | Nothing, cuts: list[int] | None, sentence: str, bundle: Bundle
) -> None:
    before, manifest = hashes(bundle.path), (bundle.path / "manifest.json").read_bytes()
    with pytest.raises((UserError, UsageError), match=sentence) as caught:
        add_policies(bundle, [Random(3), chooser], cuts=cuts)
    assert caught.value.hint
    assert hashes(bundle.path) == before
    assert (bundle.path / "manifest.json").read_bytes() == manifest


def test_hidden_states_must_divide_into_heads(bundle_of: Callable[..., Bundle], tmp_path: Path) -> None:
    from dataclasses import replace

    made = bundle_of("qwen2_5_vl")
    manifest = replace(made.manifest, dims=replace(made.manifest.dims, heads=5))
    with pytest.raises(UserError, match="hidden states that divide into heads, the model has 96 for 5"):
        add_policies(Bundle(tmp_path, manifest), [TopK(source=Source.HIDDEN)])


def test_a_failure_midway_leaves_the_bundle_as_it_was(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, manifest = hashes(bundle.path), (bundle.path / "manifest.json").read_bytes()

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(policies, "write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        add_policies(bundle, [Random(3)])
    assert hashes(bundle.path) == before
    assert (bundle.path / "manifest.json").read_bytes() == manifest


def test_no_checkpoint_and_no_modelling_code_is_needed(bundle: Bundle) -> None:
    code = (
        "import sys; from pathlib import Path; sys.modules['transformers'] = None\n"
        "from ep_export.bundle import Bundle; from ep_export.export import add_policies\n"
        "from ep_export.policy import Random\n"
        f"add_policies(Bundle.open(Path({str(bundle.path)!r})), [Random(5)])"
    )
    shutil.rmtree(bundle.path / "processor")
    shutil.rmtree(bundle.path / "weights")
    from dataclasses import replace

    from ep_export.bundle import write_manifest

    kept = tuple(e for e in bundle.manifest.files if e.path.endswith(".onnx"))
    write_manifest(bundle.path, replace(bundle.manifest, files=kept))
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "random-5" in Bundle.open(bundle.path).manifest.policies
