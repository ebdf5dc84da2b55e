"""A bundle as other servers want it: a Triton Inference Server model repository."""

from __future__ import annotations

from ep_export.package.triton import REPOSITORY, Repository, write_repository

__all__ = ["REPOSITORY", "Repository", "write_repository"]
