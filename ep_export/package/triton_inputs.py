"""The inputs of a request inside Triton's Python backend, read with distrust."""

from __future__ import annotations

import base64
import binascii
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ep_export.errors import UserError
from ep_export.families.base import Video, Visual
from ep_export.policy import Keep
from ep_export.runtime import Sampling, read_picture

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["RequestInputs", "server"]

_FPS = 1.0  # of frames that say nothing


def server() -> Any:
    """What Triton's Python backend gives a model to talk with; there is no such module anywhere else."""
    import triton_python_backend_utils  # type: ignore[import-not-found]

    return triton_python_backend_utils


class RequestInputs:
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
        return [
            read_picture(_file_bytes(_bytes(value)), name=f"{name} {number}")
            for number, value in enumerate(values.reshape(-1), 1)
        ]

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
