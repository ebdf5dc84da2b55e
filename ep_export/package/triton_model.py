"""The model that people talk to, inside Triton's Python backend: a question and pictures in, text out.

It builds the prompt, walks the bundle's spans and cuts, decodes token by token and streams text; the
components run as models of the server (`runtime` "bls") or as TensorRT engines in this process ("tensorrt",
where caches never leave the GPU).
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from ep_export.bundle import Bundle, read_manifest
from ep_export.errors import UserError, reason
from ep_export.families.base import Video, Visual
from ep_export.package.triton_runner import TritonFactory, server
from ep_export.policy import Keep
from ep_export.runtime import Sampling, Session, open_picture
from ep_export.runtime.backends import Runtime, choose_backend
from ep_export.runtime.base import RunnerFactory

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.runtime import Generation

__all__ = ["BUNDLE", "FrontModel", "TextStream"]

BUNDLE = "bundle"
"""Folder of the manifest and the processor files, beside model.py."""

_LOG = logging.getLogger(__name__)  # the server's log has what Python says on stderr
_MAX_NEW_TOKENS = 128
_FPS = 1.0  # of frames that say nothing
_UNFINISHED = "\ufffd"  # what a tokenizer shows for a character whose last bytes are still to come


class _CancelledError(Exception):
    """The client left."""


class TextStream:
    """Text as tokens arrive: each call gives what is new and certain."""

    def __init__(self, decode: Any) -> None:
        self._decode, self._ids, self._sent = decode, list[int](), ""

    def add(self, token: int) -> str:
        """What can be shown after one more token; empty while a character is incomplete."""
        self._ids.append(token)
        text: str = self._decode(self._ids)
        if text.endswith(_UNFINISHED) or not text.startswith(self._sent):
            return ""
        piece, self._sent = text[len(self._sent) :], text
        return piece

    def rest(self, answer: str) -> str:
        """What of the whole answer was not shown yet."""
        return answer[len(self._sent) :] if answer.startswith(self._sent) else answer


class FrontModel:
    """Triton's Python backend calls these methods of the class that model.py makes of it.

    Attributes:
        bundle: Folder of the manifest and the processor files.
    """

    bundle: Path

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle.

        Args:
            args: The backend's; `model_config` is config.pbtxt as JSON.
        """
        parameters = json.loads(args["model_config"])["parameters"]
        settings = {name: value["string_value"] for name, value in parameters.items()}
        # its graphs lie in the other models' folders
        bundle = Bundle(self.bundle, read_manifest(self.bundle))
        self._session = Session.open(bundle, runner=_runner(bundle, settings))

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer requests one after another; responses go through each request's own sender."""
        for request in requests:
            self._answer(request)

    def finalize(self) -> None:
        """Close what was opened."""
        self._session.close()

    def _answer(self, request: Any) -> None:
        """Answer one request. Whatever happens, its last response is sent: the client waits for it."""
        triton = server()
        sender = request.get_response_sender()
        final = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            sender.send(self._generate(request, sender), flags=final)
        except _CancelledError:
            sender.send(flags=final)
        except UserError as error:
            told = f"{error} ({error.hint})" if error.hint else str(error)
            sender.send(_refusal(told, triton.TritonError.INVALID_ARG), flags=final)
        except Exception as error:  # noqa: BLE001 - whatever a model or a codec raises on somebody's input
            _LOG.exception("a request failed")
            told = f"{type(error).__name__}: {reason(error)}"
            sender.send(_refusal(told, triton.TritonError.INTERNAL), flags=final)

    def _generate(self, request: Any, sender: Any) -> Any:
        """Answer one request, streaming pieces if it asks for them; returns the last response."""
        inputs = _Inputs(request)
        stream, live = TextStream(self._session.prompts.decode), inputs.flag("stream")

        def on_token(token: int) -> None:
            if sender.is_cancelled():
                raise _CancelledError
            if live and (piece := stream.add(token)):
                sender.send(_response(text=piece))

        longest = inputs.number("max_new_tokens")
        generation = self._session.generate(
            inputs.visuals(),
            inputs.text("prompt"),
            max_new_tokens=_MAX_NEW_TOKENS if longest is None else int(longest),
            keep=inputs.keep(),
            policies=inputs.texts("policy"),
            sampling=inputs.sampling(),
            on_token=on_token,
        )
        text = stream.rest(generation.answer) if live else generation.answer
        return _response(text=text, generation=generation)


def _runner(bundle: Bundle, settings: Mapping[str, str]) -> RunnerFactory:
    if settings["runtime"] == Runtime.TENSORRT.value:
        return choose_backend(bundle, Runtime.TENSORRT, target=settings["target"])
    return TritonFactory(bundle.manifest, settings["prefix"])


class _Inputs:
    """The inputs of a request; one that is left out is None."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def number(self, name: str) -> float | None:
        """A single number.

        Raises:
            UserError: It is none, several, or not finite.
        """
        values = self._values(name)
        if values is None:
            return None
        if values.size != 1:
            raise UserError(f"{name} has {values.size} values, expected 1", hint="give one, or leave it out")
        value: float = values.reshape(-1)[0].item()
        if not math.isfinite(value):
            raise UserError(f"{name} is {value}, expected a finite number")
        return value

    def flag(self, name: str) -> bool:
        """Whether a switch is on; off when left out."""
        return bool(self.number(name))

    def texts(self, name: str) -> list[str]:
        """Strings; none when left out.

        Raises:
            UserError: One is not UTF-8.
        """
        values = self._values(name)
        try:
            return [] if values is None else [_bytes(value).decode("utf-8") for value in values.reshape(-1)]
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8 text", hint="encode it as UTF-8") from error

    def text(self, name: str) -> str:
        """A single string.

        Raises:
            UserError: It is missing or not UTF-8.
        """
        texts = self.texts(name)
        if not texts:
            raise UserError(f"the request has no {name}", hint=f'give the input "{name}"')
        return texts[0]

    def visuals(self) -> list[Visual]:
        """The pictures, then the frames as one video.

        Raises:
            UserError: One cannot be read, or the frames' rate is not above 0.
        """
        shown: list[Visual] = [*self._pictures("image")]
        if frames := self._pictures("frames"):
            fps = self.number("fps")
            if fps is not None and fps <= 0:
                raise UserError(f"fps is {fps:g}, expected a number above 0")
            shown.append(Video(tuple(frames), fps=_FPS if fps is None else fps))
        return shown

    def _pictures(self, name: str) -> list[Image.Image]:
        """Every element opened: the bytes of a file, or those in base64."""
        values = self._values(name)
        if values is None:
            return []
        with TemporaryDirectory() as folder:
            opened = []
            for number, value in enumerate(values.reshape(-1)):
                file = Path(folder, f"{name} {number + 1}")
                file.write_bytes(_file_bytes(_bytes(value)))
                opened.append(open_picture(file))
        return opened

    def keep(self) -> Keep | None:
        """Share of the visual tokens to keep; the bundle's when left out."""
        ratio = self.number("keep")
        if ratio is None:
            return None
        # the shortest decimal that is this float32: 0.1 means one tenth
        return Keep(ratio=float(str(np.float32(ratio))))

    def sampling(self) -> Sampling | None:
        """How to draw tokens; greedy when nothing is said of it."""
        temperature, top_p, top_k = map(self.number, ("temperature", "top_p", "top_k"))
        if temperature is None and top_p is None and top_k is None:
            return None
        return Sampling(
            temperature=1.0 if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,
            top_k=int(top_k or 0),
            seed=int(self.number("seed") or 0),
        )

    def _values(self, name: str) -> Any:
        triton = server()
        tensor = triton.get_input_tensor_by_name(self._request, name)
        return None if tensor is None else tensor.as_numpy()


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _file_bytes(value: bytes) -> bytes:
    """A picture's file: as it is, or out of base64, which is how JSON carries it."""
    text = value.partition(b",")[2] if value.startswith(b"data:") else value
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return value  # PNG and JPEG files hold bytes that base64 never has


def _response(*, text: str, generation: Generation | None = None) -> Any:
    """One response. All outputs are there; before the last one only text is known."""
    triton = server()
    outputs = {
        "text": np.array([text.encode()], dtype=np.object_),
        "token_ids": np.array(generation.token_ids if generation else (), dtype=np.int64),
        "kept_index": np.array(generation.kept_index if generation else (), dtype=np.int64),
        "finish_reason": np.array(
            [generation.finish.value.encode() if generation else b""], dtype=np.object_
        ),
    }
    return triton.InferenceResponse(
        output_tensors=[triton.Tensor(name, values) for name, values in outputs.items()]
    )


def _refusal(told: str, code: int) -> Any:
    triton = server()
    return triton.InferenceResponse(output_tensors=[], error=triton.TritonError(told, code))
