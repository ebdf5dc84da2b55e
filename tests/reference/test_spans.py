"""The pruned forward in parts, against Hugging Face running the whole model."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from oracle_cases import case

from ep_export.planning import average_keep
from ep_export.policy import Cut, Keep, MaxMin, Schedule, Source, TopK
from ep_export.reference import (
    PruneSpec,
    SpanRecorder,
    capture,
    cut_tokens,
    layer_arguments,
    prune,
    run_layers,
    staying,
)

# sums of float32 in batches of another size
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def oracle():
    return case()


def recorded(oracle, layers, *, arguments=False):
    """What a plain forward without a cache shows at these layers, and its outputs."""
    recorder = SpanRecorder(oracle.family.decoder(oracle.model), layers, arguments=arguments)
    with ExitStack() as undo, torch.inference_mode():
        recorder.install(undo)
        output = oracle.model(**oracle.inputs, use_cache=False, output_hidden_states=True)
    return recorder, output


def test_text_and_kept_tokens_stay_in_order():
    rows = staying(9, torch.tensor([2, 3, 4, 6]), torch.tensor([6, 3]))
    assert rows.tolist() == [0, 1, 3, 5, 6, 7, 8]
    assert staying(4, torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64)).tolist() == [0, 3]


def test_the_recorder_sees_what_enters_layers_and_leaves_projections(oracle):
    recorder, output = recorded(oracle, [0, 2, 4])
    for layer in (0, 2):
        torch.testing.assert_close(recorder.hidden[layer], output.hidden_states[layer], atol=0, rtol=0)
    decoder = oracle.family.decoder(oracle.model)
    torch.testing.assert_close(decoder.norm(recorder.hidden[4]), output.hidden_states[4], atol=0, rtol=0)
    attention = decoder.layers[1].self_attn
    normed = decoder.layers[1].input_layernorm(output.hidden_states[1])
    projected = recorder.projected(2)
    torch.testing.assert_close(projected[Source.QUERY], attention.q_proj(normed)[0])
    torch.testing.assert_close(projected[Source.KEY], attention.k_proj(normed)[0])
    torch.testing.assert_close(projected[Source.VALUE], attention.v_proj(normed)[0])
    assert recorder.projected(0) == {}
    assert recorder.arguments == {}


def test_the_recorder_leaves_no_hooks_and_can_forget(oracle):
    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in oracle.model.modules()]

    before = hooks()
    recorder, _ = recorded(oracle, [1], arguments=True)
    assert hooks() == before
    recorder.clear()
    assert not recorder.hidden
    assert not recorder.projections
    assert not recorder.arguments


def test_layers_run_by_themselves_as_in_the_model(oracle):
    recorder, output = recorded(oracle, [1, 4], arguments=True)
    decoder = oracle.family.decoder(oracle.model)
    with torch.inference_mode():
        hidden = run_layers(decoder, recorder.hidden[1], range(1, 4), recorder.arguments)
    torch.testing.assert_close(hidden, recorder.hidden[4], atol=0, rtol=0)
    assert output.hidden_states[1].shape == hidden.shape


def test_a_batch_of_row_sets_through_two_cuts_equals_prune(oracle):
    """Two ways of pruning, cut twice, as rows of one batch: the hidden states of `prune` for each."""
    keeps = [torch.from_numpy(oracle.prompt.visual_index[start::2].copy()) for start in (0, 1)]
    again = [kept[::2] for kept in keeps]
    recorder, _ = recorded(oracle, [1], arguments=True)
    decoder = oracle.family.decoder(oracle.model)
    length, visual = oracle.prompt.input_ids.shape[1], torch.from_numpy(oracle.prompt.visual_index)
    rows = [staying(length, visual, kept) for kept in keeps]
    rows_after = [staying(length, visual, kept) for kept in again]
    with torch.inference_mode():
        hidden = torch.cat([recorder.hidden[1][:, one] for one in rows])
        hidden = run_layers(decoder, hidden, range(1, 3), recorder.arguments, rows)
        onward = [torch.isin(one, after) for one, after in zip(rows, rows_after, strict=True)]
        hidden = torch.stack([h[stay] for h, stay in zip(hidden, onward, strict=True)])
        hidden = run_layers(decoder, hidden, range(3, 4), recorder.arguments, rows_after)
        logits = decoder.lm_head(decoder.norm(hidden))
    n = len(visual)
    schedule = Schedule((Cut(1, TopK(), len(keeps[0]) / n), Cut(3, TopK(), len(again[0]) / n)))
    spec = PruneSpec(schedule, average_keep(schedule, layers=4))
    for number, sets in enumerate(zip(keeps, again, strict=True)):

        def select(cut, tokens, k, sets=sets):
            arrived = torch.arange(length) if cut == 0 else staying(length, visual, sets[0])
            return torch.isin(arrived, sets[cut]).nonzero()[:, 0]

        with prune(oracle.model, spec, select=select), torch.inference_mode():
            expected = oracle.model(**oracle.inputs, use_cache=False).logits
        torch.testing.assert_close(logits[number], expected[0], atol=TOLERANCE, rtol=0)


def test_masks_are_cut_by_rows_and_by_columns_of_the_cache():
    mask = torch.arange(12.0).reshape(1, 1, 3, 4)  # three new tokens behind one in the cache
    tables = (torch.arange(6.0).reshape(1, 3, 2), torch.zeros(1, 3, 2))
    given = {"attention_mask": mask, "position_embeddings": tables, "position_ids": None}
    cut = layer_arguments(given, [torch.tensor([0, 2])], [torch.tensor([0, 1, 3])])
    np.testing.assert_array_equal(cut["attention_mask"], mask[:, :, [0, 2]][..., [0, 1, 3]])
    np.testing.assert_array_equal(cut["position_embeddings"][0], tables[0][:, [0, 2]])
    decode = layer_arguments(given, None, [torch.tensor([0, 3])])
    np.testing.assert_array_equal(decode["attention_mask"], mask[..., [0, 3]])
    assert decode["position_embeddings"] is tables
    assert layer_arguments(given, None) == given


@pytest.mark.parametrize(
    ("source", "shape"),
    [(Source.QUERY, (4, 16)), (Source.KEY, (2, 16)), (Source.VALUE, (2, 16)), (Source.HIDDEN, (4, 16))],
)
def test_a_cut_sees_its_source_as_heads(oracle, source, shape):
    recorder, _ = recorded(oracle, [2])
    visual = torch.from_numpy(oracle.prompt.visual_index)
    hidden = recorder.hidden[2][0]
    tokens = cut_tokens(
        Cut(2, TopK(source=source)),
        oracle.family.dims(oracle.model.config),
        hidden=hidden,
        projections=recorder.projected(2),
        visual_index=visual,
    )
    assert tokens.states.shape == (len(visual), *shape)
    flat = hidden if source is Source.HIDDEN else recorder.projected(2)[source]
    np.testing.assert_array_equal(tokens.states.flatten(1), flat[visual])
    np.testing.assert_array_equal(tokens.hidden, hidden[visual])


def test_a_chooser_that_reads_no_projections_gets_none(oracle):
    states = capture(oracle.model, oracle.prompt, PruneSpec(Schedule((Cut(2, MaxMin()),)), Keep(ratio=0.75)))
    assert states.cuts[0].tokens.states is None
