"""What `prune` does to a model: nothing that lasts, and nothing where there is nothing to prune."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from oracle_cases import case
from transformers import DynamicCache

from ep_export.errors import UserError
from ep_export.planning import kept_tokens, make_plan
from ep_export.policy import Cut, Keep, MaxMin, Nothing, Schedule, Scorer, Select, Source, TopK
from ep_export.reference import PruneSpec, capture, greedy, prune, visual_positions


def one_cut(layer, **chooser):
    return Schedule((Cut(layer, TopK(**chooser)),))


HALF = PruneSpec(one_cut(1), Keep(ratio=0.5))
TWICE = PruneSpec(Schedule((Cut(1, TopK(), 0.6), Cut(3, TopK(), 0.2))), Keep(ratio=0.6))
FROM_THE_START = PruneSpec(Schedule((Cut(0, MaxMin(), 0.6), Cut(2, TopK(), 0.2))), Keep(ratio=0.4))
SPECS = pytest.mark.parametrize("spec", [HALF, TWICE, FROM_THE_START], ids=["one cut", "two", "two from 0"])


@pytest.fixture(scope="module")
def oracle():
    return case()


def hook_counts(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.mark.parametrize(
    "schedule",
    [
        one_cut(1),
        one_cut(3),
        Schedule((Cut(0, MaxMin(), 1.0), Cut(2, TopK(), 1.0), Cut(3, TopK(), 1.0))),
    ],
    ids=str,
)
def test_keeping_all_is_bitwise_hugging_face(oracle, schedule):
    plain = oracle.model(**oracle.inputs)
    with prune(oracle.model, PruneSpec(schedule, Keep(ratio=1.0))) as trace:
        pruned = oracle.model(**oracle.inputs)
        answer = oracle.greedy()
    assert torch.equal(plain.logits, pruned.logits)
    assert answer == oracle.greedy()
    assert trace.kept_index.tolist() == list(range(oracle.prompt.input_ids.shape[1]))


def test_pruning_changes_the_logits(oracle):
    plain = oracle.model(**oracle.inputs).logits[0, -1]
    with prune(oracle.model, HALF):
        assert not torch.allclose(plain, oracle.model(**oracle.inputs).logits[0, -1], atol=1e-2)


def test_a_plan_prunes_like_its_schedule_and_keep(oracle):
    n = len(oracle.prompt.visual_index)
    plan = make_plan(
        oracle.family.dims(oracle.model.config), HALF.schedule, HALF.keep, visual_tokens=n, text_tokens=10
    )
    with prune(oracle.model, plan):
        by_plan = oracle.greedy()
    with prune(oracle.model, HALF):
        assert by_plan == oracle.greedy()


@SPECS
def test_decoding_with_a_cache_equals_recomputing_without(oracle, spec):
    with prune(oracle.model, spec):
        assert oracle.greedy(use_cache=True) == oracle.greedy(use_cache=False)


@SPECS
def test_eager_attention_prunes_like_sdpa(oracle, spec):
    with prune(oracle.model, spec):
        expected = oracle.model(**oracle.inputs).logits
    oracle.model.set_attn_implementation("eager")
    try:
        with prune(oracle.model, spec):
            got = oracle.model(**oracle.inputs).logits
            answer = oracle.greedy()
    finally:
        oracle.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    with prune(oracle.model, spec):
        assert answer == oracle.greedy()


@SPECS
def test_explicit_masks_are_cut_like_implicit_ones(oracle, spec):
    """Left padding forces 4D masks through prefill and decode."""
    with prune(oracle.model, spec):
        expected = oracle.greedy()
        padded = dict(oracle.inputs, attention_mask=torch.ones_like(oracle.inputs["input_ids"]))
        for name in ("input_ids", "mm_token_type_ids", "attention_mask"):
            padded[name] = torch.nn.functional.pad(padded[name], (3, 0))
        ids = oracle.model.generate(**padded, max_new_tokens=8, do_sample=False, eos_token_id=-1)
    assert ids[0, padded["input_ids"].shape[1] :].tolist() == expected


def test_sampling_is_reproducible_and_pruned(oracle):
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5, "eos_token_id": -1}
    with prune(oracle.model, HALF) as trace:
        torch.manual_seed(3)
        first = oracle.model.generate(**oracle.inputs, **options)
        torch.manual_seed(3)
        second = oracle.model.generate(**oracle.inputs, **options)
    assert torch.equal(first, second)
    assert len(trace.kept_index) < oracle.prompt.input_ids.shape[1]


def test_text_only_prompts_pass_untouched():
    text = case(sizes=())
    expected = text.greedy()
    with prune(text.model, HALF) as trace:
        assert text.greedy() == expected
    assert len(trace.visual_index) == 0
    assert trace.kept_index.tolist() == list(range(text.prompt.input_ids.shape[1]))


@SPECS
def test_second_turn_on_a_pruned_cache_equals_one_long_prompt(oracle, spec):
    """The cache carries which columns it holds, also through the deep copy Hugging Face reuses prompts by."""
    ids, more = oracle.inputs["input_ids"], torch.tensor([[5, 9, 11]])
    with prune(oracle.model, spec), torch.inference_mode():
        cache = DynamicCache(config=oracle.model.config)
        oracle.model(**oracle.inputs, past_key_values=cache)
        turn = oracle.model(input_ids=more, past_key_values=copy.deepcopy(cache), use_cache=True)
        again = oracle.model(input_ids=more, past_key_values=cache, use_cache=True)
        whole = dict(oracle.inputs, input_ids=torch.cat([ids, more], dim=1))
        whole["mm_token_type_ids"] = torch.nn.functional.pad(whole["mm_token_type_ids"], (0, 3))
        whole.pop("attention_mask", None)
        expected = oracle.model(**whole)
    torch.testing.assert_close(turn.logits, expected.logits[:, -3:], atol=1e-4, rtol=0)
    assert torch.equal(turn.logits, again.logits)


@SPECS
def test_a_cache_that_was_reset_is_a_new_one(oracle, spec):
    cache = DynamicCache()  # without a config its layers come as they are needed
    with prune(oracle.model, spec), torch.inference_mode():
        first = oracle.model(**oracle.inputs, past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        second = oracle.model(**oracle.inputs, past_key_values=cache)
    assert torch.equal(first.logits, second.logits)
    assert cache.get_seq_length() == oracle.prompt.input_ids.shape[1]


@pytest.mark.parametrize(
    ("begun", "continued", "message"),
    [
        (HALF, TWICE, "holds 34 tokens at layer 3, expected 48"),
        (TWICE, HALF, "pruned at layers 1, 3, expected 1"),
    ],
)
def test_a_cache_pruned_elsewhere_is_refused(oracle, begun, continued, message):
    cache, more = DynamicCache(config=oracle.model.config), torch.tensor([[5, 9, 11]])
    with prune(oracle.model, begun):
        oracle.model(**oracle.inputs, past_key_values=cache)
    with prune(oracle.model, continued), pytest.raises(UserError, match=message):
        oracle.model(input_ids=more, past_key_values=cache)


def test_model_is_restored(oracle):
    before, expected = hook_counts(oracle.model), oracle.greedy()
    with prune(oracle.model, HALF):
        assert hook_counts(oracle.model) != before
        oracle.greedy()
    assert hook_counts(oracle.model) == before
    assert oracle.greedy() == expected


def test_model_is_restored_after_an_exception(oracle):
    before, expected = hook_counts(oracle.model), oracle.greedy()
    with pytest.raises(ZeroDivisionError), prune(oracle.model, HALF, select=lambda *_: 1 / 0):
        oracle.greedy()
    assert hook_counts(oracle.model) == before
    assert oracle.greedy() == expected
    with prune(oracle.model, HALF):  # and it can be pruned again
        oracle.greedy()


def test_a_failed_forward_leaves_no_prompt_behind(oracle):
    with prune(oracle.model, HALF):
        with pytest.raises(UserError, match="batch of 2"):
            oracle.model(input_ids=oracle.inputs["input_ids"].repeat(2, 1))
        with pytest.raises(UserError, match="without its model"):
            oracle.model.model.language_model(input_ids=torch.tensor([[1, 2, 3]]))


def test_nested_use_is_refused(oracle):
    with prune(oracle.model, HALF):
        with pytest.raises(UserError, match="already"), prune(oracle.model, HALF):
            pass
        oracle.greedy()  # the outer block still holds


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_several_sequences_are_refused(oracle, options):
    with prune(oracle.model, HALF), pytest.raises(UserError, match="one prompt at a time"):
        oracle.model.generate(**oracle.inputs, max_new_tokens=2, **options)


def test_static_caches_are_refused(oracle):
    with prune(oracle.model, HALF), pytest.raises(UserError, match="static or sliding"):
        oracle.model.generate(**oracle.inputs, max_new_tokens=2, cache_implementation="static")


def test_embeddings_without_ids_and_labels_are_refused(oracle):
    with prune(oracle.model, HALF):
        with pytest.raises(UserError, match="needs input_ids"):
            oracle.model(inputs_embeds=torch.zeros(1, 4, 64))
        with pytest.raises(UserError, match="labels"):
            oracle.model(**oracle.inputs, labels=oracle.inputs["input_ids"])


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_a_cut_outside_the_decoder_is_refused(oracle, layer):
    with (
        pytest.raises(UserError, match="expected 1 to 3"),
        prune(oracle.model, PruneSpec(one_cut(layer), Keep(1.0))),
    ):
        pass


def test_an_impossible_keep_is_refused_at_the_prompt(oracle):
    spec = PruneSpec(one_cut(3), Keep(ratio=0.5))
    with prune(oracle.model, spec), pytest.raises(UserError):
        oracle.model(**oracle.inputs)


def test_select_decides_instead_of_the_scores(oracle):
    def last_ones(cut, tokens, k):
        assert cut == 0
        assert tokens.states.shape[:2] == (len(tokens.visual_index), 4)
        return tokens.visual_index[-k:].flip(0)

    with prune(oracle.model, HALF, select=last_ones) as trace:
        oracle.model(**oracle.inputs)
    n = len(oracle.prompt.visual_index)
    (k,) = kept_tokens(HALF.keep, HALF.schedule, layers=4, visual_tokens=n)
    dropped = set(oracle.prompt.visual_index[: n - k].tolist())
    assert trace.kept_index.tolist() == [
        i for i in range(oracle.prompt.input_ids.shape[1]) if i not in dropped
    ]
    assert trace.cuts[0].scores is None


def test_select_is_asked_at_every_cut_in_positions_of_what_arrives(oracle):
    asked = []

    def first_ones(cut, tokens, k):
        asked.append((cut, k, tokens.visual_index))
        return tokens.visual_index[:k]

    with prune(oracle.model, TWICE, select=first_ones) as trace:
        oracle.model(**oracle.inputs)
    first, second = kept_tokens(
        TWICE.keep, TWICE.schedule, layers=4, visual_tokens=len(oracle.prompt.visual_index)
    )
    assert [(cut, k) for cut, k, _ in asked] == [(0, first), (1, second)]
    assert len(asked[1][2]) == first
    # these are the first visual tokens of the prompt still, so they arrive at the same places
    np.testing.assert_array_equal(asked[1][2], oracle.prompt.visual_index[:first])
    np.testing.assert_array_equal(trace.cuts[1].kept_visual, oracle.prompt.visual_index[:second])
    np.testing.assert_array_equal(trace.cuts[1].arrived, trace.cuts[0].kept_index)


@pytest.mark.parametrize(
    "wrong",
    [lambda k, v: v[: k - 1], lambda k, v: v[:1].repeat(k), lambda k, v: v[:k] - v[0]],
    ids=["too few", "one repeated", "text"],
)
def test_a_select_that_breaks_its_contract_is_refused(oracle, wrong):
    with (
        prune(oracle.model, HALF, select=lambda _, tokens, k: wrong(k, tokens.visual_index)),
        pytest.raises(ValueError, match="select must return"),
    ):
        oracle.model(**oracle.inputs)


@SPECS
def test_capture_holds_both_sides_of_every_cut(oracle, spec):
    states = capture(oracle.model, oracle.prompt, spec)
    cuts = [cut.layer for cut in spec.schedule.cuts]
    for i, trace in enumerate(states.cuts):
        stay = torch.isin(trace.arrived, trace.kept_index)
        torch.testing.assert_close(states.hidden_after[i], states.hidden_before[i][:, stay], atol=0, rtol=0)
        visual = torch.isin(trace.arrived, trace.visual_index)
        torch.testing.assert_close(trace.tokens.hidden, states.hidden_before[i][0, visual], atol=0, rtol=0)
    lengths = [oracle.prompt.input_ids.shape[1], *(len(trace.kept_index) for trace in states.cuts)]
    held = [lengths[sum(cut <= layer for cut in cuts)] for layer in range(4)]
    assert [key.shape[2] for key, _ in states.caches] == held
    plain = oracle.model(**oracle.inputs, output_hidden_states=True)
    torch.testing.assert_close(states.hidden_before[0], plain.hidden_states[cuts[0]], atol=0, rtol=0)
    torch.testing.assert_close(states.inputs_embeds, plain.hidden_states[0], atol=0, rtol=0)
    np.testing.assert_array_equal(states.visual_index, oracle.prompt.visual_index)


def test_capture_of_a_text_prompt_has_no_cuts_and_the_same_hidden_states():
    text = case(sizes=())
    states = capture(text.model, text.prompt, TWICE)
    assert states.cuts == ()
    assert states.kept_index.tolist() == list(range(text.prompt.input_ids.shape[1]))
    for before, after in zip(states.hidden_before, states.hidden_after, strict=True):
        assert torch.equal(before, after)


def test_greedy_ignores_sampling_settings_of_the_checkpoint(oracle):
    expected = oracle.greedy(6)
    settings = oracle.model.generation_config
    oracle.model.generation_config = copy.deepcopy(settings)
    oracle.model.generation_config.update(repetition_penalty=3.0, do_sample=True, temperature=5.0, top_k=2)
    try:
        got = greedy(oracle.model, oracle.family, oracle.model.config, oracle.prompt, 6, eos_token_ids=[-1])
    finally:
        oracle.model.generation_config = settings
    assert got == expected


def test_greedy_with_a_plan_equals_generate_inside_prune(oracle):
    got = greedy(
        oracle.model, oracle.family, oracle.model.config, oracle.prompt, 6, plan=HALF, eos_token_ids=[-1]
    )
    with prune(oracle.model, HALF):
        assert got == oracle.greedy(6)


def test_lowest_keeps_what_highest_drops(oracle):
    kept = {}
    for select in Select:
        spec = PruneSpec(one_cut(2, scorer=Scorer.NORM, select=select), Keep(ratio=0.75))
        with prune(oracle.model, spec) as trace:
            oracle.model(**oracle.inputs)
        kept[select] = set(trace.kept_index.tolist()) & set(oracle.prompt.visual_index.tolist())
    assert kept[Select.HIGHEST].isdisjoint(kept[Select.LOWEST])


def test_what_nothing_keeps_is_text_alone(oracle):
    schedule = Schedule((Cut(1, TopK(source=Source.HIDDEN), 0.5), Cut(2, Nothing(), 0.0)))
    with prune(oracle.model, PruneSpec(schedule, Keep(ratio=0.375))) as trace:
        oracle.greedy()
    assert not set(trace.kept_index.tolist()) & set(oracle.prompt.visual_index.tolist())


def test_visual_positions_know_both_spellings():
    class Llava:
        image_token_index = 7

    class Qwen:
        image_token_id, video_token_id = 7, 8

    ids = torch.tensor([1, 7, 7, 8, 2])
    assert visual_positions(ids, Llava()).tolist() == [1, 2]
    assert visual_positions(ids, Qwen()).tolist() == [1, 2, 3]
