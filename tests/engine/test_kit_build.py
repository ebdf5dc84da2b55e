"""build.sh against stand-ins for trtexec, CMake and nvidia-smi: what it calls, refuses and resumes.

No engine is built here: see kit_device.py.
"""

import hashlib
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import onnx_ir as ir
import pytest
from bundles import export_tiny
from kit_device import JETPACK6, JETPACK7, Device, limits_for, make_kit

from ep_export.bundle import Bundle, Dialect, Precision
from ep_export.engine.placement import PruneOn
from ep_export.engine_record import check_engine, check_engine_files, engine_of, read_record
from ep_export.policy import MaxMin, Scorer, TopK
from ep_export.targets import Flavour

PRUNE = "prune_0.paper-highest"
COMPONENTS = ["vision_encoder", "decoder_0", "decoder_1", PRUNE]


@pytest.fixture(scope="module")
def kits(tiny_bundle, tmp_path_factory):
    """Kits that tests copy: by target name."""
    folder = tmp_path_factory.mktemp("kits")
    return {name: make_kit(tiny_bundle, folder / name, target=name) for name in (JETPACK6, JETPACK7)}


@pytest.fixture
def kit(kits, tmp_path):
    return Path(shutil.copytree(kits[JETPACK6], tmp_path / "a kit, moved"))


@pytest.fixture
def device(tmp_path):
    return Device(tmp_path / "device")


def options(call: list[str]) -> dict[str, str]:
    return dict(argument.split("=", 1) for argument in call if "=" in argument)


def built(calls: list[list[str]]) -> list[str]:
    return [
        options(call)["--onnx"].removesuffix(".onnx").removesuffix(".plugin").removesuffix(".settled")
        for call in calls
    ]


def profiles_of(call: list[str]) -> list[dict[str, dict[str, list[int]]]]:
    """Shapes by profile, kind and input, read as trtexec reads them."""
    profiles: list[dict[str, dict[str, list[int]]]] = []
    for argument in call:
        name, _, value = argument.partition("=")
        if name == "--profile":
            assert int(value) == len(profiles)
            profiles.append({})
        elif name in {"--minShapes", "--optShapes", "--maxShapes"}:
            if not profiles:
                profiles.append({})
            pairs = (pair.rsplit(":", 1) for pair in value.split(","))
            profiles[-1][name[2:5]] = {key: [int(n) for n in shape.split("x")] for key, shape in pairs}
    return profiles


def test_every_component_is_compiled_with_shapes_of_its_own_inputs(kit, device):
    result = device.run(kit, "build.sh")
    assert result.returncode == 0, result.stderr
    calls = device.calls()
    assert built(calls) == COMPONENTS
    for name, call in zip(COMPONENTS, calls, strict=True):
        graph = ir.load(kit / options(call)["--onnx"]).graph
        dynamic = {v.name: v.shape for v in graph.inputs if not v.shape.is_static()}
        profiles = profiles_of(call)
        assert len(profiles) == (2 if name.startswith("decoder_") else 1)
        for profile in profiles:
            assert set(profile) == {"min", "opt", "max"}
            for shapes in profile.values():
                assert set(shapes) == set(dynamic)
            for value, shape in dynamic.items():
                low, middle, high = (profile[kind][value] for kind in ("min", "opt", "max"))
                assert len(low) == len(middle) == len(high) == len(shape)
                for axis, a, b, c in zip(shape, low, middle, high, strict=True):
                    assert a <= b <= c
                    if isinstance(axis, int):
                        assert a == b == c == axis


def test_the_largest_shapes_are_the_limits_asked_for(tiny_bundle, tmp_path, device):
    limits = limits_for(tiny_bundle, max_prompt=300, max_kept_tokens=40)
    kit = make_kit(tiny_bundle, tmp_path / "kit", limits=limits)
    device.run(kit, "build.sh")
    calls = dict(zip(COMPONENTS, device.calls(), strict=True))
    prefill, decode = (profile["max"] for profile in profiles_of(calls["decoder_0"]))
    assert prefill["inputs_embeds"][1] == 300
    assert prefill["past_key_values.0.key"][2] == 0
    assert decode["inputs_embeds"][1] == 1
    assert decode["past_key_values.0.key"][2] == 300 + 32 - 1
    (prune,) = (profile["max"] for profile in profiles_of(calls[PRUNE]))
    assert prune["hidden"][1] == prune["visual_index"][0] == 300
    assert prune["keep_slots"] == [40]


def test_caches_of_fixed_capacity_are_compiled_with_it_settled(tiny_checkpoint, tmp_path):
    settings = {"dialect": Dialect.MODERN, "precision": Precision.BF16}
    bundle = export_tiny(tiny_checkpoint, tmp_path / "bundle", **settings)
    limits = limits_for(bundle, max_prompt=300, max_batch=3)
    kit = make_kit(bundle, tmp_path / "kit", target=JETPACK7, limits=limits)
    device = Device(tmp_path / "device", tensorrt="110401")
    assert device.run(kit, "build.sh").returncode == 0
    calls = dict(zip(COMPONENTS, device.calls(), strict=True))
    for name in ("decoder_0", "decoder_1"):
        assert options(calls[name])["--onnx"] == f"{name}.settled.onnx"
    prefill, decode = profiles_of(calls["decoder_0"])
    rows = 336  # 300 + 32, a multiple of 16
    assert {shapes["past_key_values.0.key"][2] for shapes in (*prefill.values(), *decode.values())} == {rows}
    assert (prefill["max"]["inputs_embeds"][:2], decode["max"]["inputs_embeds"][:2]) == ([1, 300], [3, 1])
    assert "up to 3 answers" in (kit / "README.md").read_text()
    record = read_record(kit / "engines" / JETPACK7)
    assert (record.limits.capacity, record.limits.max_batch) == (rows, 3)


def test_on_tensorrt_10_3_the_node_has_no_body_and_the_plugin_is_loaded_for_it_alone(kit, device):
    device.run(kit, "build.sh")
    calls = dict(zip(COMPONENTS, device.calls(), strict=True))
    assert options(calls[PRUNE])["--onnx"] == f"{PRUNE}.plugin.onnx"
    assert not ir.load(kit / f"{PRUNE}.plugin.onnx").functions
    library = options(calls[PRUNE])["--dynamicPlugins"]
    assert (kit / library).read_text() == "a stand-in for the plugin\n"
    for name, call in calls.items():
        assert "--stronglyTyped" in call
        assert "--noTF32" in call
        assert "--skipInference" in call
        assert not any("staticPlugins" in argument for argument in call)
        assert (name == PRUNE) == any("dynamicPlugins" in argument for argument in call)


def test_on_tensorrt_11_the_body_stays_and_no_flag_of_old_versions_is_given(kits, tmp_path):
    kit = Path(shutil.copytree(kits[JETPACK7], tmp_path / "kit"))
    device = Device(tmp_path / "device", tensorrt="110401")
    assert device.run(kit, "build.sh").returncode == 0
    calls = dict(zip(COMPONENTS, device.calls(), strict=True))
    assert options(calls[PRUNE])["--onnx"] == f"{PRUNE}.onnx"
    assert ir.load(kit / f"{PRUNE}.onnx").functions
    assert "--dynamicPlugins" in options(calls[PRUNE])
    assert not any("--stronglyTyped" in call for call in calls.values())
    assert read_record(kit / "engines" / JETPACK7).version == "11.4.1"


def test_without_the_plugin_the_body_is_compiled_where_tensorrt_allows_it(kits, kit, device, tmp_path):
    refused = device.run(kit, "build.sh", "--no-plugin")
    assert refused.returncode == 1
    assert "error: --no-plugin needs TensorRT 10.7 or later" in refused.stderr
    modern = Path(shutil.copytree(kits[JETPACK7], tmp_path / "kit"))
    newer = Device(tmp_path / "newer", tensorrt="110401")
    assert newer.run(modern, "build.sh", "--no-plugin").returncode == 0
    assert not any("Plugins" in argument for call in newer.calls() for argument in call)
    assert not newer.cmake_calls()
    record = read_record(modern / "engines" / JETPACK7)
    assert record.plugin is None
    assert not any(engine.plugin for engine in record.components.values())


def test_the_plugin_is_built_from_the_kits_own_sources_for_this_gpu(kit, device):
    device.run(kit, "build.sh")
    configure, build = device.cmake_calls()
    assert "-S plugins" in configure
    assert "-DEP_CUDA_ARCHITECTURES=87" in configure
    assert "-DEP_PLUGIN_TESTS=OFF" in configure
    assert f"-DNVCC={device.folder}/bin/nvcc" in configure
    assert build.startswith("cmake --build build/plugin")
    assert (kit / "plugins" / "entropy_prune" / "plugin.cpp").is_file()


def test_a_plugin_that_was_built_before_can_be_given(kit, device, tmp_path):
    library = tmp_path / "plugin.so"
    library.write_text("another plugin")
    assert device.run(kit, "build.sh", "--plugin", str(library)).returncode == 0
    assert not device.cmake_calls()
    assert (kit / "engines" / JETPACK6 / "libep_entropy_prune.so").read_text() == "another plugin"


def test_the_record_beside_the_engines_is_one_that_ep_export_accepts(kit, device, tiny_bundle):
    device.run(kit, "build.sh")
    directory = kit / "engines" / JETPACK6
    record = read_record(directory)
    opened = Bundle.open(kit)
    check_engine(record, opened, flavour=Flavour.TENSORRT, version="10.3.0", sm="8.7")
    check_engine(record, tiny_bundle, flavour=Flavour.TENSORRT, version="10.3.0", sm="8.7")
    check_engine_files(directory, record)
    library = directory / record.plugin.file
    assert record.plugin.sha256 == hashlib.sha256(library.read_bytes()).hexdigest()
    assert [name for name, engine in record.components.items() if engine.plugin] == [PRUNE]
    assert record.limits == limits_for(tiny_bundle)
    engine = record.components["decoder_1"]
    content = (directory / engine.file).read_bytes()
    assert engine.sha256 == hashlib.sha256(content).hexdigest()
    assert [profile.name for profile in engine.profiles] == ["prefill", "decode"]


def test_a_second_run_builds_nothing_again(kit, device):
    device.run(kit, "build.sh")
    device.calls()
    device.cmake_calls()
    again = device.run(kit, "build.sh")
    assert again.returncode == 0
    assert device.calls() == []
    assert device.cmake_calls() == []
    assert again.stdout.count("built already") == len(COMPONENTS) + 1


def test_what_an_engine_depends_on_makes_it_anew(kit, device):
    device.run(kit, "build.sh")
    device.calls()
    (kit / "engines" / JETPACK6 / "decoder_1.engine").write_text("somebody else's")
    device.run(kit, "build.sh")
    assert built(device.calls()) == ["decoder_1"]
    device.run(kit, "build.sh", "--workspace", "512")
    calls = device.calls()
    assert built(calls) == COMPONENTS
    assert all(options(call)["--memPoolSize"] == "workspace:512" for call in calls)


def test_an_interrupted_build_leaves_no_half_engine_and_goes_on(kit, device):
    engines, half = kit / "engines" / JETPACK6, kit / "engines" / JETPACK6 / "decoder_0.engine.part"
    device.know(kit)
    running = subprocess.Popen(
        [kit / "build.sh"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**device.variables, "STANDIN_SLOW": "decoder_0"},
    )
    # The build itself is what ends the wait: it gets to the half engine, or it has failed.
    while not (half.exists() and half.read_text()):
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate()
    assert running.returncode == 130
    assert "interrupted; what is finished is kept" in said
    assert not list(engines.glob("*.part"))
    assert not (engines / "engine.json").exists()
    assert built(device.calls()) == ["vision_encoder", "decoder_0"]
    assert device.run(kit, "build.sh").returncode == 0
    assert built(device.calls()) == ["decoder_0", "decoder_1", PRUNE]
    assert (engines / "engine.json").is_file()


def test_a_failed_component_is_named_with_what_its_log_means(kit, device):
    result = device.run(kit, "build.sh", STANDIN_FAIL="decoder_1")
    assert result.returncode == 1
    assert "error: trtexec could not compile decoder_1 (exit 1)" in result.stderr
    assert "hint: memory ran out" in result.stderr
    assert not (kit / "engines" / JETPACK6 / "engine.json").exists()


def test_a_trtexec_that_says_nothing_and_writes_nothing_has_failed(kit, device):
    result = device.run(kit, "build.sh", STANDIN_EMPTY="decoder_0")
    assert result.returncode == 1
    assert "could not compile decoder_0" in result.stderr


def test_a_plugin_that_does_not_compile_is_told_with_its_log(kit, device):
    result = device.run(kit, "build.sh", STANDIN_CMAKE_FAIL="1")
    assert result.returncode == 1
    assert "error: no such header" in result.stderr
    assert "error: the plugin could not be built" in result.stderr
    assert device.calls() == []


@pytest.mark.parametrize(
    "name", ["decoder_0.onnx", f"{PRUNE}.plugin.onnx", "weights/model.safetensors", "kit/decoder_1.args"]
)
def test_a_tampered_file_is_refused_by_name_before_anything_runs(kit, device, name):
    file = kit / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    file.write_bytes(content)
    for script in ("build.sh", "verify.sh"):
        result = device.run(kit, script)
        assert result.returncode == 1
        assert f"error: {name} is missing or was changed: its SHA-256 differs" in result.stderr
    assert device.calls() == []


def test_a_file_lost_on_the_way_is_named(kit, device):
    (kit / "decoder_1.onnx").unlink()
    assert "error: decoder_1.onnx is missing or was changed" in device.run(kit, "build.sh").stderr


def test_settings_are_checked_even_when_checksums_are_skipped(kit, device):
    file = kit / "kit" / "settings.sh"
    file.write_text(file.read_text() + "touch /tmp/never\n")
    result = device.run(kit, "build.sh", "--skip-checksums")
    assert result.returncode == 1
    assert "error: kit/settings.sh is missing or was changed" in result.stderr


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"tensorrt": "8601"},
            "error: TensorRT is 8.6.1, this kit is for 10.3 (Jetson AGX Orin 64GB, JetPack 6)",
        ),
        ({"tensorrt": "110401"}, "error: TensorRT is 11.4.1, this kit is for 10.3"),
        ({"compatible": "nvidia,tegra264\0"}, "error: this GPU is SM 11.0, this kit is for SM 8.7"),
        ({"sm": "9.0"}, "error: this GPU is SM 9.0, this kit is for SM 8.7"),
        ({"compatible": ""}, "error: no GPU was found"),
        ({"memory_kib": 100 << 10}, "error: 100 MiB of memory are free, building needs about"),
        ({"machine": "x86_64"}, "error: this machine is x86_64, this kit is for aarch64"),
        ({"environment": {"STANDIN_GPU_FREE": "7"}}, "error: 7 MiB of GPU memory are free"),
    ],
)
def test_a_machine_that_does_not_suit_is_refused_in_one_line(kit, tmp_path, changes, line):
    device = Device(tmp_path / "device", **changes)
    result = device.run(kit, "build.sh")
    assert result.returncode == 1
    errors = [told for told in result.stderr.splitlines() if told.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith(line)
    assert device.calls() == []


def test_force_goes_on_where_a_person_knows_better(kit, tmp_path):
    device = Device(tmp_path / "device", memory_kib=100 << 10, tensorrt="100400")
    result = device.run(kit, "build.sh", "--force")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("forced") == 2
    assert read_record(kit / "engines" / JETPACK6).version == "10.4.0"


def test_a_missing_trtexec_is_named_with_its_package(kit, device):
    (device.folder / "bin" / "trtexec").unlink()
    result = device.run(kit, "build.sh", "--check")
    assert result.returncode == 1
    assert "error: trtexec was not found on PATH" in result.stderr
    assert "sudo apt install nvidia-jetpack" in result.stderr


def test_a_disk_that_is_too_small_is_refused(kit, device):
    device.install(
        "df", "#!/bin/sh\nprintf 'Filesystem 1024-blocks Used Available\\n/dev/x 9 9 5120 1%% /\\n'\n"
    )
    result = device.run(kit, "build.sh")
    assert result.returncode == 1
    assert "error: 5 MiB of disk are free" in result.stderr


def test_check_builds_nothing(kit, device):
    result = device.run(kit, "build.sh", "--check")
    assert result.returncode == 0
    assert "ok     GPU       SM 8.7" in result.stdout
    assert device.calls() == []
    assert not (kit / "engines").exists()


def test_one_component_alone_can_be_compiled(kit, device):
    result = device.run(kit, "build.sh", "--component", "decoder_1")
    assert result.returncode == 0
    assert built(device.calls()) == ["decoder_1"]
    assert "not all components are compiled yet" in result.stdout


@pytest.mark.parametrize("script", ["build.sh", "verify.sh"])
def test_help_and_misuse(kit, device, script):
    assert device.run(kit, script, "--help").stdout.startswith(f"usage: ./{script}")
    misused = device.run(kit, script, "--nonsense")
    assert misused.returncode == 2
    assert misused.stderr.startswith("error: unknown option --nonsense\nhint:")


def test_two_ways_to_have_the_plugin_exclude_each_other(kit, device):
    misused = device.run(kit, "build.sh", "--no-plugin", "--plugin", "plugin.so")
    assert misused.returncode == 2
    assert "exclude each other" in misused.stderr


@pytest.fixture(scope="module")
def divprune_bundle(tmp_path_factory, tiny_checkpoint):
    """DivPrune, and two policies that score beside it."""
    out = tmp_path_factory.mktemp("policies") / "bundle"
    return export_tiny(tiny_checkpoint, out, chooser=MaxMin(), policies=[TopK(), TopK(Scorer.NORM)])


class TestOtherPolicies:
    """A kit with several, with one that scores nothing, and with none on the GPU."""

    def test_the_plugin_is_loaded_for_every_policy_that_scores(self, divprune_bundle, device, tmp_path):
        kit = make_kit(divprune_bundle, tmp_path / "kit", policies=("paper-highest", "norm-highest"))
        assert device.run(kit, "build.sh").returncode == 0
        loaded = {options(call)["--onnx"] for call in device.calls() if "--dynamicPlugins" in options(call)}
        assert loaded == {f"prune_0.{name}-highest.plugin.onnx" for name in ("paper", "norm")}
        record = read_record(kit / "engines" / JETPACK6)
        assert {name for name, engine in record.components.items() if engine.plugin} == {
            "prune_0.paper-highest",
            "prune_0.norm-highest",
        }

    def test_without_a_policy_that_scores_no_plugin_is_built(self, divprune_bundle, device, tmp_path):
        (device.folder / "bin" / "nvcc").unlink()
        kit = make_kit(divprune_bundle, tmp_path / "kit")
        result = device.run(kit, "build.sh")
        assert result.returncode == 0, result.stderr
        assert "ok     plugin    not needed" in result.stdout
        assert not device.cmake_calls()
        assert "prune_0.divprune" in built(device.calls())
        assert read_record(kit / "engines" / JETPACK6).plugin is None

    def test_what_the_cpu_prunes_is_not_compiled_and_recorded(self, divprune_bundle, device, tmp_path):
        kit = make_kit(divprune_bundle, tmp_path / "kit", prune_on=PruneOn.CPU)
        assert device.run(kit, "build.sh").returncode == 0
        assert not [name for name in built(device.calls()) if name.startswith("prune")]
        opened, record = Bundle.open(kit), read_record(kit / "engines" / JETPACK6)
        check_engine(record, opened, flavour=Flavour.TENSORRT, version="10.3.0", sm="8.7")
        assert engine_of(record, opened, opened.manifest.component("prune_0.divprune")) is None
        assert "`prune_0.divprune.onnx` become no engines" in (kit / "README.md").read_text()
        assert json.loads((kit / "kit.json").read_text())["on_cpu"] == ["prune_0.divprune"]


class TestTheStandIn:
    """It refuses what the real trtexec refuses: else a kit's mistakes would show on a device first."""

    @pytest.fixture
    def trtexec(self, kit, device):
        device.know(kit)

        def run(*arguments: str) -> str:
            command = [device.folder / "bin" / "trtexec", *arguments]
            result = subprocess.run(
                command, check=False, capture_output=True, text=True, cwd=kit, env=device.variables
            )
            assert (result.returncode == 0) == ("PASSED" in result.stdout)
            return result.stdout

        return run

    @pytest.fixture
    def arguments(self, kit):
        """Of a span with two profiles, as the kit gives them."""
        return (kit / "kit" / "decoder_0.args").read_text().splitlines()

    def test_what_a_kit_asks_is_accepted(self, trtexec, arguments):
        assert "PASSED" in trtexec("--onnx=decoder_0.onnx", *arguments)

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            (lambda given: [*given, "--fp16Please"], "Unknown option: --fp16Please"),
            (lambda given: [*given, "--memPoolSize=desk:512"], "Unknown memory pool"),
            (lambda given: [*given, "--dynamicPlugins=gone.so"], "Could not load library gone.so"),
            (lambda given: [a for a in given if "profile" not in a], "without --profile are not allowed"),
            (lambda given: [*given, "--profile=1", given[1]], "index cannot be the same"),
            (lambda given: [*given, "--profile=3", given[1]], "missing shape spec at profile index 2"),
            (lambda given: [a.replace("position_ids", "positions") for a in given], 'name "positions"'),
            (lambda given: [a.replace("position_ids:3x1", "position_ids:1x1") for a in given], "invalid"),
            (lambda given: [given[0], given[3], given[2], given[1], *given[4:]], "PASSED"),
            (
                lambda given: [a.replace("minShapes", "m").replace("maxShapes", "minShapes") for a in given],
                "m",
            ),
        ],
    )
    def test_and_what_it_must_not_ask(self, trtexec, arguments, change, complaint):
        said = trtexec("--onnx=decoder_0.onnx", *change(arguments))
        assert complaint in said
        assert ("FAILED" in said) == (complaint != "PASSED")

    def test_a_node_without_its_body_needs_the_plugin(self, kit, trtexec):
        arguments = (kit / "kit" / f"{PRUNE}.args").read_text().splitlines()
        assert "Plugin not found" in trtexec(f"--onnx={PRUNE}.plugin.onnx", *arguments)
        assert "PASSED" in trtexec(f"--onnx={PRUNE}.onnx", *arguments)

    def test_an_input_without_shapes_is_missed(self, trtexec, arguments):
        less = [argument.replace(",position_ids:3x1x1", "") for argument in arguments]
        less = [argument for argument in less if "position_ids" not in argument]
        assert "FAILED" in trtexec("--onnx=decoder_0.onnx", *less)


def test_the_gpu_is_asked_for_in_nvidia_smi_first(kit, tmp_path):
    device = Device(tmp_path / "device", sm="8.7", compatible="")
    assert device.run(kit, "build.sh", "--check").returncode == 0


def test_a_name_with_quotes_stays_a_name(tiny_bundle, tmp_path):
    """What comes from a manifest ends up in a file that bash reads."""
    from ep_export.engine.kit_files import write_settings

    file = tmp_path / "settings.sh"
    hostile = "x'; touch pwned; echo '$(touch pwned) `touch pwned`\n\"end"
    write_settings(file, {"TITLE": hostile, "YES": True, "COUNT": 3})
    shown = subprocess.run(
        ["bash", "-c", f'source \'{file}\'; printf \'%s|%s|%s\' "$TITLE" "$YES" "$COUNT"'],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert shown.stdout == f"{hostile}|1|3"
    assert not (tmp_path / "pwned").exists()


def test_kit_json_says_what_the_kit_is_for(kit, tiny_bundle):
    told = json.loads((kit / "kit.json").read_text())
    assert told["target"] == JETPACK6
    assert told["sm"] == "8.7"
    assert told["tensorrt"] == "10.3"
    assert told["linked"] is True
    assert set(told["profiles"]) == set(COMPONENTS)
