# ruff: noqa: T201 - it talks to the scripts on stderr
"""Say beside the engines what they are: engine.json, which `ep-export run` reads before it loads one.

    write_record.py ENGINES VERSION SM PLUGIN     after a build; PLUGIN is 1 or 0
    write_record.py --check ENGINES               are the engines those the record names?

Python's standard library only.
"""

import hashlib
import json
import pathlib
import sys

TEMPLATE = pathlib.Path(__file__).with_name("record.json")
RECORD = "engine.json"


def write(engines: pathlib.Path, version: str, sm: str, plugin: bool) -> None:
    """Fill in what only the device knows, and put the record into place in one step."""
    record = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    record.update(version=version, sm=sm)
    record["made_by"]["TensorRT"] = version
    for name, component in record["components"].items():
        component.update(content(engines, component), build_seconds=float(stamp(engines, name)))
        component["plugin"] = component["plugin"] and plugin
    if plugin:
        record["plugin"].update(content(engines, record["plugin"]))
    else:
        record["plugin"] = None
    aside = engines / (RECORD + ".part")
    aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    aside.replace(engines / RECORD)


def check(engines: pathlib.Path) -> int:
    """Compare the engines and the plugin with their record."""
    record = json.loads((engines / RECORD).read_text(encoding="utf-8"))
    plugin = [record["plugin"]] if record["plugin"] else []
    for entry in [*record["components"].values(), *plugin]:
        file = engines / entry["file"]
        if not file.is_file() or checksum(file) != entry["sha256"]:
            print(f"error: {file} is missing or was changed since it was built", file=sys.stderr)
            print("hint: ./build.sh builds it again", file=sys.stderr)
            return 1
    return 0


def content(engines: pathlib.Path, entry: dict) -> dict:
    """Checksum and size of the file an entry names."""
    file = engines / entry["file"]
    return {"sha256": checksum(file), "bytes": file.stat().st_size}


def stamp(engines: pathlib.Path, name: str) -> str:
    """Seconds the component took, as build.sh noted them."""
    lines = (engines / ".stamps" / name).read_text(encoding="utf-8").splitlines()
    return next(line.split()[1] for line in lines if line.startswith("seconds "))


def checksum(file: pathlib.Path) -> str:
    """SHA-256, read in blocks: engines are gigabytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()


def main(arguments: list) -> int:
    """See the module."""
    if arguments[0] == "--check":
        return check(pathlib.Path(arguments[1]))
    engines, version, sm, plugin = arguments
    write(pathlib.Path(engines), version, sm, plugin == "1")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
