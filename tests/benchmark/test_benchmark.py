"""The bench verb on a tiny bundle: what it counts is exact, what it times is only there and positive."""

import json

import pytest
from bundles import export_tiny
from command_line import ep_export
from tiny import tiny_picture

from ep_export.benchmark import measure
from ep_export.errors import UsageError
from ep_export.policy import Keep
from ep_export.runtime import Session


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, tmp_path_factory):
    return export_tiny(tiny_checkpoint, tmp_path_factory.mktemp("bench") / "bundle", layer=1)


@pytest.fixture(scope="module")
def session(bundle):
    with Session.open(bundle, threads=1) as opened:
        yield opened


def test_both_sides_generate_the_same_number_of_tokens_from_caches_of_their_own_length(session):
    found = measure(session, [tiny_picture(112, 84)], "What", keep=Keep(ratio=0.5), new_tokens=3, rounds=3)
    dims, policy = session.bundle.manifest.dims, session.bundle.manifest.policy
    text = found.prompt_tokens - found.visual_tokens
    token_bytes = 2 * dims.kv_heads * dims.head_dim * 4
    kept = found.pruned.visual_tokens_kept
    assert found.new_tokens == 3
    assert found.full.visual_tokens_kept == found.visual_tokens == 12
    assert 0 < kept < found.visual_tokens
    assert found.full.kv_bytes == dims.layers * found.prompt_tokens * token_bytes
    lower, upper = policy.layer * found.prompt_tokens, (dims.layers - policy.layer) * (text + kept)
    assert found.pruned.kv_bytes == (lower + upper) * token_bytes
    assert found.predicted_prefill > 1
    for stages in (found.full.latency_ms, found.pruned.latency_ms, found.speedup):
        for spread in (stages.vision, stages.prefill, stages.first_token, stages.decode):
            assert 0 < spread.low <= spread.median <= spread.high


def test_a_benchmark_without_pictures_or_rounds_is_refused(session):
    with pytest.raises(UsageError, match="needs a picture"):
        measure(session, [], "What", keep=Keep(ratio=0.5), new_tokens=3, rounds=3)
    with pytest.raises(UsageError, match="at least 3 rounds"):
        measure(session, [tiny_picture(56, 56)], "What", keep=Keep(ratio=0.5), new_tokens=3, rounds=1)


def test_the_verb_prints_a_table_and_json(bundle):
    ask = ("bench", str(bundle.path), "--rounds", "3", "--max-new-tokens", "2", "--prompt", "What")
    table = ep_export(*ask)
    assert table.code == 0, table.err
    assert "first token, ms" in table.out
    said = json.loads(ep_export(*ask, "--keep", "0.5", "--json").out)
    assert said["pruned"]["keep"] == {"ratio": 0.5, "tokens": None}
    assert said["full"]["kv_bytes"] > said["pruned"]["kv_bytes"]
