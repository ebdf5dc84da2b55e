"""Thousands of damaged files through the public readers: each works, or says one sentence and a hint.

A traceback, a hang, gigabytes of memory or a message without a hint fails. What is counted is printed.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny_llava
import tiny_llava_onevision
import tiny_smolvlm
import tiny_video_llava
from mutations import Tally, cases, damaged_bytes, damaged_json, damaged_text, sample, seeded, shown
from PIL import Image, PngImagePlugin
from tiny import CHAT_TEMPLATE, make_tiny, tiny_picture, tiny_video

from ep_export.aliases import ALIASES
from ep_export.bundle import MANIFEST, Bundle
from ep_export.calibrate.record import Record, read_calibration
from ep_export.checkpoint import open_checkpoint, open_config
from ep_export.engine_record import RECORD, EngineRecord, read_record
from ep_export.errors import UserError
from ep_export.measure.prompts import read_prompts, read_questions
from ep_export.ownership import first_foreign, is_ours
from ep_export.runtime import open_picture, open_video
from ep_export.safetensors_index import read_tensors
from ep_export.sweep.record import SWEEP_FILE, SweepRecord, read_sweep
from ep_export.targets import read_target

INDEX = "model.safetensors.index.json"


@pytest.fixture
def tally():
    return Tally()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return make_tiny(
        tmp_path_factory.mktemp("attack") / "sharded", layers=1, vision_depth=1, max_shard_size=200_000
    )


def header_of(file):
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def test_safetensors_headers_as_json(sharded, tmp_path, tally, capsys):
    rng = seeded(1)
    for shard in sorted(sharded.glob("*.safetensors")):
        shutil.copy(shard, tmp_path / shard.name)
    shutil.copy(sharded / INDEX, tmp_path / INDEX)
    file = min(tmp_path.glob("*.safetensors"), key=lambda f: f.stat().st_size)
    header, data = header_of(file)
    for _ in range(cases(600)):
        text, what = damaged_json(rng, header)
        raw = text.encode("utf-8", "surrogatepass")
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
        tally.case(what, lambda: read_tensors(tmp_path))
    tally.counted(capsys, least=600)


def test_safetensors_files_as_bytes(sharded, tmp_path, tally, capsys):
    rng = seeded(2)
    source = min(sharded.glob("*.safetensors"), key=lambda f: f.stat().st_size).read_bytes()
    file = tmp_path / "model.safetensors"
    for number in range(cases(600)):
        file.write_bytes(damaged_bytes(rng, source, head=2000))
        tally.case(number, lambda: read_tensors(tmp_path))
    tally.counted(capsys, least=600)


def test_indices(sharded, tmp_path, tally, capsys):
    rng = seeded(3)
    for shard in sharded.glob("*.safetensors"):
        (tmp_path / shard.name).hardlink_to(shard)
    index = json.loads((sharded / INDEX).read_text())
    for _ in range(cases(500)):
        text, what = damaged_json(rng, index)
        (tmp_path / INDEX).write_text(text)
        tally.case(what, lambda: read_tensors(tmp_path))
    tally.counted(capsys, least=500)


FAMILIES = {
    json.loads(alias.config_file.read_text())["model_type"]: alias.config_file for alias in reversed(ALIASES)
}


@pytest.mark.parametrize("family", FAMILIES)
def test_published_configs(family, tmp_path, tally, capsys):
    rng = seeded(family)
    raw = json.loads(FAMILIES[family].read_text())
    for _ in range(cases(250)):
        text, what = damaged_json(rng, raw)
        (tmp_path / "config.json").write_text(text)

        def read():
            opened = open_config(str(tmp_path))
            return opened.family.default_visual_tokens(opened.config)

        tally.case(what, read)
    tally.counted(capsys, least=250)


def test_configs_beside_weights(sharded, tmp_path, tally, capsys):
    rng = seeded(5)
    for file in sharded.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    (tmp_path / "config.json").unlink()
    raw = json.loads((sharded / "config.json").read_text())
    for _ in range(cases(120)):
        text, what = damaged_json(rng, raw)
        (tmp_path / "config.json").write_text(text)
        tally.case(what, lambda: open_checkpoint(str(tmp_path)))
    tally.counted(capsys, least=120)


PROCESSORS = {
    "qwen2_5_vl": lambda path: make_tiny(path, layers=1),
    "llava": tiny_llava.make_tiny_llava,
    "llava_next": tiny_llava.make_tiny_llava_next,
    "llava_onevision": tiny_llava_onevision.make_tiny_llava_onevision,
    "smolvlm": tiny_smolvlm.make_tiny_smolvlm,
    "video_llava": tiny_video_llava.make_tiny_video_llava,
}


@pytest.fixture(scope="module", params=PROCESSORS)
def processor(request, tmp_path_factory):
    """A directory of processor files; its weights are not looked at."""
    path = PROCESSORS[request.param](tmp_path_factory.mktemp("attack") / request.param)
    for shard in path.glob("*.safetensors*"):
        shard.unlink()
    return path


def ask(directory):
    opened = open_config(str(directory))
    builder = opened.family.prompt_builder(directory, opened.config)
    prompt = builder.build([tiny_picture(60, 44)], "What is in this picture?")
    for picture in prompt.pictures:
        opened.family.vision_feeds(picture, opened.config)
    if opened.family.name not in {"llava", "llava_next"}:
        builder.build([tiny_video(60, 44, 3)], "What?")
    return builder.decode([1, 2, 3])


def test_processor_files(processor, tmp_path, tally, capsys):
    rng = seeded(processor.name)
    directory = shutil.copytree(processor, tmp_path / "processor")
    files = sorted(directory.glob("*.json"))
    sources = {file: file.read_text() for file in files}
    ask(directory)
    for _ in range(cases(130)):
        file = rng.choice(files)
        if rng.random() < 0.15:
            text, what = damaged_text(rng, sources[file]), "letters"
        else:
            text, what = damaged_json(rng, json.loads(sources[file]))
        file.write_text(text, errors="surrogatepass")
        tally.case(f"{file.name}: {what}", lambda: ask(directory))
        file.write_text(sources[file])
    tally.counted(capsys, least=130)


def test_chat_templates(tmp_path, monkeypatch, tally, capsys):
    monkeypatch.setattr("ep_export.families.template_limits._MOST_SECONDS", 0.3)
    rng = seeded(7)
    directory = make_tiny(tmp_path / "tiny", layers=1)
    opened = open_config(str(directory))
    builder = opened.family.prompt_builder(directory, opened.config)
    picture = tiny_picture(60, 44)
    for _ in range(cases(400)):
        builder._template = damaged_text(rng, CHAT_TEMPLATE)
        tally.case(builder._template, lambda: builder.build([picture], "What?"))
    tally.counted(capsys, least=400)


def test_manifests(tiny_bundle, tmp_path, tally, capsys):
    rng = seeded(8)
    bundle = shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    raw = json.loads((bundle / MANIFEST).read_text())
    raw["files"] = raw["files"][:8]
    for _ in range(cases(800)):
        text, what = damaged_json(rng, raw)
        (bundle / MANIFEST).write_text(text)
        tally.case(what, lambda: Bundle.open(bundle, verify=False))
        assert isinstance(is_ours(bundle, MANIFEST), bool)
        assert first_foreign(bundle, MANIFEST) is not None  # most files are not named any more
    tally.counted(capsys, least=800)


def test_bundles_that_run(tiny_bundle, tmp_path, tally, capsys):
    """What `run` reads before any graph: manifest, config, processor files."""
    from ep_export.runtime import Session

    rng = seeded(9)
    bundle = shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    manifest = json.loads((bundle / MANIFEST).read_text())
    for _ in range(60):
        text, what = damaged_json(rng, {"dims": manifest["dims"], "schedule": manifest["schedule"]})
        try:
            changed = json.loads(text)
        except (ValueError, RecursionError):  # no JSON at all: what `test_manifests` is for
            continue
        if not isinstance(changed, dict):
            continue
        (bundle / MANIFEST).write_text(json.dumps({**manifest, **changed}))

        def run():
            with Session.open(Bundle.open(bundle, verify=False)) as session:
                session.generate([], "What?", max_new_tokens=1)

        tally.case(what, run)
    tally.counted(capsys, least=30)


def test_engine_records_sweeps_and_calibrations(tmp_path, tally, capsys):
    rng = seeded(10)
    readers = {
        RECORD: (EngineRecord, read_record),
        SWEEP_FILE: (SweepRecord, read_sweep),
        "record.json": (Record, lambda directory: read_calibration(directory / "record.json")),
    }
    for name, (kind, reader) in readers.items():
        raw = sample(kind)
        for _ in range(cases(250)):
            text, what = damaged_json(rng, raw)
            (tmp_path / name).write_text(text)
            tally.case(f"{name}: {what}", lambda reader=reader: reader(tmp_path))
    tally.counted(capsys, least=750)


def test_questions(tmp_path, tally, capsys):
    rng = seeded(11)
    file = tmp_path / "prompts.json"
    sources = (
        ["What?", "Where?"],
        {"a.png": "What?", "b/c.png": ["Where?", {"question": "Who?", "answer": ["a", "b"]}]},
        {"a.png": {"question": "How many?", "answer": "two"}},
    )
    for number in range(cases(900)):
        text, what = damaged_json(rng, sources[number % len(sources)])
        file.write_text(text)
        for reader in (read_prompts, read_questions):
            tally.case(what, lambda reader=reader: reader(file))
    tally.counted(capsys, least=1800)


def test_targets(tmp_path, tally, capsys):
    rng = seeded(12)
    sources = sorted((Path(__file__).parents[2] / "engines" / "targets").glob("*.toml"))
    file = tmp_path / "target.toml"
    for number in range(cases(400)):
        file.write_text(damaged_text(rng, sources[number % len(sources)].read_text()))
        tally.case(number, lambda: read_target(file))
    tally.counted(capsys, least=400)


def pictures():
    """One of every format and manner of storing pixels, small."""
    plain = tiny_picture(40, 32)
    frames = [tiny_picture(20, 16, seed=i) for i in range(4)]
    notes = PngImagePlugin.PngInfo()
    notes.add_text("key", "value" * 20, zip=True)
    notes.add_itxt("key", "value" * 20, zip=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    moving = {"save_all": True, "append_images": frames[1:], "duration": 100}
    deep = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20))
    for picture, kind, options in (
        (plain, "PNG", {"pnginfo": notes}),
        (plain.quantize(8), "PNG", {"transparency": 3}),
        (deep, "PNG", {}),
        (plain, "PNG", {"exif": turned}),
        (plain, "JPEG", {"exif": turned}),
        (plain, "JPEG", {"progressive": True}),
        (plain.convert("CMYK"), "JPEG", {}),
        (plain, "WEBP", {"exif": turned}),
        (plain, "WEBP", {"lossless": True}),
        (plain, "GIF", {}),
        (plain, "BMP", {}),
        (plain, "PPM", {}),
        (plain, "TIFF", {"exif": turned}),
        (plain, "TIFF", {"compression": "tiff_lzw"}),
        (plain, "TIFF", {"compression": "jpeg"}),
        (frames[0], "GIF", moving),
        (frames[0], "PNG", moving),
        (frames[0], "WEBP", moving),
    ):
        stream = io.BytesIO()
        picture.save(stream, kind, **options)
        yield stream.getvalue()


def test_pictures_and_animations(tmp_path, tally, capsys):
    rng = seeded(13)
    file = tmp_path / "picture.png"
    for source in pictures():
        for number in range(cases(120)):
            file.write_bytes(damaged_bytes(rng, source))
            for reader in (open_picture, open_video):
                tally.case(number, lambda reader=reader: reader(file))
    tally.counted(capsys, least=4000)


def test_names_of_files_reach_a_terminal_as_one_line(tmp_path, capsys):
    rng = seeded(14)
    for _ in range(cases(300)):
        name = "".join(
            chr(rng.choice((rng.randrange(1, 0xD800), rng.randrange(1, 64), 0x202E))) for _ in range(20)
        )
        file = tmp_path / name.replace("/", "_")
        with pytest.raises(UserError) as caught:
            open_picture(file)
        lines = shown(caught.value, capsys)
        assert [line.split(":")[0] for line in lines] == ["error", "hint"]
        assert all(line.isprintable() for line in lines)
