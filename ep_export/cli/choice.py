"""From the policy options to a `PolicyRequest`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ep_export.policy import Budget, Select, Source

if TYPE_CHECKING:
    from ep_export.calibrate.choose import PolicyRequest

__all__ = ["policy_request"]


def policy_request(options: Mapping[str, Any]) -> PolicyRequest:
    """What `options.policy_options` collected, typed."""
    from ep_export.calibrate.choose import PolicyRequest

    select, source = options["select"], options["source"]
    return PolicyRequest(
        name=options["policy_name"],
        layer=options["layer"],
        select=Select(select) if select else None,
        source=Source(source) if source else None,
        budget=Budget(options["budget"]),
        record=options["calibration"],
    )
