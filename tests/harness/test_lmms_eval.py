"""lmms-eval's own command line runs the shipped model pruned and scores what our runtime answers.

lmms-eval is no dependency: `make test-bridges` installs it aside and sets its path.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from digit_scenes import held_out

from ep_export.checkpoint import open_checkpoint
from ep_export.policy import Cut, Keep, Schedule, Scorer, Select, TopK
from ep_export.reference import PruneSpec, load_model, prune

MODEL = Path(__file__).parents[1] / "fixtures" / "digit-reader"
QUESTIONS = 24
PRECISION = "dtype=float32,device=cpu"
LOWEST = TopK(Scorer.NORM, Select.LOWEST)
SCHEDULES = {
    "one cut": ("keep=0.25,policy=norm-lowest,layer=2", Schedule((Cut(2, LOWEST),)), 0.25),
    "two cuts": (
        "cuts=2:0.4:norm-lowest+6:0.1:norm-lowest",
        Schedule((Cut(2, LOWEST, 0.4), Cut(6, LOWEST, 0.1))),
        (2 + 4 * 0.4 + 6 * 0.1) / 12,
    ),
}

TASK = """
task: digits
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.picture
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 12
  temperature: 0
  do_sample: false
process_results: !function utils.right
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
from PIL import Image

def picture(doc):
    return [Image.open(doc["picture"]).convert("RGB")]

def right(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
"""

installed = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed: make test-bridges"
)


@pytest.fixture(scope="module")
def asked():
    return [(scene.picture, question) for scene, question in held_out(QUESTIONS)]


@pytest.fixture(scope="module")
def task(asked, tmp_path_factory):
    """A folder that lmms-eval finds the task in."""
    folder = tmp_path_factory.mktemp("task")
    with (folder / "data.jsonl").open("w", encoding="utf-8") as lines:
        for number, (picture, question) in enumerate(asked):
            file = folder / f"{number}.png"
            picture.save(file)
            row = {"picture": str(file), "question": question.text, "answer": question.answer}
            lines.write(json.dumps(row) + "\n")
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    (folder / "digits.yaml").write_text(TASK.format(data=folder / "data.jsonl"), encoding="utf-8")
    return folder


def evaluate(task: Path, out: Path, arguments: str, *, batch: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmms_eval", "--model", "ep_export_pruned"]
    command += [
        "--model_args",
        f"pretrained={MODEL},{arguments}",
        "--tasks",
        "digits",
        "--batch_size",
        str(batch),
    ]
    command += ["--include_path", str(task), "--output_path", str(out), "--log_samples"]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "cache")}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **offline}, timeout=600
    )


def answers_of(out: Path) -> list[str]:
    (file,) = out.rglob("*samples_digits.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]


def expected(asked, schedule: Schedule, keep: Keep) -> list[str]:
    """The oracle's answers, asked directly."""
    checkpoint = open_checkpoint(str(MODEL))
    model, family = load_model(checkpoint), checkpoint.family
    prompts = family.prompt_builder(checkpoint.path, checkpoint.config)
    spec = PruneSpec(schedule, keep)
    answers = []
    for picture, question in asked:
        prompt = prompts.build([picture], question.text)
        with prune(model, spec), torch.inference_mode():
            inputs = family.reference_inputs(prompt, model.config)
            ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answers.append(prompts.decode(ids[0, prompt.input_ids.shape[1] :].tolist()))
    return answers


@installed
@pytest.mark.parametrize("name", SCHEDULES)
def test_lmms_eval_gets_the_oracles_answers_and_scores_them(asked, task, tmp_path, name):
    arguments, schedule, keep = SCHEDULES[name]
    done = evaluate(task, tmp_path, f"{arguments},{PRECISION}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"ep_export_pruned: keep {keep:g}, layer 2" in done.stdout
    answers = answers_of(tmp_path)
    assert answers == expected(asked, schedule, Keep(ratio=keep))
    (file,) = tmp_path.rglob("*results.json")
    score = json.loads(file.read_text(encoding="utf-8"))["results"]["digits"]["exact,none"]
    right = sum(
        answer.strip() == question.answer for answer, (_, question) in zip(answers, asked, strict=True)
    )
    assert score == pytest.approx(right / QUESTIONS)
    assert right > QUESTIONS / 2  # it reads: the figure means something


@installed
def test_a_batch_is_refused_in_words(task, tmp_path):
    done = evaluate(task, tmp_path, f"keep=0.25,policy=norm-lowest,layer=2,{PRECISION}", batch=4)
    assert "pruning runs one prompt at a time" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*results.json"))
