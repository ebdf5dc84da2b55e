"""The bench verb on a tiny bundle: what it counts is exact, what it times is only there and positive."""

import json
import subprocess
import sys

import numpy as np
import pytest
from bundles import export_tiny, two_cuts
from command_line import ep_export
from tiny import tiny_picture, tiny_video
from tiny_families import TINY_FAMILIES

from ep_export.benchmark import Question, measure_agreement, measure_latency
from ep_export.errors import UsageError
from ep_export.planning import make_plan
from ep_export.policy import Keep, MaxMin, Nothing, Random
from ep_export.runtime import Session, open_picture, open_video

POLICIES = [(), ("divprune",), ("random",), ("divprune", "nothing")]
QUESTIONS = ["What is this", "how many are there"]


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "bundle"
    policies = (MaxMin(), Random(), Nothing())
    return export_tiny(tiny_checkpoint, out, schedule=two_cuts(1, 3), keep=0.6, policies=policies)


@pytest.fixture(scope="module")
def session(bundle):
    with Session.open(bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures and questions about each of them."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(3):
        tiny_picture(112 + 28 * seed, 84, seed).save(folder / f"{seed}.png")
    (folder / "asked.json").write_text(json.dumps({f"{seed}.png": QUESTIONS for seed in range(3)}))
    return folder


def test_all_sides_generate_the_same_number_of_tokens_from_caches_of_their_own_length(session):
    found = measure_latency(
        session, [tiny_picture(112, 84)], "What", keep=None, policies=POLICIES, new_tokens=3, rounds=3
    )
    manifest = session.bundle.manifest
    dims = manifest.dims
    text = found.prompt_tokens - found.visual_tokens
    token_bytes = 2 * dims.kv_heads * dims.head_dim * 4
    assert (found.new_tokens, found.visual_tokens, found.rounds) == (3, 12, 3)
    assert found.full.kv_bytes == dims.layers * found.prompt_tokens * token_bytes
    names = [side.policy for side in found.pruned]
    assert names == ["paper-highest", "divprune", "random", "divprune, nothing"]
    for names, side in zip(POLICIES, found.pruned, strict=True):
        first, second = side.visual_tokens_kept
        plan = make_plan(dims, manifest.scheduled(names), manifest.keep, visual_tokens=12, text_tokens=text)
        assert (first, second) == plan.kept_visual_tokens
        lengths = [found.prompt_tokens, text + first, text + first, text + second]
        assert side.kv_bytes == sum(lengths) * token_bytes
        assert side.predicted_prefill == pytest.approx(plan.prefill_flops.full / plan.prefill_flops.pruned)
        assert 1 < side.predicted_first_token < side.predicted_prefill  # the encoder is not pruned
        assert 0 < side.prune_ms.median < side.latency_ms.prefill.median
    for stages in (found.full.latency_ms, *(side.latency_ms for side in found.pruned)):
        for spread in (stages.vision, stages.prefill, stages.first_token, stages.decode):
            assert 0 < spread.low <= spread.median <= spread.high


def test_a_benchmark_without_pictures_or_rounds_is_refused(session):
    with pytest.raises(UsageError, match="needs a picture"):
        measure_latency(session, [], "What", keep=None, new_tokens=3, rounds=3)
    with pytest.raises(UsageError, match="at least 3 rounds"):
        measure_latency(session, [tiny_picture(56, 56)], "What", keep=None, new_tokens=3, rounds=1)
    with pytest.raises(UsageError, match="nothing is asked"):
        measure_agreement(session, [], keep=None, max_new_tokens=3)


def by_hand(session, picture, question, names, limit):
    """Answers from `generate`, and what the pruned side says after every beginning of the unpruned answer."""
    full = session.generate([picture], question, max_new_tokens=limit, prune=False)
    free = session.generate([picture], question, max_new_tokens=limit, policies=names)
    prompt = session.prompts.build([picture], question)
    same, divergence = [], []
    sides = [session.prefill(prompt, prune=False), session.prefill(prompt, policies=names)]
    states = [session.continuation(prefill) for prefill in sides]
    seen = set(prompt.input_ids[0].tolist())
    penalty = session.prompts.repetition_penalty
    for token in full.token_ids:
        logits = [state.logits.astype(np.float64) for state in states]
        rows = [np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in logits]
        divergence.append(float(np.sum(rows[0] * np.log(rows[0] / rows[1]))))
        known = np.array(sorted(seen))
        chosen = logits[1].copy()
        chosen[known] = np.where(chosen[known] < 0, chosen[known] * penalty, chosen[known] / penalty)
        same.append(int(chosen.argmax()) == token)
        seen.add(token)
        for state in states:
            state.feed(token)
    return free.token_ids == full.token_ids, same, divergence


def test_agreement_is_what_generate_and_teacher_forcing_by_hand_say(session, pictures):
    asked = [Question(pictures / f"{i}.png", QUESTIONS[i % 2]) for i in range(3)]
    found = measure_agreement(session, asked, keep=None, policies=POLICIES, max_new_tokens=8)
    for names, agreement in zip(POLICIES, found, strict=True):
        rows = [by_hand(session, open_picture(one.picture), one.text, names, 8) for one in asked]
        same = [value for _, tokens, _ in rows for value in tokens]
        divergence = [value for *_, values in rows for value in values]
        assert (agreement.questions, agreement.tokens) == (3, len(same))
        assert agreement.exact == pytest.approx(np.mean([exact for exact, *_ in rows]))
        assert agreement.top1 == pytest.approx(np.mean(same))
        assert agreement.kl == pytest.approx(np.mean(divergence), abs=1e-9)
    assert len({agreement.kl for agreement in found}) == len(POLICIES)


def test_keeping_everything_agrees_with_the_unpruned_bundle(session, pictures):
    """Near, not equal: rows are gathered and summed in another order."""
    asked = [Question(pictures / f"{i}.png", QUESTIONS[0]) for i in range(3)]
    (found,) = measure_agreement(session, asked, keep=Keep(ratio=1.0), max_new_tokens=4)
    assert (found.exact, found.top1) == (1.0, 1.0)
    assert found.kl == pytest.approx(0, abs=1e-6)


def test_the_verb_prints_a_table_and_json(bundle):
    ask = ("bench", str(bundle.path), "--rounds", "3", "--max-new-tokens", "2", "--prompt", "What")
    table = ep_export(*ask)
    assert table.code == 0, table.err
    assert "first token, ms" in table.out
    said = json.loads(ep_export(*ask, "--keep", "0.5", "--json").out)
    (pruned,) = said["pruned"]
    assert pruned["keep"]["ratio"] == 0.5
    assert said["full"]["kv_bytes"] > pruned["kv_bytes"]
    assert pruned["agreement"] is None


@pytest.mark.parametrize("family", ["qwen2_vl", "video_llava"])
def test_the_verb_measures_videos_with_a_provider(family, tmp_path):
    """In one tower with pictures, and in a tower of their own."""
    video = tmp_path / "frames"
    video.mkdir()
    for number, frame in enumerate(tiny_video(84, 56, 6).frames):
        frame.save(video / f"{number}.png")
    tiny_picture(84, 56).save(tmp_path / "picture.png")
    opened = export_tiny(TINY_FAMILIES[family](tmp_path / "model"), tmp_path / "bundle")
    ask = ["bench", str(opened.path), "--video", str(video), "--frames", "4", "--rounds", "3"]
    ask += ["--max-new-tokens", "2", "--provider", "cpu", "--json"]
    alone, both = (ep_export(*ask, *more) for more in ((), ("--image", str(tmp_path / "picture.png"))))
    assert (alone.code, both.code) == (0, 0), alone.err + both.err
    shown = [json.loads(result.out)["visual_tokens"] for result in (alone, both)]
    with Session.open(opened) as session:
        visuals = [open_video(video, frames=4), tiny_picture(84, 56)]
        prompts = [session.prompts.build(visuals[:count], "What") for count in (1, 2)]
    assert shown == [len(prompt.visual_index) for prompt in prompts]


def test_the_verb_compares_policies_on_pictures_in_one_run(bundle, pictures):
    ask = ["bench", str(bundle.path), "--images", str(pictures), "--prompts", str(pictures / "asked.json")]
    ask += ["--rounds", "3", "--max-new-tokens", "3", "--policy", "divprune", "--policy", "random"]
    said = json.loads(ep_export(*ask, "--json").out)
    assert [side["policy"] for side in said["pruned"]] == ["divprune", "random"]
    assert [side["agreement"]["questions"] for side in said["pruned"]] == [6, 6]
    table = ep_export(*ask)
    assert "against the bundle's own unpruned answers" in table.out
    assert "6 questions" in table.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompts", "asked.json"), "--prompts asks about the pictures of --images"),
        (("--images", ".", "--image", "a.png"), "--image or --video and --images exclude each other"),
        (("--images", ".", "--video", "a.mp4"), "--image or --video and --images exclude each other"),
        (("--fps", "2"), "--frames and --fps are about videos"),
        (("--runtime", "tensorrt"), "has no engines\nhint: compile some: ep-export compile"),
        (("--provider", "rocm"), "ONNX Runtime here has no"),
        (("--images", ".", "--prompt", "a", "--prompts", "b"), "--prompt and --prompts exclude each other"),
        (("--policy", "norm-lowest"), "no policy 'norm-lowest'"),
        (("--policy", "random", "--policy", "nothing"), "no visual token left to choose from"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_measured(bundle, options, said):
    result = ep_export("bench", str(bundle.path), *options)
    assert result.code in {1, 2}
    assert said in result.err
    assert "measuring" not in result.err


def test_bench_answers_where_torch_is_not_installed(bundle, pictures):
    """Policies are compared on the device, which has no torch."""
    code = (
        "import sys; sys.modules['torch'] = None; from ep_export.cli.main import main; "
        f"sys.argv[1:] = ['bench', {str(bundle.path)!r}, '--images', {str(pictures)!r}, '--rounds', '3', "
        "'--max-new-tokens', '2', '--json']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pruned"][0]["agreement"]["questions"] == 3
