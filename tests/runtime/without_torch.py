"""Run as on a machine where torch was never installed. usage: without_torch.py BUNDLE PICTURE|FOLDER"""

import importlib.machinery
import json
import sys
from pathlib import Path

_ABSENT = {"torch", "torchvision", "onnx", "onnxscript", "onnx_ir"}
_find_spec = importlib.machinery.PathFinder.find_spec


def _find(name, path=None, target=None):
    return None if name.split(".")[0] in _ABSENT else _find_spec(name, path, target)


importlib.machinery.PathFinder.find_spec = staticmethod(_find)


def main(bundle, shown):
    from ep_export.bundle import Bundle
    from ep_export.runtime import Session, open_picture, open_video

    path = Path(shown)
    visual = open_video(path) if path.is_dir() else open_picture(path)
    with Session.open(Bundle.open(Path(bundle)), threads=1) as session:
        answer = session.generate([visual], "which digits?", max_new_tokens=5)
    print(json.dumps({"token_ids": answer.token_ids, "loaded": sorted(_ABSENT & set(sys.modules))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
