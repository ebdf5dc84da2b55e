"""The manifest round trip, and distrust of what a bundle says."""

import dataclasses
import json
import shutil

import pytest

from ep_export.bundle import (
    FORMAT,
    Bundle,
    Component,
    Dialect,
    FileEntry,
    Manifest,
    Precision,
    Role,
    TensorSpec,
    WeightsMode,
    list_files,
    read_manifest,
    write_manifest,
)
from ep_export.dims import DecoderDims
from ep_export.errors import UsageError, UserError
from ep_export.policy import (
    Cut,
    Evidence,
    EvidenceKind,
    Keep,
    MaxMin,
    Random,
    Schedule,
    Scorer,
    Select,
    TopK,
    chooser_named,
)


def span(number: int, first: int, stop: int) -> Component:
    name = f"decoder_{number}"
    return Component(name, f"{name}.onnx", Role.DECODER, (), (), layers=(first, stop))


def prune(cut: int, policy: str) -> Component:
    name = f"prune_{cut}.{policy}"
    return Component(name, f"{name}.onnx", Role.PRUNE, (), (), cut=cut, chooser=chooser_named(policy))


MANIFEST = Manifest(
    model="tiny",
    revision=None,
    model_sha256="0" * 64,
    family="qwen2_5_vl",
    dims=DecoderDims(4, 64, 4, 2, 16, 128, 300, 512, 3),
    schedule=Schedule((Cut(2, TopK(Scorer.NORM, Select.LOWEST)),)),
    evidence=Evidence(EvidenceKind.TOLD, "told by a test"),
    keep=Keep(ratio=0.5),
    degree=16,
    dialect=Dialect.PORTABLE,
    precision=Precision.FP32,
    opset=20,
    weights=WeightsMode.LINK,
    components=(
        Component(
            "embed_tokens", "embed_tokens.onnx", Role.EMBED, (TensorSpec("input_ids", "INT64", (1, "S")),), ()
        ),
        prune(0, "norm-lowest"),
        prune(0, "divprune"),
        span(1, 2, 4),
        span(0, 0, 2),
    ),
    files=(),
    tools={"ep-export": "0"},
)


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "embed_tokens.onnx").write_bytes(b"graph")
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"weights")
    write_manifest(tmp_path, dataclasses.replace(MANIFEST, files=list_files(tmp_path)))
    return tmp_path


def edit(bundle, **changes):
    raw = json.loads((bundle / "manifest.json").read_text())
    raw.update(changes)
    (bundle / "manifest.json").write_text(json.dumps(raw))


def test_a_manifest_reads_back_as_written(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST


def test_opens_and_finds_its_files(bundle):
    opened = Bundle.open(bundle)
    assert opened.file("embed_tokens.onnx").read_bytes() == b"graph"
    assert [entry.path for entry in opened.manifest.files] == [
        "embed_tokens.onnx",
        "weights/model.safetensors",
    ]


def test_verification_is_recorded_on_disk(bundle):
    Bundle.open(bundle).with_verified("onnxruntime-cpu", "PASS")
    assert read_manifest(bundle).verified == {"onnxruntime-cpu": "PASS"}


def test_a_directory_without_manifest_is_no_bundle(tmp_path):
    with pytest.raises(UserError, match=r"is not a bundle.*manifest\.json"):
        Bundle.open(tmp_path)


def test_a_missing_file_is_named(bundle):
    (bundle / "weights" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"weights/model\.safetensors is missing"):
        Bundle.open(bundle)


def test_a_file_of_another_size_is_named_even_without_checksums(bundle):
    (bundle / "embed_tokens.onnx").write_bytes(b"longer graph")
    with pytest.raises(UserError, match=r"embed_tokens\.onnx has 12 bytes, the manifest says 5"):
        Bundle.open(bundle, verify=False)


def test_a_changed_file_is_named(bundle):
    (bundle / "embed_tokens.onnx").write_bytes(b"grapH")
    with pytest.raises(UserError, match=r"embed_tokens\.onnx was changed"):
        Bundle.open(bundle)


def test_a_newer_format_says_upgrade(bundle):
    edit(bundle, format=FORMAT + 1)
    with pytest.raises(UserError, match="format 3") as caught:
        Bundle.open(bundle)
    assert "upgrade" in caught.value.hint


def test_an_older_format_says_how_to_build_again(bundle):
    edit(bundle, format=1)
    with pytest.raises(UserError, match="has format 1") as caught:
        Bundle.open(bundle)
    assert "ep-export build" in caught.value.hint


def test_stages_are_spans_with_a_prune_component_at_every_cut():
    names = [component.name for component in MANIFEST.stages(MANIFEST.schedule)]
    assert names == ["decoder_0", "prune_0.norm-lowest", "decoder_1"]
    other = MANIFEST.stages(MANIFEST.scheduled(["divprune"]))
    assert [component.name for component in other] == ["decoder_0", "prune_0.divprune", "decoder_1"]
    assert [component.name for component in MANIFEST.spans] == ["decoder_0", "decoder_1"]
    assert MANIFEST.policies == ("norm-lowest", "divprune")


TWO_CUTS = dataclasses.replace(
    MANIFEST,
    schedule=Schedule((Cut(0, MaxMin(), 0.5), Cut(2, Random(), 0.25))),
    components=(
        MANIFEST.components[0],
        prune(0, "divprune"),
        prune(1, "random"),
        prune(1, "divprune"),
        span(0, 0, 2),
        span(1, 2, 4),
    ),
)


def test_policies_are_chosen_once_for_all_cuts_or_once_a_cut(tmp_path):
    write_manifest(tmp_path, TWO_CUTS)
    manifest = read_manifest(tmp_path)
    assert manifest == TWO_CUTS
    assert manifest.policies == ("divprune",)  # what every cut has
    names = [component.name for component in manifest.stages(manifest.scheduled(["divprune", "random"]))]
    assert names == ["prune_0.divprune", "decoder_0", "prune_1.random", "decoder_1"]
    both = manifest.scheduled(["divprune"])
    assert [cut.chooser.name for cut in both.cuts] == ["divprune", "divprune"]
    assert [cut.share for cut in both.cuts] == [0.5, 0.25]


def test_a_policy_that_is_not_there_names_those_that_are():
    with pytest.raises(UserError, match=r"no policy 'random' at cut 0.*it has divprune") as caught:
        TWO_CUTS.scheduled(["random"])
    assert "policy add" in caught.value.hint
    with pytest.raises(UsageError, match="3 policies for 2 cuts"):
        TWO_CUTS.scheduled(["divprune"] * 3)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (MANIFEST.components[1:], "role embed"),
        (MANIFEST.components[:-1], "layers between the cuts"),
        ((*MANIFEST.components[:-1], span(0, 0, 3)), "layers between the cuts"),
        ((*MANIFEST.components, span(2, 4, 4)), "layers between the cuts"),
        ((MANIFEST.components[0], *MANIFEST.components[2:]), "no policy 'norm-lowest'"),
        ((*MANIFEST.components, prune(1, "divprune")), "names no chooser, or no cut"),
        ((*MANIFEST.components, prune(0, "divprune")), "one name"),
    ],
)
def test_components_that_make_no_decoder_are_refused(tmp_path, components, message):
    write_manifest(tmp_path, dataclasses.replace(MANIFEST, components=components))
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path)


def test_a_layer_count_of_a_billion_is_refused_at_once(tmp_path):
    dims = dataclasses.replace(MANIFEST.dims, layers=10**9)
    write_manifest(tmp_path, dataclasses.replace(MANIFEST, dims=dims))
    with pytest.raises(UserError, match="layers between the cuts"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"'])
def test_a_manifest_that_is_no_object_is_refused(bundle, text):
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("degree", "16"),
        ("dialect", "other"),
        ("schedule", {"cuts": [{"layer": True}]}),
        ("files", [{"path": "x"}]),
        ("keep", 1),
    ],
)
def test_a_field_of_the_wrong_type_is_refused(bundle, field, value):
    edit(bundle, **{field: value})
    with pytest.raises(UserError, match="not a valid manifest"):
        Bundle.open(bundle)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "weights/../../secret"])
def test_a_path_outside_the_bundle_is_refused(bundle, path):
    edit(bundle, files=[dataclasses.asdict(FileEntry(path, 1, "0" * 64))])
    with pytest.raises(UserError, match="outside itself"):
        Bundle.open(bundle)


def test_a_link_out_of_the_bundle_is_refused(bundle, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "graph"
    outside.write_bytes(b"graph")
    (bundle / "embed_tokens.onnx").unlink()
    (bundle / "embed_tokens.onnx").symlink_to(outside)
    with pytest.raises(UserError, match="outside itself"):
        Bundle.open(bundle)


def test_engines_that_are_gone_do_not_keep_a_bundle_from_opening(tiny_bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle.path, copy)
    engine = copy / "engines" / "somewhere" / "decoder_0.engine"
    engine.parent.mkdir(parents=True)
    engine.write_bytes(b"an engine")
    manifest = read_manifest(copy)
    write_manifest(copy, dataclasses.replace(manifest, files=list_files(copy)))
    assert Bundle.open(copy).manifest.files != manifest.files
    engine.write_bytes(b"another.")
    with pytest.raises(UserError, match=r"decoder_0\.engine"):
        Bundle.open(copy)
    engine.unlink()
    Bundle.open(copy)
