"""Bundles and sessions that engines of these tests stand on."""

from pathlib import Path

import pytest
from bundles import export_tiny, two_cuts
from tiny_llava import make_tiny_llava

from ep_export.bundle import Dialect
from ep_export.policy import MaxMin, Nothing, Random, Scorer, Select, TopK
from ep_export.runtime import Session

READER = Path(__file__).parents[1] / "fixtures" / "digit-reader"


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    """The shipped model: mRoPE, one cut, caches of fixed capacity, policies of several kinds."""
    bundle = export_tiny(
        READER,
        tmp_path_factory.mktemp("reader") / "bundle",
        layer=1,
        keep=0.25,
        dialect=Dialect.ONNXRUNTIME,
        policies=(MaxMin(), Random(3), TopK(Scorer.NORM, Select.LOWEST)),
    )
    with Session.open(bundle, threads=1) as session:
        yield session


@pytest.fixture(scope="session")
def twice(tiny_checkpoint, tmp_path_factory):
    """A random Qwen2.5-VL: mRoPE, two cuts, repetition penalty."""
    bundle = export_tiny(
        tiny_checkpoint,
        tmp_path_factory.mktemp("twice") / "bundle",
        schedule=two_cuts(1, 3),
        keep=0.6,
        dialect=Dialect.ONNXRUNTIME,
        policies=(MaxMin(), Nothing()),
    )
    with Session.open(bundle, threads=1) as session:
        yield session


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """A random LLaVA: one axis of positions, one cut."""
    return _llava(tmp_path_factory, Dialect.ONNXRUNTIME)


@pytest.fixture(scope="session")
def growing(tmp_path_factory):
    """The same with caches that grow, decoded one by one."""
    return _llava(tmp_path_factory, Dialect.PORTABLE)


def _llava(tmp_path_factory, dialect):
    folder = tmp_path_factory.mktemp("llava")
    checkpoint = make_tiny_llava(folder / "checkpoint")
    bundle = export_tiny(checkpoint, folder / "bundle", layer=2, dialect=dialect, policies=(MaxMin(),))
    return Session.open(bundle, threads=1)
