"""The segment runner against the oracle: Hugging Face's own forward inside `reference.prune`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import make_tiny, tiny_picture

from ep_export.calibrate.candidates import ways
from ep_export.calibrate.fidelity import gaps, run_full
from ep_export.checkpoint import open_checkpoint
from ep_export.entropy import layer_entropy, token_scores
from ep_export.plan import kept_tokens
from ep_export.policy import Keep, Policy, Scorer, Select
from ep_export.reference import PruneSpec, greedy, load_model, prune

LAYERS = 4


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory):
    path = make_tiny(tmp_path_factory.mktemp("models") / "tiny", layers=LAYERS, heads=6, kv_heads=2)
    checkpoint = open_checkpoint(str(path))
    model = load_model(checkpoint, torch.float64)
    builder = checkpoint.family.prompt_builder(checkpoint.path, checkpoint.config)
    prompt = builder.build([tiny_picture(140, 112, seed=3)], "What is in the picture?")
    answer = greedy(model, checkpoint.family, checkpoint.config, prompt, 5)
    # a placeholder token cannot be fed back; any other token serves this comparison
    answer = [token if token != checkpoint.config.image_token_id else 0 for token in answer]
    full = run_full(
        model, checkpoint.family, prompt, answer, layers=range(1, LAYERS), heads=checkpoint.dims.heads
    )
    return checkpoint, model, prompt, answer, full


def oracle_log_probs(case, spec=None, select=None) -> torch.Tensor:
    """Log-probabilities at the answer's positions from Hugging Face's forward over prompt and answer."""
    checkpoint, model, prompt, answer, _ = case
    fed = np.concatenate([prompt.input_ids, np.array([answer[:-1]], dtype=np.int64)], axis=1)
    inputs = checkpoint.family.reference_inputs(replace(prompt, input_ids=fed), checkpoint.config)
    with torch.inference_mode():
        if spec is None:
            logits = model(**inputs).logits
        else:
            with prune(model, spec, select=select):
                logits = model(**inputs).logits
    return logits[0, -len(answer) :].double().log_softmax(-1)


def expected_gap(full: torch.Tensor, pruned: torch.Tensor) -> tuple[float, int]:
    kl = torch.nn.functional.kl_div(pruned, full, log_target=True, reduction="sum")
    return float(kl), int((full.argmax(-1) == pruned.argmax(-1)).sum())


def test_full_pass_is_hugging_faces_forward(case) -> None:
    torch.testing.assert_close(case[-1].log_probs.double(), oracle_log_probs(case), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", range(1, LAYERS))
@pytest.mark.parametrize("scorer", [Scorer.PAPER, Scorer.NORM])
def test_every_way_of_pruning_equals_the_oracle(case, layer: int, scorer: Scorer) -> None:
    checkpoint, model, _, _, full = case
    keep = Keep(ratio=0.8)
    full_log_probs = oracle_log_probs(case)
    count = len(full.visual_index)
    k = kept_tokens(keep, layers=LAYERS, layer=layer, visual_tokens=count)
    scores = token_scores(full.queries[layer], scorer)
    best = scores.argsort(descending=True, stable=True)
    kept = [best[:k], best.flip(0)[:k]]
    found = gaps(checkpoint.family.decoder(model), full, layer, [full.visual_index[one] for one in kept])
    for gap, select in zip(found, Select, strict=True):
        pruned = oracle_log_probs(case, PruneSpec(Policy(layer, scorer, select), keep))
        kl, agreements = expected_gap(full_log_probs, pruned)
        assert gap.kl == pytest.approx(kl, abs=1e-4)
        assert gap.agreements == agreements
        assert kl > 1e-3  # pruning did change something


def test_keeping_all_costs_nothing(case) -> None:
    checkpoint, model, _, answer, full = case
    gap = gaps(checkpoint.family.decoder(model), full, 2, [full.visual_index])[0]
    assert gap.kl == pytest.approx(0, abs=1e-5)
    assert gap.agreements == len(answer)


def test_batches_do_not_change_the_gaps(case, monkeypatch: pytest.MonkeyPatch) -> None:
    from ep_export.calibrate import fidelity

    checkpoint, model, _, _, full = case
    decoder = checkpoint.family.decoder(model)
    kept = [full.visual_index[start : start + 4] for start in range(5)]
    together = gaps(decoder, full, 1, kept)
    monkeypatch.setattr(fidelity, "_BATCH_TOKENS", 1)
    for one, other in zip(together, gaps(decoder, full, 1, kept), strict=True):
        assert one.kl == pytest.approx(other.kl, abs=1e-6)


def test_states_and_entropies_are_those_of_the_projections(case) -> None:
    checkpoint, model, prompt, _, full = case
    inputs = checkpoint.family.reference_inputs(prompt, checkpoint.config)
    with torch.inference_mode():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        for index, layer in enumerate(checkpoint.family.decoder(model).layers):
            normed = layer.input_layernorm(hidden[index])[0, full.visual_index]
            queries = layer.self_attn.q_proj(normed)
            assert full.query_entropy[index] == pytest.approx(layer_entropy(queries), abs=1e-6)
            keys = layer.self_attn.k_proj(normed)
            assert full.key_entropy[index] == pytest.approx(layer_entropy(keys), abs=1e-6)
            if index + 1 in full.queries:
                torch.testing.assert_close(full.queries[index + 1].flatten(1), queries, atol=1e-8, rtol=1e-8)


def test_only_asked_layers_are_kept_in_memory(case) -> None:
    checkpoint, model, prompt, answer, _ = case
    full = run_full(model, checkpoint.family, prompt, answer, layers=[2], heads=6, entropies=False)
    assert list(full.hidden) == [2]
    assert list(full.queries) == [2]
    assert len(ways([2])) == 9
