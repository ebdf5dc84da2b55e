"""Rows of the embedding table on the host: those of the checkpoint, cast as torch casts them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from ep_export.bundle import Bundle, StoredTable
from ep_export.checkpoint import open_checkpoint
from ep_export.errors import UserError
from ep_export.runtime import Session
from ep_export.runtime.embedding_rows import EmbeddingRows
from ep_export.safetensors_index import read_shard, read_tensor

NAME = "model.language_model.embed_tokens.weight"
IDS = np.array([[0, 7, 7, 303], [12, 1, 299, 2]])


def rows(bundle: Bundle, ids=IDS) -> np.ndarray:
    with EmbeddingRows(bundle, bundle.manifest.embed) as table:
        return table.run({"input_ids": ids})["inputs_embeds"].numpy()


def with_embed(bundle: Bundle, **changes) -> Bundle:
    """The bundle with another embedding component in its manifest."""
    embed = bundle.manifest.embed
    others = tuple(component for component in bundle.manifest.components if component is not embed)
    return Bundle(bundle.path, replace(bundle.manifest, components=(*others, replace(embed, **changes))))


def with_table(bundle: Bundle, **changes) -> Bundle:
    return with_embed(bundle, table=replace(bundle.manifest.embed.table, **changes))


def test_rows_are_the_checkpoints_and_the_graphs(tiny_checkpoint, tiny_bundle):
    ref = open_checkpoint(str(tiny_checkpoint)).tensors[NAME]
    table = tiny_bundle.manifest.embed.table
    assert table == StoredTable(f"weights/{ref.file.name}", ref.offset, ref.dtype, ref.shape)
    got = rows(tiny_bundle)
    assert np.array_equal(got, read_tensor(ref).astype(np.float32)[IDS])
    graph = onnxruntime.InferenceSession(tiny_bundle.file(tiny_bundle.manifest.embed.file))
    assert np.array_equal(got[:1], graph.run(None, {"input_ids": IDS[:1]})[0])


@pytest.mark.parametrize("compute", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_rows_are_cast_as_torch_casts_them(tiny_bundle, tmp_path, stored, compute):
    embed, width = tiny_bundle.manifest.embed, tiny_bundle.manifest.dims.hidden_size
    values = torch.randn(50, width, generator=torch.Generator().manual_seed(0)) * 100
    values[3, :4] = torch.tensor([1e5, -1e9, 1e-9, 0.0])  # some beyond float16
    values = values.to(getattr(torch, stored))
    # an odd number of bytes before the table: it lies where no number of its type may lie
    save_file({"a": torch.zeros(3, dtype=torch.uint8), "table": values}, tmp_path / "shard.safetensors")
    (ref,) = (one for one in read_shard(tmp_path / "shard.safetensors") if one.name == "table")
    bundle = with_embed(
        Bundle(tmp_path, tiny_bundle.manifest),
        table=StoredTable("shard.safetensors", ref.offset, stored, ref.shape),
        outputs=(replace(embed.outputs[0], dtype=compute),),
    )
    ids = np.array([[3, 49, 0]])
    expected = values[torch.from_numpy(ids)].to(getattr(torch, compute))
    got = rows(bundle, ids)
    assert got.dtype == (np.float16 if compute == "float16" else np.float32)  # bfloat16 as float32
    assert np.array_equal(got, expected.float().numpy())


def test_ids_that_name_no_row_are_refused(tiny_bundle):
    for ids in ([[0, 304]], [[-1]]):
        with pytest.raises(UserError, match="expected 0 to 303"):
            rows(tiny_bundle, np.array(ids))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"offset": 1 << 40}, "too short for the embedding table"),
        ({"offset": -8}, "from byte -8 on"),
        ({"shape": (1 << 40, 48)}, "expected rows of"),
        ({"shape": (0, 0)}, "expected rows of"),
        ({"dtype": "int8"}, "no table of floats"),
        ({"file": "weights/none.safetensors"}, "missing or too short"),
        ({"file": "../outside"}, "names a path outside itself"),
    ],
)
def test_a_table_that_does_not_lie_in_the_bundle_is_refused(tiny_bundle, changes, said):
    with pytest.raises(UserError, match=said):
        rows(with_table(tiny_bundle, **changes))


def test_a_bundle_that_does_not_say_where_its_table_lies_opens_the_graph(tiny_bundle):
    older = with_embed(tiny_bundle, table=None)
    with Session.open(tiny_bundle, threads=1) as new, Session.open(older, threads=1) as old:
        feeds = {"input_ids": IDS[:1]}
        ours, theirs = (session.run("embed_tokens", feeds)["inputs_embeds"] for session in (new, old))
    assert np.array_equal(ours, theirs)
