"""Targets: data that is checked when it is read."""

import json

import pytest
from command_line import ep_export

from ep_export.bundle import Dialect, Precision
from ep_export.errors import UsageError, UserError
from ep_export.numerics import WeightKind, Weights
from ep_export.policy import Coverage, MaxMin, Nothing, Random, Scorer, Select, Source, TopK, chooser_named
from ep_export.targets import (
    CHOOSERS,
    Flavour,
    Graphs,
    VersionRange,
    find_target,
    load_targets,
    read_target,
    version_numbers,
)

TARGETS = load_targets()

# Compute capabilities from NVIDIA's table of GPUs.
EXPECTED = {
    "jetson-orin-agx-64gb": "8.7",
    "jetson-orin-agx-32gb": "8.7",
    "jetson-orin-nx-16gb": "8.7",
    "jetson-orin-nano-8gb": "8.7",
    "jetson-thor": "11.0",
    "a100": "8.0",
    "l4": "8.9",
    "l40s": "8.9",
    "h100": "9.0",
    "h200": "9.0",
    "b200": "10.0",
    "rtx-turing": "7.5",
    "rtx-ampere-a100": "8.0",
    "rtx-ampere": "8.6",
    "rtx-ada": "8.9",
    "rtx-blackwell": "12.0",
    "rtx-spark": "12.1",
    "cpu": None,
}

OWN = """
extends = "rtx-ada"
title = "My card"
memory_bytes = 12_000_000_000

[sources]
memory_bytes = "its box"
"""


@pytest.mark.parametrize("name", EXPECTED)
def test_every_device_of_the_design_is_there(name):
    assert find_target(name).sm == EXPECTED[name]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
class TestEveryTarget:
    def test_figures_have_sources(self, target):
        figures = {"sm", "versions", "cuda", "memory_bytes", "bandwidth_bytes_per_second", "peak_flops"}
        figures |= {"weights"}
        given = {name for name in figures if getattr(target, name)}
        assert given <= set(target.sources)
        assert all(len(source) > 5 for source in target.sources.values())

    def test_figures_are_of_this_world(self, target):
        if target.memory_bytes is None:
            return
        assert 4e9 < target.memory_bytes < 3e11
        assert 0 < target.reserved_bytes < target.memory_bytes / 2
        assert 5e10 < target.bandwidth_bytes_per_second < 1e13
        assert target.peak_flops["fp16"] > target.peak_flops["fp32"] > 1e12

    def test_modern_graphs_only_where_tensorrt_has_the_operators(self, target):
        if target.flavour is Flavour.TENSORRT and Dialect.MODERN in target.dialects:
            assert version_numbers(target.versions.minimum) >= (10, 15)

    def test_no_float32_attention_where_there_is_no_kernel(self, target):
        if target.flavour is not Flavour.ONNXRUNTIME:
            assert not target.takes(Dialect.MODERN, Precision.FP32)

    def test_bfloat16_from_sm_8_on(self, target):
        if target.sm is not None:
            assert (Precision.BF16 in target.dtypes) == (float(target.sm) >= 8.0)

    def test_float8_weights_from_sm_8_9_on(self, target):
        newer = target.sm is not None and version_numbers(target.sm) >= (8, 9)
        assert target.takes_weights(Weights(WeightKind.FP8, None, "nearest")) == newer

    def test_weights_as_they_are_always_pass(self, target):
        assert target.takes_weights(None)

    def test_bodies_are_stripped_for_jetpack_6_alone(self, target):
        assert target.strips_body == (target.versions == VersionRange("10.3", "10.3"))

    def test_nothing_claims_to_have_run_on_a_gpu(self, target):
        assert target.verified.startswith("run:") == (target.name == "cpu")


def test_jetpack_6_and_7_are_two_targets_of_one_device():
    six, seven = (find_target(f"jetson-orin-agx-64gb{name}") for name in ("", "-jetpack7"))
    assert (six.memory_bytes, six.bandwidth_bytes_per_second) == (
        seven.memory_bytes,
        seven.bandwidth_bytes_per_second,
    )
    assert six.versions.holds("10.3.0.30")
    assert not six.versions.holds("10.4.0")
    assert seven.versions.holds("11.4.1")
    assert not seven.versions.holds("10.13.3")


@pytest.mark.parametrize(
    ("low", "high", "version", "held"),
    [
        ("10.3", "10.3", "10.3.0.30", True),
        ("10.3", "10.3", "10.30.0", False),
        ("10.15", "11", "11.4.1.2", True),
        ("10.15", "11", "12.0", False),
        ("10.15", "11", "10.9.1", False),
        ("1.7", "1", "1.7.1.116", True),
    ],
)
def test_version_ranges_compare_numbers(low, high, version, held):
    assert VersionRange(low, high).holds(version) == held


def test_the_best_graphs_follow_what_was_told():
    ada = find_target("rtx-ada")
    assert ada.best() == ada.graphs[0]
    assert ada.best(precision=Precision.FP32) == Graphs(Dialect.PORTABLE, Precision.FP32)
    with pytest.raises(UsageError, match="takes no modern fp32"):
        ada.best(Dialect.MODERN, Precision.FP32)


@pytest.mark.parametrize("scorer", Scorer)
@pytest.mark.parametrize(
    "settings", [{}, {"select": Select.LOWEST}, {"source": Source.KEY}], ids=("plain", "lowest", "key")
)
def test_turing_takes_no_policy_that_multiplies_float32_matrices(scorer, settings):
    chooser = TopK(scorer, **settings)
    assert find_target("rtx-turing").takes_chooser(chooser) == (scorer is Scorer.NORM)
    assert find_target("rtx-ada").takes_chooser(chooser)


def test_the_other_kinds_of_policies_on_turing():
    turing = find_target("rtx-turing")
    assert turing.takes_chooser(Random(7))
    assert turing.takes_chooser(Nothing())
    assert not turing.takes_chooser(MaxMin())
    assert not turing.takes_chooser(Coverage(Scorer.NORM))


def test_a_target_may_take_one_spelling_of_a_policy_alone(tmp_path):
    file = tmp_path / "picky.toml"
    file.write_text('extends = "rtx-ada"\nchoosers = ["paper-lowest", "random"]\n')
    taken = {
        name
        for name in ("paper-lowest", "paper-lowest-key", "paper-highest", "random", "random-3", "norm-lowest")
        if read_target(file).takes_chooser(chooser_named(name))
    }
    assert taken == {"paper-lowest", "paper-lowest-key", "random", "random-3"}


def test_all_policies_begin_with_one_of_the_words_a_target_has_by_default():
    others = (MaxMin(), Coverage(), Random(3), Nothing())
    names = [TopK(scorer).name for scorer in Scorer] + [chooser.name for chooser in others]
    assert {name.split("-")[0] for name in names} == set(CHOOSERS)


def test_unknown_target_suggests_the_nearest():
    with pytest.raises(UsageError) as refused:
        find_target("jetson-orin-nx-16g")
    assert "jetson-orin-nx-16gb" in refused.value.hint
    with pytest.raises(UsageError) as refused:
        find_target("rtx-adaa")
    assert "rtx-ada" in refused.value.hint


@pytest.mark.parametrize("part", ["orin", "Orin", "agx-64"])
def test_a_part_of_a_name_lists_the_targets_that_have_it(part):
    with pytest.raises(UsageError) as refused:
        find_target(part)
    named = {target.name for target in TARGETS if target.name in refused.value.hint}
    assert named == {target.name for target in TARGETS if part.lower() in target.name}


def test_a_file_of_ones_own_extends_a_shipped_target(tmp_path):
    file = tmp_path / "my-card.toml"
    file.write_text(OWN)
    target = find_target(str(file))
    assert (target.name, target.title, target.memory_bytes) == ("my-card", "My card", 12_000_000_000)
    assert target.sm == find_target("rtx-ada").sm
    assert target.sources["memory_bytes"] == "its box"
    assert target.sources["sm"] == find_target("rtx-ada").sources["sm"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("memory = 3", "unknown key 'memory'"),
        ('extends = "nothing"', "extends 'nothing'"),
        ('graphs = ["modern fp8"]', "fp8"),
        ('graphs = ["modern"]', "expected pairs"),
        ("graphs = []", "takes no graphs"),
        ('memory_bytes = "much"', "memory_bytes"),
        ('verified = "surely"', "verified"),
        ('flavour = "tensorflow"', "tensorflow"),
        ('choosers = ["magic"]', "'magic', which begins no policy's name"),
        ('weights = ["int3"]', "weights has 'int3'"),
        ("weights = []", "weights is empty"),
        ('sm = "8.6"\nweights = ["fp8"]', "fp8, which needs SM 8.9"),
        ('choosers = ["paper-"]', "'paper-', which begins no policy's name"),
        ("title = ", "not readable TOML"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, change, complaint):
    file = tmp_path / "broken.toml"
    key = change.split(" ")[0]
    lines = [line for line in OWN.splitlines() if not line.startswith(f"{key} =")]
    file.write_text("\n".join([change, *lines]))
    with pytest.raises(UserError, match=complaint) as refused:
        read_target(file)
    assert "broken.toml" in str(refused.value)


def test_figures_without_a_source_are_refused(tmp_path):
    file = tmp_path / "unsourced.toml"
    file.write_text(
        'title = "x"\nsm = "8.9"\nflavour = "tensorrt-rtx"\nversions = { minimum = "1", maximum = "1" }\n'
        'cuda = "12"\nmemory_bytes = 8\nbandwidth_bytes_per_second = 1.0\ngraphs = ["portable fp32"]\n'
        'verified = "no: a test"\n[peak_flops]\nfp32 = 1.0\n[sources]\nsm = "a"\nversions = "b"\ncuda = "c"\n'
    )
    with pytest.raises(UserError, match="no source for"):
        read_target(file)


def test_targets_json_has_what_scripts_read():
    said = json.loads(ep_export("targets", "--json").out)["targets"]
    assert {entry["name"] for entry in said} >= set(EXPECTED)
    for entry in said:
        assert {"name", "sm", "flavour", "dtypes", "dialect", "verified"} <= set(entry)
        assert "none" in entry["weights"]
    nano = next(entry for entry in said if entry["name"] == "jetson-orin-nano-8gb")
    assert nano["flavour"] == "tensorrt"
    assert nano["dialect"] == "portable"
    assert "bf16" in nano["dtypes"]
    assert nano["weights"][0] == "int4"


def test_the_list_says_what_weights_a_target_takes_best():
    said = ep_export("targets").out
    assert "weights:  int4, int8, as they are" in said
    assert max(map(len, said.splitlines())) <= 80


def test_the_list_says_how_far_each_was_verified_and_which_policies_it_takes():
    blocks = ep_export("targets").out.strip().split("\n\n")
    (turing,) = (block for block in blocks if "rtx-turing" in block)
    assert "policies: norm, random, nothing\n" in turing
    assert "no GPU" in turing
    (ada,) = (block for block in blocks if "rtx-ada" in block)
    assert "policies: all\n" in ada
    for target in TARGETS:
        (block,) = (block for block in blocks if f"  {target.name} " in block)
        shown = " ".join(block.split())
        assert " ".join(target.verified.split()) in shown
        assert ", ".join(map(str, target.graphs)) in shown
        assert f"SM {target.sm} " in shown or target.sm is None


def test_the_list_fits_a_terminal_of_80_columns():
    assert max(map(len, ep_export("targets").out.splitlines())) <= 80
