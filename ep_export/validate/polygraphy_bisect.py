"""The first tensor of a component that leaves its tolerance.

Two rounds, so that a model of any size fits: first what leaves every layer, then everything between the last
layer that is right and the first tensor that is not. A tensor of the graph is known by the weight its node
reads, whose module in PyTorch saw the same tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from polygraphy.backend.onnx import ModifyOutputs
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.comparator import IterationResult

from ep_export.bundle import Bundle
from ep_export.errors import UserError
from ep_export.validate.comparison import Comparison
from ep_export.validate.component_feeds import ComponentFeeds
from ep_export.validate.component_oracle import STEM, Arrays, ComponentOracle, Watch
from ep_export.validate.polygraphy_compare import Oracles, compared, quiet
from ep_export.validate.report import Verdict
from ep_export.validate.tolerance import INTEGERS, Tolerance, layers_before, tolerance_of

__all__ = ["Bisection", "Checked", "bisect"]

_SAME_DATA = ("Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
"""Between a weight and the node that computes with it."""

_FUSED_NORM, _RESIDUAL_SUM = "SkipSimplifiedLayerNormalization", 3
"""ONNX Runtime's norm of a sum, and which of its outputs is the sum."""

_AFTER_ALL = ("final/", "merger/")
"""Prefixes of nodes behind the last layer or block."""

_HIDDEN = "hidden_states"
"""What a span that is not the last hands over."""


@dataclass(frozen=True)
class Checked:
    """One tensor of the graph that was compared.

    Attributes:
        tensor: Its name in the ONNX file.
        meaning: What it is in PyTorch.
        verdict: PASS or FAIL.
        max_abs_error: Largest absolute difference.
        tolerance: What was allowed.
    """

    tensor: str
    meaning: str
    verdict: Verdict
    max_abs_error: float
    tolerance: float


@dataclass(frozen=True)
class Bisection:
    """The first tensor of a component out of tolerance, in the graph's order.

    Attributes:
        component: The component.
        case: The run it shows in.
        tensor: Its name in the ONNX file.
        meaning: What it is in PyTorch.
        node: Type and name of the node that computes it.
        weights: Weights that it and the other nodes after the last right tensors read.
        nodes: How many these are.
        after: What they start from: the last right tensors, and inputs of the component.
        max_abs_error: Its largest absolute difference.
        tolerance: What was allowed.
        checked: Everything compared in the last round, in the graph's order.
    """

    component: str
    case: str
    tensor: str
    meaning: str
    node: str
    weights: tuple[str, ...]
    nodes: int
    after: tuple[str, ...]
    max_abs_error: float
    tolerance: float
    checked: tuple[Checked, ...]

    @property
    def sentence(self) -> str:
        """For a log."""
        return (
            f"{self.component}: the first tensor out of tolerance is {self.tensor}, {self.meaning}: off by "
            f"{self.max_abs_error:.1e}, allowed {self.tolerance:.1e} ({self.case})"
        )

    @property
    def origin(self) -> str:
        """What lies between it and what is still right."""
        reads = f", reading {', '.join(self.weights)}" if self.weights else ""
        nodes = f"{self.nodes} node{'s' * (self.nodes != 1)}"
        return f"computed by {nodes} from {', '.join(self.after) or 'constants'}{reads}"


class _Side(str, Enum):
    """Where PyTorch saw a tensor."""

    INPUT = "input"  # of a module
    OUTPUT = "output"  # of a module
    RESULT = "result"  # an output of the component


@dataclass(frozen=True)
class _Landmark:
    """A tensor known on both sides: its value in the graph, and where PyTorch saw it.

    Attributes:
        value: In the graph.
        side: Of what.
        label: Module, by its name in the model or its prefix in the graph; or output of the component.
        depth: Layers it went through.
    """

    value: ir.Value
    side: _Side
    label: str
    depth: int

    @property
    def meaning(self) -> str:
        """For people."""
        return f"{self.side.value} of {'the component' if self.side is _Side.RESULT else self.label}"

    def seen(self, watch: Watch, outputs: Arrays) -> NDArray[Any] | None:
        """What PyTorch computed there; None for a module it did not call."""
        source = {_Side.INPUT: watch.inputs, _Side.OUTPUT: watch.outputs, _Side.RESULT: outputs}
        return source[self.side].get(self.label)


_Compared = list[tuple[_Landmark, Comparison]]


def bisect(bundle: Bundle, given: ComponentFeeds, case: int, oracles: Oracles) -> Bisection | None:
    """Find where a component's graph leaves the oracle, in ONNX Runtime.

    Args:
        bundle: The bundle.
        given: The component and its inputs.
        case: Which of its runs.
        oracles: PyTorch.

    Returns:
        The first tensor out of tolerance; None when none is.

    Raises:
        UserError: The component's file has not the form `export` writes.
    """
    with quiet():
        return _Search(bundle, given, case, oracles).run()


class _Search:
    def __init__(self, bundle: Bundle, given: ComponentFeeds, case: int, oracles: Oracles) -> None:
        self._bundle, self._given, self._case, self._oracles = bundle, given, case, oracles
        self._model = ir.load(bundle.file(given.component.file))
        graph = self._model.graph
        self._order = {node: number for number, node in enumerate(graph)}
        self._outputs = {value.name: value for value in graph.outputs}
        self._layers = oracles.exact.sections(given.component)
        self._modules = dict(oracles.exact.model.named_modules())

    def run(self) -> Bisection | None:
        coarse = self._compare([*self._between_layers(), *self._component_outputs()])
        bad = _first_bad(coarse)
        if bad is None:
            return None
        inside, _ = self._back(bad.value, _right(coarse))
        fine = self._compare([*self._leaves(inside, bad.depth), bad])
        bad = _first_bad(fine) or bad  # what failed before fails again: same inputs, same kernels
        nodes, borders = self._back(bad.value, _right(coarse) | _right(fine))
        return self._bisection(bad, fine, nodes, borders)

    def _between_layers(self) -> list[_Landmark]:
        """What leaves each layer: the one value of its nodes that other parts of the graph compute with."""
        marks = []
        for number, label in enumerate(self._layers):
            values = self._leaving(label, list(self._layers)[number + 1 :])
            if label == STEM:  # it hands over tables too, but only the hidden state comes from weights
                values = {value for value in values if any(map(_weights, self._back(value, set())[0]))}
            if len(values) == 2:  # what enters the sum that the norm behind it forms
                values = _sum_of(values)
                if not values:  # of the last layer, whose sum nobody else reads
                    continue
            if len(values) != 1:
                raise UserError(
                    f"{self._given.component.file} has {len(values)} tensors leaving {label}, expected one",
                    hint="build the bundle again with this ep-export",
                )
            marks.append(_Landmark(values.pop(), _Side.OUTPUT, label, number + 1))
        return marks

    def _leaving(self, label: str, later: Sequence[str]) -> set[ir.Value]:
        """Values of a section that the next one computes with, or what stands after the last one."""
        own = [node for node in self._order if (node.name or "").startswith(f"{label}/")]
        following = (f"{later[0]}/",) if later else _AFTER_ALL
        values = {
            value
            for node in own
            for value in node.outputs
            if any((use.node.name or "").startswith(following) for use in value.uses())
        }
        onward = self._outputs.get(_HIDDEN)
        if later or onward is None:
            return values
        # a span that is not the last: back from what it hands over, past nodes that only change its form
        while onward.producer() not in own and onward.producer() is not None:
            onward = _producer(onward).inputs[0] or onward
        return {onward}

    def _component_outputs(self) -> list[_Landmark]:
        component, depth = self._given.component, self._oracles.vision_layers
        return [
            _Landmark(
                self._outputs[spec.name],
                _Side.RESULT,
                spec.name,
                layers_before(component, spec.name, depth),
            )
            for spec in component.outputs
        ]

    def _leaves(self, nodes: Sequence[ir.Node], depth: int) -> list[_Landmark]:
        """What enters and leaves the modules whose weights these nodes read."""
        marks = []
        for node in nodes:
            for weight in _weights(node):
                module, _, kind = weight.rpartition(".")
                if kind != "weight" or module not in self._modules:
                    continue
                if node.op_type in {"Gemm", "FusedMatMul"} and node.inputs[0] is not None:
                    marks.append(_Landmark(node.inputs[0], _Side.INPUT, module, depth))
                marks.append(_Landmark(_with_bias(node.outputs[0], module), _Side.OUTPUT, module, depth))
        return marks

    def _back(self, value: ir.Value, borders: set[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
        """Nodes that a value is computed by, back to some borders; and the borders and inputs met."""
        nodes: set[ir.Node] = set()
        met: dict[ir.Value, None] = {}
        queue = [value]
        while queue:
            current = queue.pop()
            if current in borders and current is not value:
                met[current] = None
                continue
            node = current.producer()
            if current.is_graph_input() and not current.is_initializer():
                met[current] = None
            if node is not None and node not in nodes:
                nodes.add(node)
                queue += [read for read in node.inputs if read is not None]
        return sorted(nodes, key=self._order.__getitem__), sorted(met, key=self._place)

    def _place(self, value: ir.Value) -> int:
        """Where in the graph a value is computed; -1 for an input."""
        node = value.producer()
        return -1 if node is None else self._order[node]

    def _compare(self, marks: Sequence[_Landmark]) -> _Compared:
        """Both sides at these landmarks: each tensor once, in the graph's order, if PyTorch saw it."""
        computed = [mark for mark in marks if mark.value.producer() is not None]
        got = self._run_graph(list(dict.fromkeys(map(_name, computed))))
        exact = self._run_oracle(self._oracles.exact, computed)
        half = self._run_oracle(self._oracles.half, computed) if self._oracles.half is not None else exact
        wanted: dict[str, NDArray[Any]] = {}
        tolerances: dict[str, Tolerance] = {}
        known: dict[str, _Landmark] = {}
        for mark in sorted(computed, key=lambda mark: self._place(mark.value)):
            name = _name(mark)
            # PyTorch may lay a tensor out otherwise (windows, heads); its size then tells
            if name in known or mark not in exact or exact[mark].size != got[name].size:
                continue
            known[name] = mark
            wanted[name] = exact[mark].reshape(got[name].shape)
            noise = float(np.abs(half[mark] - exact[mark]).max(initial=0.0))
            integers = np.issubdtype(got[name].dtype, np.integer)
            tolerances[name] = (
                INTEGERS if integers else tolerance_of(self._bundle.manifest, mark.depth, noise)
            )
        case = self._given.cases[self._case]
        comparisons = compared(IterationResult(wanted), IterationResult(got), tolerances, case)
        return [(mark, comparisons[name]) for name, mark in known.items()]

    def _run_graph(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The graph in ONNX Runtime with these tensors as its outputs."""
        import onnxruntime

        proto = ModifyOutputs(ir.serde.serialize_model(self._model), outputs=list(names))()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._bundle.path.resolve())
        )
        options.intra_op_num_threads = 1  # two rounds of one run: a pool would take longer to start
        content = proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        # what the marked tensors do not need is no input of the graph any more
        taken = {value.name for value in session.get_inputs()}
        feeds = {name: feed for name, feed in self._given.feeds[self._case].items() if name in taken}
        with OnnxrtRunner(session) as runner:
            return {name: np.array(array) for name, array in runner.infer(feeds).items()}

    def _run_oracle(
        self, oracle: ComponentOracle, marks: Sequence[_Landmark]
    ) -> dict[_Landmark, NDArray[Any]]:
        component = self._given.component
        modules = {**dict(oracle.model.named_modules()), **oracle.sections(component)}
        wanted = {mark.label for mark in marks if mark.side is not _Side.RESULT}
        watch = Watch({label: modules[label] for label in sorted(wanted & modules.keys())})
        outputs = oracle.run(component, self._given.feeds[self._case], watch=watch)
        seen = ((mark, mark.seen(watch, outputs)) for mark in marks)
        return {mark: array for mark, array in seen if array is not None}

    def _bisection(
        self, bad: _Landmark, comparisons: _Compared, nodes: Sequence[ir.Node], borders: Sequence[ir.Value]
    ) -> Bisection:
        node = _producer(bad.value)
        result = next(comparison for mark, comparison in comparisons if mark.value is bad.value)
        return Bisection(
            component=self._given.component.name,
            case=self._given.cases[self._case],
            tensor=_name(bad),
            meaning=bad.meaning,
            node=f"{node.op_type} {node.name}",
            weights=tuple(dict.fromkeys(weight for producer in nodes for weight in _weights(producer))),
            nodes=len(nodes),
            after=tuple(value.name or "" for value in borders),
            max_abs_error=result.error,
            tolerance=result.tolerance,
            checked=tuple(
                Checked(_name(mark), mark.meaning, c.verdict, c.error, c.tolerance) for mark, c in comparisons
            ),
        )


def _weights(node: ir.Node) -> list[str]:
    """Names of the checkpoint's tensors that a node reads, also through nodes that only change their form."""
    names = []
    for value in node.inputs:
        origin = value
        while origin is not None:
            if origin.is_initializer():
                if isinstance(origin.const_value, ir.ExternalTensor):
                    names.append(origin.name or "")
                break
            producer = origin.producer()
            changes_form = producer is not None and producer.op_type in _SAME_DATA
            origin = producer.inputs[0] if producer is not None and changes_form else None
    return names


def _with_bias(product: ir.Value, module: str) -> ir.Value:
    """What leaves a linear layer whose bias is added by a node of its own."""
    for use in product.uses():
        if use.node.op_type == "Add" and f"{module}.bias" in _weights(use.node):
            return use.node.outputs[0]
    return product


def _sum_of(terms: set[ir.Value]) -> set[ir.Value]:
    """The residual sum of two values, where a node gives it."""
    first, second = ({use.node for use in term.uses()} for term in terms)
    return {
        node.outputs[_RESIDUAL_SUM]
        for node in first & second
        if node.op_type == _FUSED_NORM and len(node.outputs) > _RESIDUAL_SUM
    }


def _first_bad(comparisons: _Compared) -> _Landmark | None:
    return next((mark for mark, comparison in comparisons if comparison.verdict is Verdict.FAIL), None)


def _right(comparisons: _Compared) -> set[ir.Value]:
    return {mark.value for mark, comparison in comparisons if comparison.verdict is Verdict.PASS}


def _name(mark: _Landmark) -> str:
    assert mark.value.name is not None  # noqa: S101 - `GraphBuilder.save` names every value
    return mark.value.name


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None  # noqa: S101 - landmarks are computed
    return node
