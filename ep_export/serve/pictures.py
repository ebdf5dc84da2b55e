"""The pictures of a request, out of data URLs or, where that is allowed, from other machines."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from ep_export.errors import UserError
from ep_export.families.base import Turn
from ep_export.runtime import read_picture
from ep_export.serve.api_error import ApiError
from ep_export.serve.budget import Share
from ep_export.serve.chat_request import ImagePart, Message
from ep_export.serve.fetching import fetch

if TYPE_CHECKING:
    from PIL import Image

    from ep_export.serve.limits import Limits

__all__ = ["Conversations"]

_CHANNELS = 3


class Conversations:
    """Turns messages into turns, pictures opened.

    Args:
        limits: How many pictures, how large, and whether from other machines.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # One request at a time: decoding is what a small request can make expensive, and Pillow's limits are
        # set for the whole process.
        self._decoding = anyio.CapacityLimiter(1)

    async def turns(self, messages: Sequence[Message], share: Share) -> tuple[Turn, ...]:
        """The conversation as the prompt builder takes it.

        Args:
            messages: Of one request.
            share: Its memory.

        Raises:
            ApiError: Too many pictures, one that is none or too large, an address that may not be read, or
                no memory for them.
        """
        if messages[-1].role != "user":
            raise ApiError(
                400,
                f"the last message is of the role {messages[-1].role}, expected user",
                param="messages",
                code="invalid_value",
            )
        places = [
            (f"messages.{i}.content.{j}.image_url", part.image_url.url)
            for i, message in enumerate(messages)
            for j, part in enumerate(message.content)
            if isinstance(part, ImagePart)
        ]
        if len(places) > self._limits.pictures:
            raise ApiError(
                400,
                f"the request has {len(places)} pictures, expected at most {self._limits.pictures}",
                param="messages",
                code="too_many_pictures",
            )
        files = [(place, await self._file(place, url, share)) for place, url in places]
        pictures = iter(await anyio.to_thread.run_sync(self._open, files, share, limiter=self._decoding))
        return tuple(
            Turn(
                "system" if message.role == "developer" else message.role,
                tuple(
                    next(pictures) if isinstance(part, ImagePart) else part.text for part in message.content
                ),
            )
            for message in messages
        )

    async def _file(self, place: str, url: str, share: Share) -> bytes:
        """The bytes an address stands for."""
        if url.startswith("data:"):
            return await anyio.to_thread.run_sync(_decoded, place, url)
        if url.startswith(("http://", "https://")):
            if not self._limits.fetch:
                raise ApiError(
                    400,
                    "pictures are not fetched from addresses by this server (send a data URL, or start it "
                    "with --fetch-images)",
                    param=place,
                    code="fetching_disabled",
                )
            data = await fetch(url, self._limits, param=place)
            share.take(len(data))
            return data
        raise ApiError(
            400,
            "a picture's url begins with data:, http:// or https://",
            param=place,
            code="invalid_image_url",
        )

    def _open(self, files: Sequence[tuple[str, bytes]], share: Share) -> list[Image.Image]:
        """Every picture decoded, within one budget of pixels."""
        left, pictures = self._limits.pixels, []
        for number, (place, data) in enumerate(files, 1):
            try:
                picture = read_picture(data, name=str(number), most_pixels=left)
            except UserError as error:
                told = f"{error} ({error.hint})" if error.hint else str(error)
                raise ApiError(400, told, param=place, code="invalid_image") from error
            left -= picture.width * picture.height
            share.take(_CHANNELS * picture.width * picture.height)
            pictures.append(picture)
        return pictures


def _decoded(place: str, url: str) -> bytes:
    kind, comma, data = url.partition(",")
    if not comma or not kind.endswith(";base64"):
        raise ApiError(
            400, "a data URL reads data:image/png;base64,...", param=place, code="invalid_image_url"
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, f"the data URL is not base64: {error}", param=place, code="invalid_image_url"
        ) from error
