"""Which components become engines, and what is refused before a compiler starts."""

from dataclasses import replace

import pytest
from bundles import export_tiny, two_cuts
from family_bundles import MAKERS

from ep_export.bundle import Dialect, Precision, Role
from ep_export.checkpoint import open_config
from ep_export.engine.compile import CompileRequest, check_ahead
from ep_export.engine.placement import TOP_K_LIMIT, PruneOn, check_chooser, place_components, takes_plugin
from ep_export.errors import UsageError, UserError
from ep_export.first_token import typical_work
from ep_export.numerics import WeightKind, Weights
from ep_export.planning import average_keep, make_plan
from ep_export.policy import Cut, Keep, MaxMin, Nothing, Random, Schedule, Scorer, TopK
from ep_export.targets import Graphs, find_target

ADA, TURING, ORIN = map(find_target, ("rtx-ada", "rtx-turing", "jetson-orin-agx-64gb"))
POLICIES = (TopK(Scorer.NORM), MaxMin(), Random(), Nothing())


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Two cuts by the paper's policy, and further policies at both."""
    folder = tmp_path_factory.mktemp("placement")
    checkpoint = MAKERS["llava"](folder / "checkpoint")
    schedule = two_cuts(0, 1, MaxMin(), TopK())
    return export_tiny(checkpoint, folder / "bundle", schedule=schedule, policies=POLICIES[2:]).manifest


def names(components) -> list[str]:
    return [component.name for component in components]


def test_engines_are_all_components_of_the_schedule_and_no_other_policy(manifest):
    placed = place_components(manifest, ADA, max_kept_tokens=64)
    used = {"prune_0.divprune", "prune_1.paper-highest"}
    assert names(placed.engines) == [
        component.name
        for component in manifest.components
        if component.role in {Role.VISION, Role.DECODER} or component.name in used
    ]
    assert placed.on_cpu == ()


def test_an_older_bundle_does_not_say_where_its_embedding_table_lies_and_gets_an_engine(manifest):
    older = tuple(replace(component, table=None) for component in manifest.components)
    placed = place_components(replace(manifest, components=older), ADA, max_kept_tokens=64)
    assert set(names(placed.engines)) > {"embed_tokens", "decoder_0"}


def test_further_policies_are_had_by_name(manifest):
    placed = place_components(manifest, ADA, policies=("random",), max_kept_tokens=64)
    prunes = [component for component in placed.engines if component.role is Role.PRUNE]
    assert set(names(prunes)) == {
        "prune_0.divprune",
        "prune_0.random",
        "prune_1.random",
        "prune_1.paper-highest",
    }


def test_a_policy_the_bundle_has_not_is_told_with_how_to_add_it(manifest):
    with pytest.raises(UserError, match="no policy 'order2-lowest'") as refused:
        place_components(manifest, ADA, policies=("order2-lowest",), max_kept_tokens=64)
    assert "policy add" in refused.value.hint


def test_what_a_compiler_does_not_take_is_one_line_with_a_way_out(manifest):
    with pytest.raises(UserError, match="cannot compile policy divprune for rtx-turing") as refused:
        place_components(manifest, TURING, max_kept_tokens=64)
    assert "expected one of: norm, random, nothing" in str(refused.value)
    assert "--prune-on cpu" in refused.value.hint


def test_on_the_cpu_any_policy_goes_and_the_spans_still_become_engines(manifest):
    placed = place_components(
        manifest, TURING, policies=("random",), prune_on=PruneOn.CPU, max_kept_tokens=TOP_K_LIMIT
    )
    assert {component.role for component in placed.engines} == {Role.VISION, Role.DECODER}
    assert set(names(placed.on_cpu)) == {
        "prune_0.divprune",
        "prune_0.random",
        "prune_1.random",
        "prune_1.paper-highest",
    }


@pytest.mark.parametrize("chooser", [TopK(), Random()])
def test_more_than_topk_takes_is_refused(chooser):
    check_chooser(chooser, ADA, max_kept_tokens=TOP_K_LIMIT - 1)
    with pytest.raises(UsageError, match="up to 3840 visual tokens, expected fewer than 3840") as refused:
        check_chooser(chooser, ADA, max_kept_tokens=TOP_K_LIMIT)
    assert f"--max-kept-tokens {TOP_K_LIMIT - 1}" in refused.value.hint


def test_policies_that_do_not_sort_have_no_such_limit():
    for chooser in (MaxMin(), Nothing()):
        check_chooser(chooser, ADA, max_kept_tokens=TOP_K_LIMIT)


def test_the_operators_say_so_too(manifest):
    """TopK is in the graphs of exactly those policies that are refused above its limit."""
    import onnx_ir as ir

    from ep_export.choosers.component import build_prune

    for chooser in (TopK(), *POLICIES):
        model = build_prune(
            chooser,
            dims=manifest.dims,
            cut_layer=1,
            precision_dtype=ir.DataType.FLOAT,
            degree=64,
            opset=20,
        )
        graphs = [model.graph, *(function.graph for function in model.functions.values())]
        sorts = any(node.op_type == "TopK" for graph in graphs for node in graph.all_nodes())
        assert sorts == isinstance(chooser, (TopK, Random)), chooser


def test_the_plugin_takes_scores_alone_and_knows_no_limit(manifest):
    (prune,) = (c for c in manifest.components if c.name == "prune_1.paper-highest")
    assert takes_plugin(prune)
    assert not any(takes_plugin(c) for c in manifest.components if not isinstance(c.chooser, TopK))
    check_chooser(TopK(), ORIN, plugin=True, max_kept_tokens=10_000)
    with pytest.raises(UsageError):
        check_chooser(Random(), ORIN, plugin=True, max_kept_tokens=10_000)


class TestAheadOfABuild:
    """`check_ahead`: what cannot be compiled is told before a bundle is built."""

    GRAPHS = Graphs(Dialect.PORTABLE, Precision.FP16)

    def check(self, manifest, target, **changes):
        plan = make_plan(
            manifest.dims,
            manifest.schedule,
            average_keep(manifest.schedule, layers=manifest.dims.layers),
            visual_tokens=64,
            text_tokens=16,
        )
        check_ahead(CompileRequest(target, **changes), plan, self.GRAPHS)

    def test_any_cut_may_be_what_the_compiler_does_not_take(self, manifest):
        with pytest.raises(UserError, match="cannot compile policy divprune"):
            self.check(manifest, TURING)
        self.check(manifest, ADA)

    def test_the_cpu_prunes_whatever_it_is(self, manifest):
        self.check(manifest, TURING, prune_on=PruneOn.CPU)

    def test_where_nothing_is_compiled_nothing_is_refused(self, manifest):
        self.check(manifest, find_target("cpu"))

    def test_weights_that_fit_are_let_through(self):
        """LLaVA-1.5-13B in 16 GB: 26 GB as published, 7 GB in int4."""
        model = open_config("llava-1.5-13b")
        work = typical_work(model)
        plan = make_plan(
            model.dims,
            Schedule((Cut(2),)),
            Keep(ratio=0.25),
            visual_tokens=work.visual_tokens,
            text_tokens=16,
            vision=work,
        )
        request = CompileRequest(find_target("jetson-orin-nx-16gb"))
        check_ahead(request, plan, self.GRAPHS, Weights(WeightKind.INT4, 128, "nearest"))
        with pytest.raises(UserError, match="weights 26"):
            check_ahead(request, plan, self.GRAPHS)
