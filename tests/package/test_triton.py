"""A Triton model repository: its files, and the answers of its models on a stand-in for the server.

Not run: no Triton server here. See triton_standin.py for what the stand-in shows and what not.
"""

import base64
import importlib.util
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import export_tiny, two_cuts
from command_line import ep_export
from digit_scenes import held_out
from tiny import tiny_picture
from triton_schema import MESSAGES, parse_config, schema
from triton_standin import StandIn

from ep_export.bundle import Bundle, Dialect
from ep_export.engine_record import (
    ENGINES,
    EngineFile,
    EngineRecord,
    PluginFile,
    read_record,
    source_sha256,
    write_record,
)
from ep_export.engine_record import Limits as EngineLimits
from ep_export.errors import UsageError, UserError
from ep_export.families.base import Video
from ep_export.package import write_repository
from ep_export.policy import Keep, MaxMin, Nothing, Scorer, Select, TopK
from ep_export.runtime import Sampling, Session
from ep_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ep_export.targets import find_target

READER = Path(__file__).parents[1] / "fixtures" / "digit-reader"
COMPONENTS = (
    "vision_encoder",
    "decoder_0",
    "decoder_1",
    "decoder_2",
    "prune_0.paper-highest",
    "prune_0.nothing",
    "prune_0.divprune",
    "prune_1.nothing",
    "prune_1.paper-highest",
    "prune_1.divprune",
)


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, tmp_path_factory):
    """Cuts before layers 1 and 3 of 4, and three policies at each."""
    return export_tiny(
        tiny_checkpoint,
        tmp_path_factory.mktemp("twice") / "bundle",
        schedule=two_cuts(1, 3),
        keep=0.6,
        policies=(Nothing(), MaxMin()),
    )


@pytest.fixture(scope="module")
def repository(bundle, tmp_path_factory):
    return write_repository(bundle, tmp_path_factory.mktemp("triton") / "repository")


@pytest.fixture(scope="module")
def server(repository):
    with StandIn(repository.path / "models").running() as running:
        yield running


@pytest.fixture(scope="module")
def session(bundle):
    with Session.open(bundle) as opened:
        yield opened


def png(picture) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def text(value: str | bytes) -> np.ndarray:
    return np.array([value.encode() if isinstance(value, str) else value], dtype=np.object_)


def question(prompt: str, *pictures, **numbers) -> dict[str, np.ndarray]:
    kinds = {"max_new_tokens": np.int32, "top_k": np.int32, "seed": np.int64, "stream": np.bool_}
    asked = {"prompt": text(prompt)}
    if pictures:
        asked["image"] = np.array([png(picture) for picture in pictures], dtype=np.object_)
    asked |= {name: np.array([value], dtype=kinds.get(name, np.float32)) for name, value in numbers.items()}
    return asked


FRAMES = {"frames": np.array([png(tiny_picture(84, 84, seed=i)) for i in range(2)], dtype=np.object_)}


def test_the_front_model_streams_and_pictures_are_optional(repository):
    config = parse_config((repository.path / "models" / "ep_export" / "config.pbtxt").read_text())
    assert config.backend == "python"
    assert config.model_transaction_policy.decoupled
    assert [port.name for port in config.input if not port.optional] == ["prompt"]


def test_more_slots_than_engines_were_compiled_for_are_refused_when_the_model_loads(
    tiny_checkpoint, tmp_path, monkeypatch
):
    """Of a server and of the command line, in one sentence; with nothing said there are as many as fit."""
    bundle = export_tiny(tiny_checkpoint, tmp_path / "bundle", layer=2, dialect=Dialect.ONNXRUNTIME)
    models = write_repository(bundle, tmp_path / "repository").path / "models"
    monkeypatch.setattr(OnnxRuntimeRunner, "max_batch", 2)
    with StandIn(models).running() as server:
        assert server._model._engine.slots == 2
    sentence = "3 slots are more than the 2 that the engines were compiled for"
    with pytest.raises(UserError, match=sentence), StandIn(models, slots="3").running():
        pass
    result = ep_export("serve", str(bundle.path), "--port", "0", "--slots", "3")
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines() == [
        f"error: {sentence}",
        "hint: give --slots 2 or fewer, or compile with --max-batch 3",
    ]


def test_the_bundle_lies_beside_the_model_as_links(repository, bundle):
    assert repository.linked
    served = repository.path / "models" / "ep_export" / "1" / "bundle"
    files = {str(path.relative_to(served)): path for path in served.rglob("*") if path.is_file()}
    assert set(files) == {"manifest.json", *(entry.path for entry in bundle.manifest.files)}
    assert all(path.samefile(bundle.path / name) for name, path in files.items())


def test_a_gpu_is_asked_for_only_where_it_is_told(repository, tiny_bundle, tmp_path):
    made = write_repository(tiny_bundle, tmp_path / "gpu", gpu=True)
    for path, kind, providers in ((repository.path, 2, "cpu"), (made.path, 1, "cuda,cpu")):
        config = parse_config((path / "models" / "ep_export" / "config.pbtxt").read_text())
        assert config.instance_group[0].kind == kind
        assert config.parameters["providers"].string_value == providers
    assert "--gpus all" in (made.path / "README.md").read_text()
    assert "ep-export[gpu]" in (made.path / "Dockerfile").read_text()


def test_many_requests_at_once_are_answered_each_as_alone(server, session):
    asked, wanted = [], []
    for number in range(12):
        pictures = [tiny_picture(84 + 28 * (number % 3), 84, seed=number)] if number % 4 else []
        options = {"max_new_tokens": 3 + number, "stream": number % 2 == 1}
        asked.append(question("What is this?", *pictures, **options, **({"keep": 0.6} if pictures else {})))
        wanted.append(
            session.generate(pictures, "What is this?", max_new_tokens=3 + number, keep=Keep(ratio=0.6))
        )
    for answer, alone in zip(server.ask_all(asked), wanted, strict=True):
        assert tuple(answer.outputs()["token_ids"]) == alone.token_ids
        assert tuple(answer.outputs()["kept_index"]) == alone.kept_index
        assert "".join(answer.pieces) == alone.answer


def test_requests_that_wait_are_answered_and_one_too_many_is_told_so(repository):
    with StandIn(repository.path / "models", slots="1", waiting="2", capacity="400").running() as server:
        answers = server.ask_all([question("Say hello.", max_new_tokens=300) for _ in range(8)])
        refused = [answer.responses[-1].failed for answer in answers if answer.error]
        assert len(refused) < 8
        assert {failed.code for failed in refused} == {server.codes.UNAVAILABLE}
        assert server.ask(question("Say hello.", max_new_tokens=2)).error == ""


def test_a_repository_can_be_moved(repository, tmp_path, session):
    moved = shutil.copytree(repository.path, tmp_path / "elsewhere")
    picture = tiny_picture(112, 84, seed=3)
    with StandIn(moved / "models").running() as server:
        answer = server.ask(question("What is this?", picture, max_new_tokens=3))
    wanted = session.generate([picture], "What is this?", max_new_tokens=3)
    assert tuple(answer.outputs()["token_ids"]) == wanted.token_ids


@pytest.mark.parametrize(
    "pictures",
    [(), (tiny_picture(112, 84, seed=1),), (tiny_picture(84, 140, seed=2), tiny_picture(112, 112, seed=3))],
    ids=["none", "one", "two"],
)
def test_answers_are_those_of_ep_export_run(server, session, pictures):
    answer = server.ask(question("Which digits are there?", *pictures, max_new_tokens=12)).outputs()
    wanted = session.generate(list(pictures), "Which digits are there?", max_new_tokens=12)
    assert answer["text"][0].decode() == wanted.answer
    assert tuple(answer["token_ids"]) == wanted.token_ids
    assert tuple(answer["kept_index"]) == wanted.kept_index
    assert answer["finish_reason"][0].decode() == wanted.finish.value


def test_keep_and_sampling_are_those_of_ep_export_run(server, session):
    picture = tiny_picture(112, 112, seed=5)
    answer = server.ask(
        question(
            "Name the colour.",
            picture,
            max_new_tokens=8,
            keep=0.6,
            temperature=0.5,
            top_k=5,
            top_p=0.5,
            seed=7,
        )
    ).outputs()
    wanted = session.generate(
        [picture],
        "Name the colour.",
        max_new_tokens=8,
        keep=Keep(ratio=0.6),
        sampling=Sampling(temperature=0.5, top_p=0.5, top_k=5, seed=7),
    )
    assert tuple(answer["token_ids"]) == wanted.token_ids
    assert tuple(answer["kept_index"]) == wanted.kept_index


def test_streamed_pieces_are_the_answer(server, session):
    picture = tiny_picture(112, 84, seed=1)
    answer = server.ask(question("Say hello.", picture, max_new_tokens=10, stream=True))
    wanted = session.generate([picture], "Say hello.", max_new_tokens=10)
    assert len(answer.pieces) > 3
    assert "".join(answer.pieces) == wanted.answer
    assert tuple(answer.outputs()["token_ids"]) == wanted.token_ids
    assert answer.outputs(0)["token_ids"].size == 0


@pytest.mark.parametrize("policies", [("divprune",), ("divprune", "nothing")], ids=["for all", "one a cut"])
def test_policies_are_those_of_ep_export_run(server, session, policies):
    picture = tiny_picture(112, 112, seed=5)
    request = question("Name the colour.", picture, max_new_tokens=6)
    request["policy"] = np.array([name.encode() for name in policies], dtype=np.object_)
    answer = server.ask(request).outputs()
    wanted = session.generate([picture], "Name the colour.", max_new_tokens=6, policies=policies)
    assert tuple(answer["token_ids"]) == wanted.token_ids
    assert tuple(answer["kept_index"]) == wanted.kept_index


def test_frames_are_shown_as_one_video(server, session):
    frames = tuple(tiny_picture(112, 84, seed=seed) for seed in range(4))
    asked = question("What happens?", tiny_picture(84, 84, seed=9), max_new_tokens=5, fps=2.0)
    asked["frames"] = np.array([png(frame) for frame in frames], dtype=np.object_)
    answer = server.ask(asked)
    wanted = session.generate(
        [tiny_picture(84, 84, seed=9), Video(frames, fps=2.0)], "What happens?", max_new_tokens=5
    )
    assert answer.error == ""
    assert tuple(answer.outputs()["token_ids"]) == wanted.token_ids
    assert tuple(answer.outputs()["kept_index"]) == wanted.kept_index


def test_a_picture_may_come_in_base64(server):
    picture = tiny_picture(112, 84, seed=1)
    plain = server.ask(question("What is this?", picture, max_new_tokens=3)).outputs()
    for prefix in (b"", b"data:image/png;base64,"):
        asked = question("What is this?", max_new_tokens=3)
        asked["image"] = text(prefix + base64.b64encode(png(picture)))
        coded = server.ask(asked).outputs()
        assert coded["token_ids"].tolist() == plain["token_ids"].tolist()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"image": text(b"no picture")}, "is not a picture"),
        ({"image": text(b"")}, "is empty"),
        ({"prompt": text(b"\xff\xfe")}, "prompt is not UTF-8 text"),
        ({"max_new_tokens": np.array([0], dtype=np.int32)}, "max-new-tokens is 0"),
        ({"keep": np.array([1.5], dtype=np.float32)}, "keep is 1.5, expected 0 < keep <= 1"),
        ({"temperature": np.array([0], dtype=np.float32)}, "temperature is 0.0"),
        ({"top_p": np.array([np.nan], dtype=np.float32)}, "top_p is nan, expected a finite number"),
        ({"keep": np.array([np.inf], dtype=np.float32)}, "keep is inf, expected a finite number"),
        ({"fps": np.array([np.nan], dtype=np.float32), **FRAMES}, "fps is nan, expected a finite number"),
        ({"fps": np.array([0], dtype=np.float32), **FRAMES}, "fps is 0, expected a number above 0"),
        ({"policy": text("norm-lowest")}, "no policy 'norm-lowest' at cut 0"),
        ({"policy": text(b"\xff\xfe")}, "policy is not UTF-8 text"),
        ({"seed": np.array([-1], dtype=np.int64), "top_k": np.array([2], dtype=np.int32)}, "seed is -1"),
        ({"prompt": text("hello " * 5000)}, "prompt has"),
    ],
)
def test_a_wrong_request_gets_one_sentence_and_the_next_an_answer(server, changes, complaint):
    picture = tiny_picture(112, 84, seed=1)
    answer = server.ask({**question("What is this?", picture, max_new_tokens=2), **changes})
    assert len(answer.responses) == 1
    assert complaint in answer.error
    assert server.ask(question("What is this?", max_new_tokens=2)).error == ""


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"temperature": np.array([], dtype=np.float32)}, "temperature has 0 values, expected 1"),
        ({"max_new_tokens": np.array([], dtype=np.int32)}, "max_new_tokens has 0 values, expected 1"),
        ({"stream": np.array([], dtype=np.bool_)}, "stream has 0 values, expected 1"),
        ({"prompt": np.array([], dtype=np.object_)}, "the request has no prompt"),
        ({"keep": np.array([0.5, 0.6], dtype=np.float32)}, "keep has 2 values, expected 1"),
    ],
)
def test_a_shape_that_triton_should_have_refused_is_answered_in_one_sentence(server, changes, complaint):
    answer = server.ask({**question("What is this?", max_new_tokens=2), **changes}, checked=False)
    assert len(answer.responses) == 1
    assert complaint in answer.error


def test_empty_lists_of_pictures_and_policies_are_as_good_as_none(server, session):
    request = question("What is this?", max_new_tokens=2)
    request |= {name: np.array([], dtype=np.object_) for name in ("image", "frames", "policy")}
    wanted = session.generate([], "What is this?", max_new_tokens=2)
    assert tuple(server.ask(request).outputs()["token_ids"]) == wanted.token_ids


def test_whatever_goes_wrong_inside_is_answered_too(server, monkeypatch, caplog):
    """Triton waits for a final response: without one the request, and in the end the model, hangs."""

    def fail(*_arguments, **_options):
        raise MemoryError("out of\nmemory")

    monkeypatch.setattr(server._model._session, "prefill", fail)
    answer = server.ask(question("What is this?", max_new_tokens=2))
    assert answer.error == "MemoryError: out of memory"
    assert answer.responses[-1].failed.code == server.codes.INTERNAL
    assert "a request failed" in caplog.text
    monkeypatch.undo()
    assert server.ask(question("What is this?", max_new_tokens=2)).error == ""


def test_generation_ends_when_the_client_leaves(server):
    asked = question("Say hello.", tiny_picture(112, 84, seed=1), max_new_tokens=2000, stream=True)
    answer = server.ask(asked, leaves_after=2)
    assert len(answer.responses) <= 3  # a piece may be under way
    assert answer.outputs()["token_ids"].size == 0  # nothing whole was sent
    assert server._model._engine.stats().finished["cancelled"] >= 1
    assert server._model._engine.stats().slots_in_use == 0


def test_the_shipped_model_answers_as_the_command_line_does(tmp_path):
    chooser = TopK(Scorer.NORM, Select.LOWEST)
    bundle = export_tiny(READER, tmp_path / "bundle", layer=2, keep=0.25, chooser=chooser)
    out = tmp_path / "repository"
    result = ep_export("package", str(bundle.path), "--triton", str(out))
    assert result.code == 0, result.err
    assert result.out.strip() == str(out)
    assert "not run here: no Triton server" in result.err
    with StandIn(out / "models").running() as server:
        for scene, asked in list(held_out(3, seed=4)):
            file = tmp_path / "scene.png"
            scene.picture.save(file)
            told = ep_export(
                "run",
                str(bundle.path),
                "--image",
                str(file),
                "--prompt",
                asked.text,
                "--max-new-tokens",
                "8",
                "--json",
            )
            wanted = json.loads(told.out)
            answer = server.ask(question(asked.text, scene.picture, max_new_tokens=8)).outputs()
            assert answer["text"][0].decode() == wanted["answer"]
            assert answer["token_ids"].tolist() == wanted["token_ids"]
            assert answer["kept_index"].tolist() == wanted["kept_index"]


def test_package_prints_what_it_wrote_as_json(bundle, tmp_path):
    out = tmp_path / "repository"
    result = ep_export("package", str(bundle.path), "--triton", str(out), "--json")
    told = json.loads(result.out)
    assert (told["path"], told["runtime"], told["target"]) == (str(out), "onnxruntime", None)
    assert told["models"] == ["ep_export"]
    assert json.loads((out / "repository.json").read_text())["models"] == told["models"]
    again = ep_export("package", str(bundle.path), "--triton", str(out))
    assert again.code == 1
    assert "exists already" in again.err


def engines_in(bundle: Bundle, name: str, on_cpu: tuple[str, ...] = ()) -> Path:
    """Files where engines would be; nothing here loads them."""
    target = find_target(name)
    folder = bundle.path / ENGINES / name
    folder.mkdir(parents=True)
    components = {}
    for component in bundle.manifest.components:
        if component.name in on_cpu or component.table is not None:
            continue
        (folder / f"{component.name}.engine").write_text("a stand-in")
        source = source_sha256(bundle.manifest, component)
        components[component.name] = EngineFile(
            component.role, f"{component.name}.engine", "", 10, 0.0, (), source
        )
    (folder / "plugin.so").write_text("a stand-in")
    record = EngineRecord(
        target=name,
        sm=target.sm,
        flavour=target.flavour,
        version="1.7.1",
        cuda="12",
        model="tiny",
        dialect=bundle.manifest.dialect,
        precision=bundle.manifest.precision,
        limits=EngineLimits(64, 8, 50176, 32),
        components=components,
        on_cpu=on_cpu,
        plugin=PluginFile("plugin.so", "", 10),
        made_by={},
    )
    write_record(folder, record)
    return folder


def test_engines_are_served_by_one_model_in_its_own_process(bundle, tmp_path):
    beside = ("prune_0.divprune", "prune_1.divprune")
    copy = Bundle.open(Path(shutil.copytree(bundle.path, tmp_path / "bundle")))
    engines_in(copy, "rtx-ada", beside)
    made = write_repository(copy, tmp_path / "repository", target=find_target("rtx-ada"))
    assert made.models == ("ep_export",)
    folder = made.path / "models" / "ep_export"
    config = parse_config((folder / "config.pbtxt").read_text())
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert (parameters["runtime"], parameters["target"]) == ("tensorrt", "rtx-ada")
    assert config.instance_group[0].kind == 1  # KIND_GPU
    served = folder / "1" / "bundle"
    engines = {f"{name}.engine" for name in COMPONENTS if name not in beside}
    linked = {file.name for file in (served / ENGINES / "rtx-ada").iterdir()}
    assert linked == {"engine.json", "plugin.so", *engines}
    assert {file.name for file in served.glob("*.onnx")} == {f"{name}.onnx" for name in beside}
    table = bundle.manifest.embed.table  # rows of which are read on the host
    assert [file.relative_to(served).as_posix() for file in (served / "weights").iterdir()] == [table.file]
    with pytest.raises(UserError), StandIn(made.path / "models").running():
        pass  # no GPU, or no TensorRT: said in a sentence when the model is loaded


def test_engines_whose_record_leaves_their_folder_are_not_packaged(bundle, tmp_path):
    copy = Bundle.open(Path(shutil.copytree(bundle.path, tmp_path / "bundle")))
    folder = engines_in(copy, "rtx-ada")
    record = read_record(folder)
    write_record(folder, replace(record, plugin=PluginFile("../../manifest.json", "", 10)))
    with pytest.raises(UserError, match="names a path outside itself"):
        write_repository(copy, tmp_path / "repository", target=find_target("rtx-ada"))
    assert not (tmp_path / "repository").exists()


def test_a_target_without_engines_or_with_gpu_is_refused(tiny_bundle, tmp_path):
    with pytest.raises(UserError, match="has no engines"):
        write_repository(tiny_bundle, tmp_path / "a", target=find_target("rtx-ada"))
    with pytest.raises(UsageError, match="--gpu is for ONNX Runtime"):
        write_repository(tiny_bundle, tmp_path / "b", target=find_target("rtx-ada"), gpu=True)
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_not_replaced_unasked(tiny_bundle, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="was not made by ep-export"):
        write_repository(tiny_bundle, out, overwrite=True)
    assert (out / "thesis.txt").exists()


def test_texts_have_no_gaps_and_say_what_was_not_run(repository):
    readme = (repository.path / "README.md").read_text()
    assert "Not run: no Triton server" in readme
    assert "docker run" in readme
    assert "gpus: [ 0, 1 ]" in readme
    docker = (repository.path / "Dockerfile").read_text()
    assert "FROM nvcr.io/nvidia/tritonserver:${TAG}-py3" in docker


def test_the_schema_is_tritons_own():
    """Compared with the real one where tritonclient is installed; its module needs protobuf alone."""
    found = importlib.util.find_spec("tritonclient")
    if found is None:
        pytest.skip("tritonclient is not installed")
    file = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    real = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real)
    for name, fields in MESSAGES.items():
        theirs = {f.name: (f.number, f.type) for f in getattr(real, name).DESCRIPTOR.fields}
        assert {key: theirs[key] for key in fields} == {key: value[:2] for key, value in fields.items()}
    ours = schema().DESCRIPTOR.file.enum_types_by_name["DataType"]
    values = {value.name: value.number for value in ours.values}
    assert values == {value.name: value.number for value in real.DataType.DESCRIPTOR.values}
