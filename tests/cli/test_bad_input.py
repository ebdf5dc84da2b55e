"""A user's mistake gets one line, a hint and exit 1 or 2, and leaves nothing half-written."""

import functools
import json
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest
from command_line import ep_export
from safetensors.numpy import load_file, save_file
from tiny import make_tiny, tiny_picture


@pytest.fixture(scope="module")
def tiny_source(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def tiny(tiny_source, tmp_path):
    """A checkpoint a test may break."""
    return shutil.copytree(tiny_source, tmp_path / "tiny")


@pytest.fixture
def refused(tmp_path):
    """Run a verb that must fail with one line and a hint, and leave no file behind."""

    def run(*arguments, code=1):
        before = sorted(tmp_path.rglob("*"))
        result = ep_export(*arguments)
        assert result.code == code, result.err
        lines = [line for line in result.err.splitlines() if line.startswith(("error:", "hint:"))]
        assert [line.split(":")[0] for line in lines] == ["error", "hint"], result.err
        assert "Traceback" not in result.err
        assert result.out == ""
        assert sorted(tmp_path.rglob("*")) == before
        return "\n".join(lines)

    return run


def build(model, tmp_path, *more):
    return (
        "build",
        "--model",
        str(model),
        "--keep",
        "0.5",
        "--layer",
        "1",
        "--out",
        str(tmp_path / "out"),
        *more,
    )


def rewrite(model, change):
    """Change the tensors of a single-file checkpoint."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_missing_model_directory(refused, tmp_path):
    assert "no-such-model" in refused(*build(tmp_path / "no-such-model", tmp_path))


def test_empty_model_directory(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is empty" in refused(*build(tmp_path / "empty", tmp_path))


def test_unsupported_family_names_the_supported(refused, tiny, tmp_path):
    (tiny / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    said = refused(*build(tiny, tmp_path))
    assert "llama" in said
    assert "qwen2_5_vl" in said


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_config_that_is_not_json(refused, tiny, tmp_path, text):
    (tiny / "config.json").write_text(text)
    assert "config.json" in refused(*build(tiny, tmp_path))


def test_truncated_safetensors(refused, tiny, tmp_path):
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors" in refused(*build(tiny, tmp_path))


def test_corrupt_safetensors_header(refused, tiny, tmp_path):
    file = tiny / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[:8] = struct.pack("<Q", 1 << 60)
    file.write_bytes(raw)
    assert "model.safetensors" in refused(*build(tiny, tmp_path))


def test_missing_shard(refused, tmp_path):
    model = make_tiny(tmp_path / "sharded", max_shard_size=100_000)
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(*build(model, tmp_path))


def test_missing_decoder_tensor(refused, tiny, tmp_path):
    name = next(n for n in load_file(tiny / "model.safetensors") if n.endswith("layers.0.mlp.up_proj.weight"))
    rewrite(tiny, lambda tensors: tensors.pop(name))
    assert "layers.0.mlp.up_proj.weight" in refused(*build(tiny, tmp_path))


def test_extra_decoder_tensor(refused, tiny, tmp_path):
    def add(tensors):
        name = next(n for n in tensors if n.endswith("layers.0.mlp.up_proj.weight"))
        tensors[name.replace("layers.0.", "layers.77.")] = tensors[name].copy()

    rewrite(tiny, add)
    assert "layers.77.mlp.up_proj.weight" in refused(*build(tiny, tmp_path))


def test_decoder_tensor_of_the_wrong_shape(refused, tiny, tmp_path):
    def cut(tensors):
        name = next(n for n in tensors if n.endswith("layers.0.mlp.up_proj.weight"))
        tensors[name] = tensors[name][:-1].copy()

    rewrite(tiny, cut)
    assert "layers.0.mlp.up_proj.weight" in refused(*build(tiny, tmp_path))


@pytest.mark.parametrize("keep", ["0", "-0.1", "1.5", "nan", "inf"])
@pytest.mark.parametrize("verb", ["plan", "build"])
def test_keep_outside_its_range(refused, tiny, verb, keep):
    assert "keep" in refused(verb, "--model", str(tiny), "--keep", keep, "--layer", "1", code=2)


def test_keep_below_what_the_layer_allows_says_the_smallest(refused, tiny):
    said = refused(
        "plan", "--model", str(tiny), "--keep", "0.2", "--layer", "2", "--visual-tokens", "100", code=2
    )
    assert "0.5" in said  # K/L = 2/4


def test_keep_and_keep_tokens_exclude_each_other(refused, tiny):
    assert "--keep-tokens" in refused(
        "plan", "--model", str(tiny), "--keep", "0.5", "--keep-tokens", "9", code=2
    )


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (["2"], "is not LAYER:SHARE"),
        (["2:half"], "is not LAYER:SHARE"),
        (["2:0.5:loudest"], "policy 'loudest' is unknown"),
        (["2:0"], "expected 0 < share <= 1"),
        (["2:1.5"], "expected 0 < share <= 1"),
        (["2:nan"], "expected 0 < share <= 1"),
        (["2:0.5", "2:0.2"], "expected a later layer"),
        (["2:0.5", "1:0.2"], "expected a later layer"),
        (["1:0.2", "2:0.5"], "is more than the 0.2"),
        (["0:0.5"], "expected 1 to 3"),
        (["4:0.5:divprune"], "expected 0 to 3"),
        (["1:0:nothing", "2:0:nothing"], "no visual token left"),
    ],
)
def test_cuts_that_cannot_be(refused, tiny, tmp_path, cuts, message):
    given = [word for cut in cuts for word in ("--cut", cut)]
    assert message in refused("plan", "--model", str(tiny), *given, code=2)
    assert message in refused("build", "--model", str(tiny), *given, "--out", str(tmp_path / "out"), code=2)
    assert not (tmp_path / "out").exists()


def test_a_keep_that_the_cuts_cannot_meet_names_the_smallest(refused, tiny):
    cuts = ("--cut", "2:0.5:divprune", "--cut", "3:0.1:random")
    said = refused("plan", "--model", str(tiny), *cuts, "--keep", "0.3", code=2)
    assert "below the smallest possible, 0.5" in said


def test_cuts_and_the_short_form_exclude_each_other(refused, tiny):
    said = refused("plan", "--model", str(tiny), "--cut", "1:0.5", "--layer", "2", code=2)
    assert "--cut and --layer exclude each other" in said


def test_a_keep_that_nothing_says(refused, tiny):
    assert "--keep 0.25" in refused("plan", "--model", str(tiny), "--layer", "2", code=2)


@pytest.mark.parametrize("layer", ["0", "4", "-1", "99"])
def test_layer_out_of_range(refused, tiny, layer):
    assert "layer" in refused("plan", "--model", str(tiny), "--keep", "0.5", "--layer", layer, code=2)


def test_nothing_says_where_to_prune(refused, tiny, tmp_path):
    said = refused("build", "--model", str(tiny), "--keep", "0.5", "--out", str(tmp_path / "out"))
    assert "--layer" in said
    assert "--images" in said


@pytest.mark.parametrize("verb", ["build", "calibrate"])
def test_empty_image_folder(refused, tiny, tmp_path, verb):
    (tmp_path / "pictures").mkdir()
    out = ("--out", str(tmp_path / "out"))
    said = refused(verb, "--model", str(tiny), "--keep", "0.5", "--images", str(tmp_path / "pictures"), *out)
    assert "pictures" in said


@pytest.mark.parametrize("verb", ["build", "calibrate"])
def test_image_folder_without_a_readable_picture(refused, tiny, tmp_path, verb):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "broken.png").write_bytes(b"not a picture")
    out = ("--out", str(tmp_path / "out"))
    said = refused(verb, "--model", str(tiny), "--keep", "0.5", "--images", str(tmp_path / "pictures"), *out)
    assert "broken.png" in said


def test_missing_image_folder(refused, tiny, tmp_path):
    out = ("--out", str(tmp_path / "out"))
    assert "nowhere" in refused(
        "calibrate", "--model", str(tiny), "--keep", "0.5", "--images", str(tmp_path / "nowhere"), *out
    )


def test_image_folder_that_is_a_file(refused, tiny, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"")
    said = refused(
        "calibrate", "--model", str(tiny), "--keep", "0.5", "--images", str(tmp_path / "photo.png")
    )
    assert "is a file" in said


def test_a_policy_that_no_calibration_can_race(refused, tiny, tmp_path):
    asked = ("calibrate", "--model", str(tiny), "--keep", "0.5", "--images", str(tmp_path), "--also")
    assert "--also nothing keeps no token" in refused(*asked, "nothing", code=2)
    assert "attention is one number a token" in refused(*asked, "paper-highest-attention", code=2)


def test_missing_prompts_file(refused, tiny, tmp_path):
    here = ("--model", str(tiny), "--keep", "0.5", "--images", str(tmp_path))
    for verb in ("calibrate", "sweep"):
        assert "gone.json does not exist" in refused(verb, *here, "--prompts", str(tmp_path / "gone.json"))


@pytest.mark.parametrize("out", ["file/out", "x" * 300])
def test_output_that_cannot_be_made(refused, tiny, tmp_path, out):
    (tmp_path / "file").write_text("in the way")
    refused("export", "--model", str(tiny), "--keep", "0.5", "--layer", "1", "--out", str(tmp_path / out))


def test_beginning_of_a_target_suggests_all_that_begin_so(refused, tiny):
    said = refused(
        "plan", "--model", str(tiny), "--keep", "0.5", "--layer", "1", "--target", "jetson", code=2
    )
    assert "jetson-orin-agx-64gb, " in said
    assert "jetson-thor, " in said


def test_output_that_exists_is_refused_before_any_work(refused, tiny, tmp_path):
    (tmp_path / "out").mkdir()
    assert "--overwrite" in refused(*build(tiny, tmp_path))


def test_hub_id_that_is_not_cached_says_how_to_fetch_it(refused, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = refused("build", "--model", "Qwen/Qwen2.5-VL-999B-Instruct", "--keep", "0.5", "--layer", "1")
    assert "hf download Qwen/Qwen2.5-VL-999B-Instruct" in said


def test_unknown_short_name_suggests_the_nearest(refused):
    assert "qwen2.5-vl-7b" in refused("plan", "--model", "qwen2.5-vl-7bb", "--keep", "0.5")


class TestBundle:
    """What `run` and `inspect` say about a bundle that is not as it was made."""

    @pytest.fixture
    def bundle(self, tiny_bundle, tmp_path):
        return shutil.copytree(tiny_bundle.path, tmp_path / "bundle")

    @pytest.fixture
    def picture(self, tmp_path):
        tiny_picture(56, 56, seed=1).save(tmp_path / "picture.png")
        return tmp_path / "picture.png"

    def test_not_a_bundle(self, refused, tmp_path):
        assert "manifest.json" in refused("inspect", str(tmp_path))

    def test_changed_file(self, refused, bundle):
        file = bundle / "decoder_0.onnx"
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
        assert "decoder_0.onnx" in refused("run", str(bundle), "--prompt", "hello")

    def test_missing_file(self, refused, bundle):
        (bundle / "decoder_1.onnx").unlink()
        assert "decoder_1.onnx" in refused("run", str(bundle), "--prompt", "hello")

    def test_a_bundle_of_an_older_format_says_how_to_build_again(self, refused, bundle):
        raw = json.loads((bundle / "manifest.json").read_text())
        (bundle / "manifest.json").write_text(json.dumps({**raw, "format": 1}))
        assert "ep-export build" in refused("run", str(bundle), "--prompt", "hello")

    def test_a_policy_that_is_not_there_lists_those_that_are(self, refused, bundle, tmp_path):
        picture = tmp_path / "picture.png"
        tiny_picture(112, 84).save(picture)
        asked = ("--image", str(picture), "--prompt", "hello", "--policy", "divprune")
        said = refused("run", str(bundle), *asked)
        assert "it has paper-highest" in said
        assert "policy add" in said

    def test_two_policies_of_one_name(self, refused, bundle):
        before = (bundle / "manifest.json").read_bytes()
        assert "paper-highest" in refused("policy", "add", str(bundle), "--policy", "paper")
        twice = ("--policy", "divprune", "--policy", "divprune")
        assert "two policies" in refused("policy", "add", str(bundle), *twice, code=2)
        assert (bundle / "manifest.json").read_bytes() == before
        assert not list(bundle.glob("prune_0.divprune*"))

    def test_a_policy_that_does_not_exist(self, refused, bundle):
        assert "is unknown" in refused("policy", "add", str(bundle), "--policy", "loudest", code=2)

    def test_newer_format(self, refused, bundle):
        raw = json.loads((bundle / "manifest.json").read_text())
        (bundle / "manifest.json").write_text(json.dumps({**raw, "format": 999}))
        assert "upgrade" in refused("inspect", str(bundle))

    def test_picture_that_is_no_picture(self, refused, bundle, tmp_path):
        (tmp_path / "text.png").write_text("no picture")
        assert "text.png" in refused(
            "run", str(bundle), "--prompt", "hello", "--image", str(tmp_path / "text.png")
        )

    def test_missing_picture(self, refused, bundle, tmp_path):
        assert "gone.png" in refused(
            "run", str(bundle), "--prompt", "hello", "--image", str(tmp_path / "gone.png")
        )

    def test_prompt_longer_than_the_context(self, refused, bundle, picture):
        said = refused("run", str(bundle), "--prompt", "word " * 100_000, "--image", str(picture))
        assert "tokens" in said

    def test_keep_below_what_the_layer_allows(self, refused, bundle, picture):
        refused("run", str(bundle), "--prompt", "hello", "--image", str(picture), "--keep", "0.01", code=2)


def test_ctrl_c_leaves_nothing_behind(tiny, tmp_path):
    command = [sys.executable, "-m", "ep_export", *build(tiny, tmp_path)]
    # A test run started in the background ignores Ctrl-C, and so would its children.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen)  # noqa: PLW1509 - no threads here
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*.part")):  # the staging directory: the export has begun
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_more_tokens_than_a_picture_has_keeps_all(tiny_bundle, tmp_path):
    picture = tmp_path / "picture.png"
    tiny_picture(84, 84).save(picture)
    ask = ("run", str(tiny_bundle.path), "--image", str(picture), "--prompt", "What", "--max-new-tokens", "1")
    result = ep_export(*ask, "--keep-tokens", "99999")
    assert (result.code, "kept 9 of 9 visual tokens" in result.err) == (0, True), result.err
    assert "1 token in" in result.err


@pytest.mark.parametrize(
    ("show", "said"), [("kept.txt", "no ending of a picture"), ("/proc/x/kept.png", "cannot be made")]
)
def test_a_drawing_that_cannot_be_written_is_refused_before_the_answer(tiny_bundle, tmp_path, show, said):
    picture = tmp_path / "picture.png"
    tiny_picture(84, 84).save(picture)
    ask = ("run", str(tiny_bundle.path), "--image", str(picture), "--prompt", "What", "--show", show)
    result = ep_export(*ask)
    assert result.code != 0
    assert result.out == ""
    assert said in result.err
    assert "Traceback" not in result.err


def test_questions_with_answers_serve_a_calibration_too(tmp_path):
    from ep_export.measure.prompts import read_questions

    file = tmp_path / "prompts.json"
    file.write_text('{"a.png": {"question": "What?", "answer": "a cat"}, "b.png": ["Where?", "Who?"]}')
    assert read_questions(file) == {"a.png": ["What?"], "b.png": ["Where?", "Who?"]}


class TestOverwrite:
    """`--overwrite` deletes what a run of ours wrote and nothing else."""

    def test_a_web_app_with_a_manifest_stays(self, refused, tiny, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "manifest.json").write_text('{"name": "app", "icons": [], "start_url": "/"}')
        (tmp_path / "out" / "index.html").write_text("mine")
        assert "was not made by ep-export" in refused(*build(tiny, tmp_path, "--overwrite"))

    def test_the_checkpoint_itself_stays(self, refused, tiny):
        (tiny / "manifest.json").write_text('{"format": 1}')
        arguments = ("--model", str(tiny), "--keep", "0.5", "--layer", "1", "--out", str(tiny), "--overwrite")
        assert "was not made by ep-export" in refused("export", *arguments)

    def test_pictures_in_an_old_bundle_stay(self, refused, tiny_bundle, tiny, tmp_path):
        shutil.copytree(tiny_bundle.path, tmp_path / "out")
        (tmp_path / "out" / "holiday.jpg").write_bytes(b"mine")
        assert "holds holiday.jpg" in refused(*build(tiny, tmp_path, "--overwrite"))

    def test_an_old_bundle_is_replaced(self, tiny_bundle, tiny, tmp_path):
        out = shutil.copytree(tiny_bundle.path, tmp_path / "out")
        before = (out / "manifest.json").read_text()
        result = ep_export(
            "export", "--model", str(tiny), "--keep", "0.5", "--layer", "1", "--out", str(out), "--overwrite"
        )
        assert result.code == 0, result.err
        assert (out / "manifest.json").read_text() != before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]


def test_a_picture_s_name_forges_no_line_of_ours(tiny_bundle, tmp_path):
    name = "a\nerror: faked.png\x1b[31m\x07"
    (tmp_path / name).write_text("no picture")
    result = ep_export("run", str(tiny_bundle.path), "--prompt", "hello", "--image", str(tmp_path / name))
    assert result.code == 1
    lines = result.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], result.err
    assert all(line.isprintable() for line in lines)


def test_postscript_called_a_photo_is_no_picture(refused, tiny_bundle, tmp_path):
    (tmp_path / "photo.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    said = refused("run", str(tiny_bundle.path), "--prompt", "hi", "--image", str(tmp_path / "photo.png"))
    assert "not a picture" in said
