"""Answers of bundles with several cuts and choosers of every kind, against Hugging Face pruned the same."""

import dataclasses

import pytest
import torch
from bundles import export_tiny, two_cuts
from kept_sets import difference_from_exact
from tiny import make_tiny, tiny_picture, tiny_video

from ep_export.checkpoint import open_checkpoint
from ep_export.choosers import KeptDifference
from ep_export.policy import (
    Budget,
    Cut,
    Keep,
    MaxMin,
    Nothing,
    Random,
    Schedule,
    Scorer,
    Select,
    Source,
    TopK,
)
from ep_export.reference import PruneSpec, load_model, prune
from ep_export.runtime import Session

QUESTION = "which digits are in the picture?"
LAYERS = 6
NORM = TopK(Scorer.NORM, Select.LOWEST)
SCHEDULES = {
    "paper, then released keys": two_cuts(1, 4, TopK(), TopK(Scorer.RELEASED, source=Source.KEY)),
    "hidden states at both": two_cuts(2, 3, *[TopK(Scorer.NORM, source=Source.HIDDEN)] * 2),
    "divprune on embeddings, then values": two_cuts(0, 2, MaxMin(), TopK(Scorer.ORDER2, source=Source.VALUE)),
    "a budget a picture at both": two_cuts(1, 3, *[dataclasses.replace(NORM, budget=Budget.PER_PICTURE)] * 2),
    "random, then nothing": Schedule((Cut(1, Random(5), 0.5), Cut(4, Nothing()))),
    "three": Schedule((Cut(1, NORM, 0.8), Cut(2, MaxMin(), 0.5), Cut(5, Random(), 0.1))),
}
SHOWN = {
    "one": [tiny_picture(300, 90)],
    "two": [tiny_picture(130, 200), tiny_picture(90, 60, seed=1)],
    "a picture and a video": [tiny_picture(90, 60), tiny_video(84, 56, 4)],
}


@pytest.fixture(scope="module")
def deeper(tmp_path_factory):
    """A checkpoint of six layers, its Hugging Face model, and a folder for bundles."""
    root = tmp_path_factory.mktemp("deeper")
    checkpoint = make_tiny(root / "checkpoint", layers=LAYERS, seed=4)
    return checkpoint, load_model(open_checkpoint(str(checkpoint))), root


@pytest.fixture(scope="module", params=SCHEDULES)
def cut_several_times(request, deeper):
    checkpoint, model, root = deeper
    bundle = export_tiny(
        checkpoint, root / request.param.replace(" ", "-"), schedule=SCHEDULES[request.param], keep=0.55
    )
    with Session.open(bundle, threads=1) as session:
        yield session, model, open_checkpoint(str(checkpoint)).family


@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN)
def test_several_cuts_answer_as_the_oracle(cut_several_times, shown):
    """Cuts keep what is exact of what arrives; Hugging Face, made to keep the same, answers the same."""
    session, model, family = cut_several_times
    manifest = session.bundle.manifest
    prompt = session.prompts.build(shown, QUESTION)
    spec, prefill = PruneSpec(manifest.schedule, Keep(ratio=0.55)), session.prefill(prompt)
    answer = session.generate(shown, QUESTION, max_new_tokens=6)
    inputs = family.reference_inputs(prompt, model.config)
    kept = [torch.from_numpy(cut.kept_index) for cut in prefill.cuts]
    arrived = [torch.arange(prompt.input_ids.shape[1]), *kept]

    def same(cut, tokens, _k):
        places = torch.nonzero(torch.isin(arrived[cut], kept[cut])).flatten()
        return places[torch.isin(places, tokens.visual_index)]

    with prune(model, spec, select=same) as trace, torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert ids[0, prompt.input_ids.shape[1] :].tolist() == list(answer.token_ids)
    for ours, theirs, cut in zip(prefill.cuts, trace.cuts, manifest.schedule.cuts, strict=True):
        assert ours.kept_index.tolist() == theirs.kept_index.tolist()
        difference = difference_from_exact(theirs, ours.kept_index, cut.chooser, manifest.degree)
        assert difference is not KeptDifference.DIFFERENT


@pytest.fixture(scope="module")
def dropping(deeper):
    """DivPrune, then everything dropped, with another policy beside."""
    checkpoint, _, root = deeper
    schedule = Schedule((Cut(1, MaxMin(), 0.5), Cut(4, Nothing())))
    return export_tiny(checkpoint, root / "dropping", schedule=schedule, keep=0.4, policies=(NORM,))


def test_a_policy_that_is_named_once_leaves_cuts_that_drop_everything(dropping):
    named = dropping.manifest.scheduled([NORM.name])
    assert [cut.chooser for cut in named.cuts] == [NORM, Nothing()]
    with Session.open(dropping) as session:
        answer = session.generate(SHOWN["one"], QUESTION, max_new_tokens=2, policies=[NORM.name])
    assert answer.policies == (NORM.name, "nothing")
    assert len(answer.kept_index) == answer.prompt_tokens - answer.visual_tokens


def test_a_keep_of_one_is_the_unpruned_model_although_a_cut_drops_everything(dropping):
    with Session.open(dropping) as session:
        ask = (SHOWN["one"], QUESTION)
        everything = session.generate(*ask, max_new_tokens=3, keep=Keep(ratio=1.0))
        unpruned = session.generate(*ask, max_new_tokens=3, prune=False)
    assert everything.token_ids == unpruned.token_ids
    assert len(everything.kept_index) == everything.prompt_tokens
