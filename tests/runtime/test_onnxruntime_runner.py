"""The ONNX Runtime backend on graphs of one or two nodes."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from ep_export.errors import UserError
from ep_export.runtime import OnnxRuntimeOptions, OnnxRuntimeRunner, onnxruntime_runner


def joined(path, kind, nodes=(("Concat", ["past", "new"], "present"),)):
    """past [1, P] and new [1, S] -> present [1, P + S]."""
    made = [
        helper.make_node(op, inputs, [out], **({"axis": 1} if op == "Concat" else {}))
        for op, inputs, out in nodes
    ]
    graph = helper.make_graph(
        made,
        "joined",
        [helper.make_tensor_value_info(name, kind, [1, name.upper()]) for name in ("past", "new")],
        [helper.make_tensor_value_info("present", kind, [1, "T"])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("kind", "seen"),
    [(TensorProto.FLOAT, np.float32), (TensorProto.FLOAT16, np.float16), (TensorProto.BFLOAT16, np.float32)],
    ids=["fp32", "fp16", "bf16"],
)
def test_values_go_from_one_run_into_the_next(tmp_path, kind, seen):
    with OnnxRuntimeRunner(joined(tmp_path / "joined.onnx", kind)) as runner:
        present = np.zeros((1, 0), dtype=np.float32)
        for i in range(3):
            present = runner.run({"past": present, "new": np.full((1, 2), i + 0.5, dtype=np.float32)})[
                "present"
            ]
        assert present.shape == (1, 6)
        assert present.numpy().dtype == seen
        assert present.numpy().tolist() == [[0.5, 0.5, 1.5, 1.5, 2.5, 2.5]]


def test_wrong_names_are_named(tmp_path):
    runner = OnnxRuntimeRunner(joined(tmp_path / "joined.onnx", TensorProto.FLOAT))
    with pytest.raises(UserError, match=r"joined.onnx misses inputs \['past'\] and does not know \['pst'\]"):
        runner.run({"pst": np.zeros((1, 1)), "new": np.zeros((1, 1))})


def test_a_refused_shape_is_one_line(tmp_path):
    runner = OnnxRuntimeRunner(joined(tmp_path / "joined.onnx", TensorProto.FLOAT))
    with pytest.raises(UserError, match=r"joined\.onnx failed") as caught:
        runner.run({"past": np.zeros((1, 1, 1)), "new": np.zeros((1, 1))})
    assert "\n" not in str(caught.value)


def test_bfloat16_products_on_a_cpu_are_refused_with_the_way_out(tmp_path):
    file = joined(tmp_path / "product.onnx", TensorProto.BFLOAT16, [("MatMul", ["past", "new"], "present")])
    with pytest.raises(UserError, match=r"no kernel for product\.onnx") as caught:
        OnnxRuntimeRunner(file)
    assert "--precision fp32 or fp16" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"hello", None], ids=["empty", "text", "missing"])
def test_a_file_that_is_no_graph_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot load broken\.onnx"):
        OnnxRuntimeRunner(tmp_path / "broken.onnx")


def test_an_unknown_provider_is_refused(tmp_path):
    file = joined(tmp_path / "joined.onnx", TensorProto.FLOAT)
    with pytest.raises(UserError, match="has no NoSuchExecutionProvider") as caught:
        OnnxRuntimeRunner(file, OnnxRuntimeOptions(providers=("NoSuchExecutionProvider",)))
    assert "CPUExecutionProvider" in caught.value.hint


def test_options_do_not_change_results(tmp_path):
    file = joined(tmp_path / "joined.onnx", TensorProto.FLOAT)
    feeds = {"past": np.ones((1, 2)), "new": np.zeros((1, 1))}
    for options in (OnnxRuntimeOptions(threads=1), OnnxRuntimeOptions(prepack=False)):
        assert OnnxRuntimeRunner(file, options).run(feeds)["present"].numpy().tolist() == [[1, 1, 0]]


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A runner whose tensors are said to lie on a GPU, and what it binds where; on the CPU all the same."""
    bound = {"inputs": [], "outputs": {}}
    bind_input, bind_output = onnxruntime.IOBinding.bind_ortvalue_input, onnxruntime.IOBinding.bind_output

    def watch_input(self, name, value):
        bound["inputs"].append((name, value.data_ptr()))
        bind_input(self, name, value)

    def watch_output(self, name, device_type="cpu", *arguments):
        bound["outputs"][name] = device_type
        bind_output(self, name, "cpu", *arguments)

    def refuse(*_arguments, **_options):
        raise AssertionError("without a binding every output comes to the host")

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_ortvalue_input", watch_input)
    monkeypatch.setattr(onnxruntime.IOBinding, "bind_output", watch_output)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", refuse)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_ort_values", refuse)
    monkeypatch.setattr(onnxruntime_runner, "device_of", lambda _names: "cuda")
    graph = joined(tmp_path / "joined.onnx", TensorProto.FLOAT)
    return OnnxRuntimeRunner(graph), bound


def test_outputs_stay_on_the_device_when_the_next_run_takes_them(watched):
    runner, bound = watched
    present = np.ones((1, 2))
    for step in range(3):
        outputs = runner.run({"past": present, "new": np.full((1, 1), step)}, on_device=("present",))
        assert bound["outputs"] == {"present": "cuda"}
        present = outputs["present"]
    assert present.numpy().tolist() == [[1, 1, 0, 1, 2]]


def test_a_value_goes_into_the_next_run_as_the_memory_it_came_out_in(watched):
    runner, bound = watched
    present = runner.run({"past": np.ones((1, 2)), "new": np.ones((1, 1))}, on_device=("present",))["present"]
    address = present.value.data_ptr()
    runner.run({"past": present, "new": np.ones((1, 1))})
    assert ("past", address) in bound["inputs"]


def test_outputs_that_nobody_claims_come_to_the_host(watched):
    runner, bound = watched
    outputs = runner.run({"past": np.ones((1, 2)), "new": np.zeros((1, 1))})
    assert bound["outputs"] == {"present": "cpu"}
    assert outputs["present"].numpy().tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_binding_changes_no_result(tmp_path, kind):
    """Against ONNX Runtime's plain `run` of the same session."""
    runner = OnnxRuntimeRunner(joined(tmp_path / "joined.onnx", kind))
    feeds = {"past": np.array([[0.5, -2.0]]), "new": np.array([[3.0]])}
    ready = {name: runner._to_ort(feed, runner._types[name]) for name, feed in feeds.items()}
    (plain,) = runner._session.run_with_ort_values(["present"], ready)
    bound = runner.run(feeds, on_device=("present",))["present"]
    assert np.array_equal(bound.numpy(), onnxruntime_runner._OrtTensor(plain).numpy())


def test_bfloat16_in_a_gpus_memory_is_not_read_as_if_it_were_here(monkeypatch):
    bits = np.array([0x3FC0, 0xC000], dtype=np.uint16)
    value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    monkeypatch.setattr(onnxruntime.OrtValue, "device_name", lambda _self: "cuda")
    with pytest.raises(UserError, match="cannot be read from there"):
        onnxruntime_runner._OrtTensor(value).numpy()


def test_a_graph_of_a_later_opset_says_what_reads_it(tmp_path):
    file = joined(tmp_path / "later.onnx", TensorProto.FLOAT)
    model = onnx.load(file)
    model.opset_import[0].version = 999
    onnx.save(model, file)
    with pytest.raises(UserError, match=r"later\.onnx has opset 999, .* reads up to \d+$") as caught:
        OnnxRuntimeRunner(file)
    assert "newer onnxruntime" in caught.value.hint
