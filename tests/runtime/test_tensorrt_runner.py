"""The TensorRT backend without a GPU: everything but CUDA's and TensorRT's own calls.

`fake_tensorrt` stands in for TensorRT and `HostDevice` for the GPU (see `host_device.py`); what the real
TensorRT-RTX says without a GPU is in `test_real_tensorrt_rtx.py`.
"""

import dataclasses
import gc
import importlib
import math
import shutil
import sys

import numpy as np
import pytest
from bundles import export_tiny, two_cuts
from command_line import ep_export
from host_device import HostDevice, fake_tensorrt, write_fake_engine
from plugin_reference import output_shapes, plugin_build
from test_onnxruntime_runner import joined
from tiny import tiny_picture

from ep_export.bundle import Bundle, Dialect, Precision, Role, hash_file
from ep_export.checkpoint import open_checkpoint
from ep_export.engine.device import find_gpu
from ep_export.engine.profiles import LimitsRequest, make_profiles, resolve_limits
from ep_export.engine.sources import has_open_capacity, write_settled
from ep_export.engine_record import (
    EngineFile,
    EngineRecord,
    Limits,
    PluginFile,
    Profile,
    ShapeRange,
    engine_directory,
    read_record,
    source_sha256,
    write_record,
)
from ep_export.errors import UserError
from ep_export.fit import estimate
from ep_export.planning import make_plan
from ep_export.policy import Keep, MaxMin
from ep_export.runtime import OnnxRuntimeRunner, Session
from ep_export.runtime.device import DeviceMemory
from ep_export.runtime.engines import EngineBackend
from ep_export.runtime.tensorrt_runner import (
    DeviceTensor,
    Scratch,
    TensorRtRunner,
    _log,
    open_engine,
)
from ep_export.serving import Engine
from ep_export.targets import Flavour, Graphs, find_target
from ep_export.validate.polygraphy_run import compare_with_polygraphy
from ep_export.validate.report import Verdict

onnx = importlib.import_module("onnx")
VERSION = "10.9.0.34"
LIMITS = Limits(max_prompt=512, max_new_tokens=64, max_pixels=1 << 20, max_kept_tokens=512)


ON_CPU = "prune_1.divprune"


@pytest.fixture(scope="module")
def twice(tiny_checkpoint, tmp_path_factory):
    """Two cuts and two policies."""
    out = tmp_path_factory.mktemp("twice") / "bundle"
    return export_tiny(tiny_checkpoint, out, schedule=two_cuts(1, 3), keep=0.6, policies=(MaxMin(),))


@pytest.fixture(scope="module")
def compiled(twice, tmp_path_factory):
    """With "engines" (stand-ins) for a made-up GPU of SM 8.9; one policy stays on the CPU."""
    return compile_stand_ins(twice, tmp_path_factory.mktemp("compiled"), max_pixels=150 * 150)


def compile_stand_ins(original, folder, *, max_pixels, max_batch=None, max_prompt=512, max_kept=None):
    bundle = Bundle(folder / "bundle", original.manifest)
    shutil.copytree(original.path, bundle.path, ignore=shutil.ignore_patterns("engines", "*.settled.onnx"))
    request = LimitsRequest(max_prompt, 64, max_pixels, max_kept, max_batch)
    limits = resolve_limits(bundle, request)
    directory = engine_directory(bundle.path, "made-up")
    directory.mkdir(parents=True)
    engines = {}
    profiles = make_profiles(bundle, limits)
    for component in bundle.manifest.components:
        if component.name == ON_CPU:
            continue
        file = directory / f"{component.name}.engine"
        source = bundle.file(component.file)
        if has_open_capacity(component):
            rows = limits.at(component, bundle.manifest.schedule).capacity
            source = write_settled(source, source.with_suffix(".settled.onnx"), rows)
        write_fake_engine(source, file)
        engines[component.name] = EngineFile(
            role=component.role,
            file=file.name,
            sha256=hash_file(file),
            bytes=file.stat().st_size,
            build_seconds=1.0,
            profiles=tuple(profiles[component.name]),
            source=source_sha256(bundle.manifest, component),
        )
    record = EngineRecord(
        target="made-up",
        sm="8.9",
        flavour=Flavour.TENSORRT,
        version=VERSION,
        cuda="12.8",
        model=bundle.manifest.model,
        dialect=bundle.manifest.dialect,
        precision=bundle.manifest.precision,
        limits=limits,
        components=engines,
        on_cpu=(ON_CPU,),
        plugin=None,
        made_by={},
    )
    write_record(directory, record)
    return bundle


@pytest.fixture
def changed(compiled, tmp_path):
    """A copy of the compiled bundle whose record can be changed."""
    bundle = Bundle(tmp_path / "bundle", compiled.manifest)
    shutil.copytree(compiled.path, bundle.path)
    directory = engine_directory(bundle.path, "made-up")

    def change(**fields):
        write_record(directory, dataclasses.replace(read_record(directory), **fields))
        return bundle

    return change


def backend(bundle, target=None, *, device=HostDevice, profiles=2, **settings):
    module = fake_tensorrt(profiles=profiles, **settings)
    return EngineBackend(bundle, target, module=lambda _: module, device=device), module


def runner(tmp_path, kind, *, device=None, module=None, profiles=1, **settings):
    """A runner over the graph past, new -> present."""
    file = joined(tmp_path / "joined.onnx", kind)
    write_fake_engine(file, tmp_path / "joined.engine")
    shapes = {"past": ShapeRange((1, 0), (1, 2), (1, 8)), "new": ShapeRange((1, 1), (1, 1), (1, 2))}
    module = module or fake_tensorrt(**settings)
    opened = open_engine(
        module,
        tmp_path / "joined.engine",
        name="joined",
        profiles=(Profile("all", shapes),) * profiles,
        limits=LIMITS,
    )
    memory = DeviceMemory(device or HostDevice())
    return TensorRtRunner(opened, memory, Scratch(memory), lambda: None)


@pytest.mark.parametrize("policies", [(), ("divprune",)], ids=["engines", "one cut on the CPU"])
def test_a_session_answers_as_with_onnx_runtime(compiled, policies):
    pictures, question = [tiny_picture(140, 112, 1)], "which digits?"
    with Session.open(compiled) as session:
        wanted = session.generate(pictures, question, max_new_tokens=8, policies=policies)
    made, module = backend(compiled)
    with Session.open(compiled, runner=made) as session:
        got = session.generate(pictures, question, max_new_tokens=8, policies=policies)
        text = session.generate([], question, max_new_tokens=3)
    assert got.token_ids == wanted.token_ids
    assert got.cuts == wanted.cuts
    assert len(text.token_ids) == 3
    # prefill in the first context of every span, decode in the second
    for name in ("decoder_0.onnx", "decoder_1.onnx", "decoder_2.onnx"):
        assert [context.profile for context in module.made.engines[name].contexts] == [0, 1]
    opened = {name.removesuffix(".onnx") for name in module.made.engines if name.startswith("prune")}
    assert opened == (
        {"prune_0.divprune"} if policies else {"prune_0.paper-highest", "prune_1.paper-highest"}
    )


def test_outputs_have_the_shapes_the_plugin_itself_says(compiled):
    """The plugin's own shape function, asked through its harness: memory is taken by it before the run."""
    build = plugin_build()
    if build is None:
        pytest.skip("the plugin is not built: make plugin")

    def shape_function(component):
        if "paper" not in component:
            return None
        return lambda shapes: output_shapes(build, *shapes)

    pictures, question = [tiny_picture(140, 112, 1)], "which digits?"
    with Session.open(compiled) as session:
        wanted = session.generate(pictures, question, max_new_tokens=3)
    made, module = backend(compiled, shape_function=shape_function)
    with Session.open(compiled, runner=made) as session:
        got = session.generate(pictures, question, max_new_tokens=3)
    assert (got.token_ids, got.cuts) == (wanted.token_ids, wanted.cuts)
    for name in ("prune_0.paper-highest.onnx", "prune_1.paper-highest.onnx"):
        (context,) = module.made.engines[name].contexts
        assert set(context.told) == set(context.engine.outputs)


@pytest.fixture(scope="module")
def in_place(tiny_checkpoint, tmp_path_factory):
    """The same with caches of fixed capacity, which engines write in place; three answers at once."""
    folder = tmp_path_factory.mktemp("in-place")
    settings = {"schedule": two_cuts(1, 3), "keep": 0.6, "policies": (MaxMin(),), "dialect": Dialect.MODERN}
    bundle = export_tiny(tiny_checkpoint, folder / "made", **settings)
    return compile_stand_ins(bundle, folder, max_pixels=150 * 150, max_batch=3)


PICTURES = [tiny_picture(140, 112, 1), tiny_picture(60, 100, 2), tiny_picture(100, 60, 3)]


def test_caches_of_fixed_capacity_answer_as_with_onnx_runtime(in_place):
    with Session.open(in_place) as session:
        wanted = [session.generate([shown], "which digits?", max_new_tokens=8) for shown in PICTURES]
    made, module = backend(in_place)
    with Session.open(in_place, runner=made) as session:
        got = [session.generate([shown], "which digits?", max_new_tokens=8) for shown in PICTURES]
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in wanted]
    for name in ("decoder_0", "decoder_1", "decoder_2"):
        assert [context.profile for context in module.made.engines[f"{name}.settled.onnx"].contexts] == [0, 1]


def test_several_answers_at_once_get_the_tokens_each_gets_alone(in_place):
    with Session.open(in_place) as session:
        wanted = [
            session.generate([shown], "which digits?", max_new_tokens=6, ignore_eos=True).token_ids
            for shown in PICTURES
        ]
    device = HostDevice()
    made, _ = backend(in_place, device=lambda: device)
    with Session.open(in_place, runner=made) as session:
        decoder = session.decoder(slots=3, capacity=400)
        got = []
        for slot, shown in enumerate(PICTURES):
            prefill = session.prefill(session.prompts.build([shown], "which digits?"))
            before = device.copies_in, device.copies_out
            decoder.admit(slot, prefill)
            assert (device.copies_in, device.copies_out) == before  # caches go from there to there
            got.append([int(prefill.logits.argmax())])
        for _ in range(5):
            before = device.copies_in, device.copies_out, device.copies_within
            logits = decoder.step({slot: tokens[-1] for slot, tokens in enumerate(got)})
            # in: ids; positions and write index for every span; out: logits
            copied = device.copies_in, device.copies_out, device.copies_within
            assert np.subtract(copied, before).tolist() == [1 + 3 * 2, 1, 0]
            for slot, tokens in enumerate(got):
                tokens.append(int(logits[slot].argmax()))
    assert [tuple(tokens) for tokens in got] == wanted


def test_caches_hold_what_the_engines_were_compiled_for(in_place):
    made, _ = backend(in_place)
    with Session.open(in_place, runner=made) as session:
        decoder = session.decoder(slots=1, capacity=4096)
        assert decoder.capacity == (576, 576, 576)
        prefill = session.prefill(session.prompts.build([], "which digits?"))
        decoder.admit(0, prefill)
        length = prefill.caches["past_key_values.0.key"].shape[2]
        assert decoder.room(0) == 512 + 64 - length
        with pytest.raises(UserError, match=r"decoder_0 hold 576 tokens and are full") as caught:
            decoder.grow(1)
        assert "--max-new-tokens" in caught.value.hint


@pytest.fixture(scope="module")
def in_place_pruned(in_place, tmp_path_factory):
    """Engines that take few tokens behind a cut: 8 visual ones, and the text of a prompt of 160."""
    limits = {"max_pixels": 150 * 150, "max_prompt": 160, "max_kept": 8}
    return compile_stand_ins(in_place, tmp_path_factory.mktemp("in-place-pruned"), **limits)


def test_where_few_tokens_are_kept_caches_behind_a_cut_are_smaller(in_place_pruned):
    limits = read_record(engine_directory(in_place_pruned.path, "made-up")).limits
    text = limits.max_behind - 8
    assert 0 < text < 160 - 8
    asked = (PICTURES[:1], "which digits?")
    with Session.open(in_place_pruned) as session:
        wanted = session.generate(*asked, max_new_tokens=8, keep=Keep(ratio=0.3))
    made, _ = backend(in_place_pruned)
    with Session.open(in_place_pruned, runner=made) as session:
        got = session.generate(*asked, max_new_tokens=8, keep=Keep(ratio=0.3))
        assert (got.token_ids, got.cuts) == (wanted.token_ids, wanted.cuts)
        first, *behind = session.decoder(slots=1, capacity=4096).capacity
        assert first == 160 + 64
        assert set(behind) == {-(-(text + 8 + 64) // 16) * 16}
        with pytest.raises(UserError, match=r"of decoder_1\S* has shape .* its engine takes") as caught:
            session.generate([], "which digits? " * 40, max_new_tokens=2)
        assert f"prompts of 160 tokens ({limits.max_behind} behind a cut)" in caught.value.hint


@pytest.mark.parametrize(
    ("engines", "visual", "kept", "text"),
    # rows are multiples of 16: of the second pair 160 + 64, and behind a cut 8 + 136 + 64
    [("in_place", 400, 400, 112), ("in_place_pruned", 24, 8, 136)],
)
def test_caches_take_the_memory_that_is_estimated(request, engines, visual, kept, text, monkeypatch):
    """At the limits: those that prefill fills, and those of the answer that they move into."""
    in_place, taken, make = request.getfixturevalue(engines), [], TensorRtRunner.buffer

    def take(runner, name, shape):
        taken.append(4 * math.prod(shape))
        return make(runner, name, shape)

    monkeypatch.setattr(TensorRtRunner, "buffer", take)
    made, _ = backend(in_place)
    with Session.open(in_place, runner=made) as session:
        session.generate(PICTURES[:1], "which digits?", max_new_tokens=2, keep=Keep(ratio=0.3))
    manifest = in_place.manifest
    limit = {"visual_tokens": visual, "text_tokens": text, "kept": (kept, kept)}
    plan = make_plan(manifest.dims, manifest.schedule, manifest.keep, **limit)
    graphs = Graphs(Dialect.MODERN, Precision.FP16)
    guess = estimate(plan, find_target("h100"), new_tokens=64, graphs=graphs, kv_bytes_per_element=4)
    assert sum(taken) == guess.pruned.kv_bytes


def test_more_slots_than_engines_were_compiled_for_are_refused_before_anything_is_answered(in_place):
    made, _ = backend(in_place)
    with Session.open(in_place, runner=made) as session:
        assert session.max_batch == 3
        with pytest.raises(UserError, match="4 slots are more than the 3 that the engines were") as caught:
            Engine(session, slots=4)
        assert "--slots 3" in caught.value.hint
        with Engine(session) as engine:
            assert engine.slots == 3


def test_caches_from_the_host_are_written_in_place_too(in_place):
    """As Polygraphy's comparison feeds them; what comes back is what ONNX Runtime makes of them."""
    span = in_place.manifest.spans[0]
    shapes = {"B": 2, "T": 1, "C": 576}
    rng = np.random.default_rng(0)
    feeds = {
        spec.name: rng.standard_normal([shapes.get(axis, axis) for axis in spec.shape]).astype(spec.dtype)
        for spec in span.inputs
    }
    feeds |= {"write_index": np.array([3, 570]), "position_ids": abs(feeds["position_ids"])}
    made, _ = backend(in_place)
    file = in_place.file(span.file)
    with made(file) as ours, OnnxRuntimeRunner(file) as theirs:
        got, wanted = ours.run(feeds), theirs.run(feeds)
        assert ours.capacity == 576
        for name in theirs.output_names:
            assert np.array_equal(got[name].numpy(), wanted[name].numpy())


def copies(compiled, policies, pictures):
    """(to the device, from it) of a prompt and one decoded token, everything opened before."""
    device = HostDevice()
    made, _ = backend(compiled, device=lambda: device)
    with Session.open(compiled, runner=made) as session:
        ask = {"max_new_tokens": 2, "policies": policies}
        session.generate(pictures, "which digits?", **ask)
        before = device.copies_in, device.copies_out
        session.generate(pictures, "which digits?", **ask)
        return device.copies_in - before[0], device.copies_out - before[1]


def test_caches_and_hidden_states_stay_on_the_device(compiled):
    # prompt: embeddings, once for all spans, and positions for every span (empty caches are no bytes)
    # decode step: the same, the embedding a row that the host has read
    # out: logits, then logits
    assert copies(compiled, (), []) == (1 + 3 + 1 + 3, 1 + 1)


def test_what_a_cut_computes_stays_on_the_device_but_for_what_the_host_reads(compiled):
    alone_in, alone_out = copies(compiled, (), [])
    vision = 4  # inputs of the tiny Qwen2.5-VL's encoder
    inputs, outputs = copies(compiled, (), [tiny_picture(140, 112, 1)])
    # keep_slots of both cuts; positions for the first span and the first cut, not for three spans; where the
    # picture is
    assert inputs - alone_in - vision == 2 + (2 - 3) + 1
    # visual embeddings; kept index and scores of every cut
    assert outputs - alone_out == 1 + 2 * 2


def test_a_cut_on_the_cpu_takes_only_what_its_chooser_reads(compiled):
    inputs, outputs = copies(compiled, (), [tiny_picture(140, 112, 1)])
    beside_in, beside_out = copies(compiled, ("divprune",), [tiny_picture(140, 112, 1)])
    # out: hidden states, positions and visual places, instead of kept index and scores
    assert beside_out - outputs == 3 - 2
    # in: kept hidden states and positions, instead of keep_slots; divprune reads no states
    assert beside_in - inputs == 2 - 1


def test_polygraphy_compares_engines_beside_onnx_runtime(twice, tiny_checkpoint, tmp_path):
    """Components are opened and closed one after the other: the device is given back and asked for again."""
    compiled, devices = compile_stand_ins(twice, tmp_path, max_pixels=224 * 224), []

    def device():
        devices.append(HostDevice())
        return devices[-1]

    made, module = backend(compiled, device=device)
    found = compare_with_polygraphy(
        compiled,
        open_checkpoint(str(tiny_checkpoint)),
        {"onnxruntime": OnnxRuntimeRunner, "tensorrt": made},
        pictures=[tiny_picture(140, 112, 1)],
        prompts=["which digits?"],
        out=tmp_path / "out",
    )
    assert found.report.verdict is Verdict.PASS
    assert len(devices) == len(module.made.engines)
    assert {Role.VISION, Role.DECODER, Role.PRUNE} == {
        component.role for component in compiled.manifest.components if component.file in module.made.engines
    }
    for one in module.made.engines.values():
        one.contexts.clear()  # the stand-ins remember theirs
    gc.collect()
    assert all(one.closed and not one.held for one in devices)


def test_all_memory_goes_back(compiled):
    device = HostDevice()
    made, _ = backend(compiled, device=lambda: device)
    with Session.open(compiled, runner=made) as session:
        session.generate([tiny_picture(140, 112, 1)], "which digits?", max_new_tokens=4)
        assert device.held
    gc.collect()
    assert not device.held
    assert device.closed


@pytest.mark.parametrize(
    ("kind", "name", "seen"),
    [
        (onnx.TensorProto.FLOAT, "FLOAT", np.float32),
        (onnx.TensorProto.FLOAT16, "HALF", np.float16),
        (onnx.TensorProto.BFLOAT16, "BF16", np.float32),
    ],
    ids=["fp32", "fp16", "bf16"],
)
def test_values_go_from_one_run_into_the_next(tmp_path, kind, name, seen):
    device = HostDevice()
    one = runner(tmp_path, kind, device=device)
    present = np.zeros((1, 0), dtype=np.float32)
    for i in range(3):
        present = one.run({"past": present, "new": np.full((1, 2), i + 0.5)})["present"]
    assert isinstance(present, DeviceTensor)
    assert (present.shape, present.kind) == ((1, 6), name)
    assert device.copies_in == 3  # each `new`; never the cache
    assert present.numpy().dtype == seen
    assert present.numpy().tolist() == [[0.5, 0.5, 1.5, 1.5, 2.5, 2.5]]


def test_outputs_of_unknown_shape_are_allocated_while_running(tmp_path):
    one = runner(tmp_path, onnx.TensorProto.FLOAT)  # present is [1, T], and no input has an axis T
    for length in (1, 2):
        made = one.run({"past": np.ones((1, 4)), "new": np.zeros((1, length))})["present"]
        assert made.shape == (1, 4 + length)
        assert made.numpy().tolist() == [[1.0] * 4 + [0.0] * length]


def test_a_shape_beyond_the_profiles_names_the_input_and_the_limit(tmp_path):
    one = runner(tmp_path, onnx.TensorProto.FLOAT)
    with pytest.raises(UserError, match=r"input past of joined has shape \[1, 9\]") as caught:
        one.run({"past": np.zeros((1, 9)), "new": np.zeros((1, 1))})
    assert "its engine takes [1, 0] to [1, 8]" in str(caught.value)
    assert "prompts of 512 tokens" in caught.value.hint
    assert "--max-prompt" in caught.value.hint


def test_a_prompt_beyond_the_engines_is_refused_before_it_runs(compiled):
    made, module = backend(compiled)
    with (
        Session.open(compiled, runner=made) as session,
        pytest.raises(UserError, match=r"pixel_values of vision_encoder has shape"),
    ):
        session.generate([tiny_picture(220, 220, 1)], "which digits?", max_new_tokens=1)
    assert not module.made.engines["decoder_0.onnx"].contexts


def test_wrong_names_are_named(tmp_path):
    one = runner(tmp_path, onnx.TensorProto.FLOAT)
    with pytest.raises(UserError, match=r"joined misses inputs \['past'\] and does not know \['pst'\]"):
        one.run({"pst": np.zeros((1, 1)), "new": np.zeros((1, 1))})


def test_a_run_that_fails_says_what_tensorrt_said(tmp_path):
    one = runner(tmp_path, onnx.TensorProto.FLOAT, fails="the kernel\nwent wrong")
    with pytest.raises(UserError, match=r"^joined failed: the kernel$"):
        one.run({"past": np.zeros((1, 1)), "new": np.zeros((1, 1))})


def test_a_failure_does_not_quote_an_older_error(tmp_path):
    module = fake_tensorrt(fails="the kernel went wrong")
    feeds = {"past": np.zeros((1, 1)), "new": np.zeros((1, 1))}
    with pytest.raises(UserError, match="the kernel went wrong"):
        runner(tmp_path, onnx.TensorProto.FLOAT, module=module).run(feeds)
    module.made.settings["fails"] = True
    silent = runner(tmp_path, onnx.TensorProto.FLOAT, module=module)
    _log(module).last = "an error of another engine"
    with pytest.raises(UserError, match=r"^joined failed: TensorRT gives no reason$"):
        silent.run(feeds)
    module.made.settings["unready"] = True
    unready = runner(tmp_path, onnx.TensorProto.FLOAT, module=module)
    _log(module).last = "an error of another engine"
    with pytest.raises(UserError, match=r"^joined cannot be run: TensorRT gives no reason$"):
        unready.run(feeds)


def test_an_engine_that_is_refused_says_why(tmp_path):
    with pytest.raises(UserError, match=r"joined\.engine cannot be opened: other magic tag"):
        runner(tmp_path, onnx.TensorProto.FLOAT, refuses="other magic tag")


def test_another_number_of_profiles_than_recorded_is_refused(tmp_path):
    with pytest.raises(UserError, match="engine joined has 1 profiles, its record says 2"):
        runner(tmp_path, onnx.TensorProto.FLOAT, profiles=2)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"sm": "8.7"}, "engines for made-up are for SM 8.7, expected SM 8.9"),
        ({"version": "10.3.0.30"}, "built by tensorrt 10.3.0.30, expected 10.9.0.34"),
        ({"components": {}}, "lack vision_encoder"),
        ({"plugin": PluginFile("plugin.so", "0" * 64, 1)}, "plugin .* is missing"),
    ],
    ids=["SM", "TensorRT version", "component", "plugin"],
)
def test_engines_for_something_else_are_refused_before_any_is_opened(changed, fields, sentence):
    module, devices = fake_tensorrt(), []

    def device():
        devices.append(HostDevice())
        return devices[-1]

    with pytest.raises(UserError, match=sentence):
        EngineBackend(changed(**fields), module=lambda _: module, device=device)
    assert not module.made.engines
    assert all(one.closed for one in devices)


def test_a_policy_that_was_added_after_compiling_says_how_to_compile_it(changed):
    bundle = changed()
    directory = engine_directory(bundle.path, "made-up")
    record = read_record(directory)
    left = {name: engine for name, engine in record.components.items() if name != "prune_0.divprune"}
    write_record(directory, dataclasses.replace(record, components=left))
    made, _ = backend(bundle)
    with Session.open(bundle, runner=made) as session:
        assert session.generate([tiny_picture(56, 56)], "which digits?", max_new_tokens=1).cuts
        with pytest.raises(UserError, match=r"lack prune_0\.divprune") as caught:
            session.generate([tiny_picture(56, 56)], "which?", max_new_tokens=1, policies=("divprune",))
    assert "--policy divprune" in caught.value.hint


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"version": "1.2.0.54"}, "were built by tensorrt-rtx 1.2.0.54, expected {installed}"),
        ({}, "TensorRT needs "),  # a GPU, or cuda-python first
    ],
    ids=["version", "GPU"],
)
def test_run_refuses_engines_in_one_line(changed, fields, sentence):
    """Through the command line, with the real TensorRT-RTX: it says its version without a GPU."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    if not fields and find_gpu() is not None:
        pytest.skip("there is a GPU")
    bundle = changed(**{"flavour": Flavour.TENSORRT_RTX, "version": trt.__version__, **fields})
    result = ep_export("run", str(bundle.path), "--prompt", "which digits?", "--runtime", "tensorrt")
    assert (result.code, result.out) == (1, "")
    error, hint = result.err.splitlines()
    assert sentence.format(installed=trt.__version__) in error
    assert hint.startswith("hint: ")


def test_a_changed_engine_is_refused(changed):
    bundle = changed()
    engine = engine_directory(bundle.path, "made-up") / "decoder_1.engine"
    content = bytearray(engine.read_bytes())
    content[0] ^= 1
    engine.write_bytes(content)
    with pytest.raises(UserError, match="was changed: its SHA-256 differs"):
        backend(bundle)


@pytest.fixture
def with_plugin(changed):
    """The bundle with a plugin library beside its engines, and that library."""

    def make(**fields):
        bundle = changed()
        library = engine_directory(bundle.path, "made-up") / "libep_entropy_prune.so"
        library.write_bytes(b"a library")
        entry = PluginFile(library.name, hash_file(library), library.stat().st_size)
        return changed(plugin=entry, **fields), library

    return make


def test_the_plugin_is_loaded_before_the_engines(with_plugin):
    bundle, library = with_plugin()
    _, module = backend(bundle)
    assert module.made.libraries == [str(library)]
    assert not module.made.engines


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
def test_a_changed_plugin_is_never_loaded(with_plugin, verify):
    bundle, library = with_plugin()
    library.write_bytes(b"b library")
    module, device = fake_tensorrt(profiles=2), HostDevice()
    with pytest.raises(UserError, match=r"plugin .* was changed: its SHA-256 differs"):
        EngineBackend(bundle, module=lambda _: module, device=lambda: device, verify=verify)
    assert not module.made.libraries
    assert device.closed


def test_a_plugin_that_does_not_load_gives_the_gpu_back(with_plugin):
    bundle, _ = with_plugin()
    module, device = fake_tensorrt(profiles=2), HostDevice()

    def fail(_library):
        raise RuntimeError("undefined symbol")

    module.get_plugin_registry().load_library = fail
    with pytest.raises(UserError, match=r"plugin .* cannot be loaded: undefined symbol"):
        EngineBackend(bundle, module=lambda _: module, device=lambda: device)
    assert device.closed


def test_a_plugin_is_never_loaded_into_tensorrt_rtx(with_plugin):
    bundle, _ = with_plugin(flavour=Flavour.TENSORRT_RTX)
    module = fake_tensorrt()
    with pytest.raises(UserError, match="tensorrt-rtx has none of"):
        EngineBackend(bundle, module=lambda _: module, device=HostDevice)
    assert not module.made.libraries


def test_which_engines_is_asked_only_when_there_are_several(compiled, changed, tiny_bundle):
    with pytest.raises(UserError, match="has no engines") as caught:
        backend(tiny_bundle)
    assert "ep-export compile" in caught.value.hint
    assert "--runtime onnxruntime" in caught.value.hint
    with pytest.raises(UserError, match="no engines for 'made-op'") as caught:
        backend(compiled, "made-op")
    assert "did you mean made-up?" in caught.value.hint
    bundle = changed()
    shutil.copytree(engine_directory(bundle.path, "made-up"), engine_directory(bundle.path, "other"))
    with pytest.raises(UserError, match="engines for 2 targets") as caught:
        backend(bundle)
    assert caught.value.hint == "add --target made-up|other"
    backend(bundle, "made-up")


@pytest.mark.parametrize("flavour", [Flavour.TENSORRT, Flavour.TENSORRT_RTX])
def test_without_tensorrt_one_line_says_what_runs_instead(changed, monkeypatch, flavour):
    monkeypatch.setitem(sys.modules, flavour.value.replace("-", "_"), None)
    with pytest.raises(UserError, match=f"need {flavour.value}, which is not installed") as caught:
        EngineBackend(changed(flavour=flavour))
    assert "\n" not in str(caught.value)
    assert "--runtime onnxruntime" in caught.value.hint
