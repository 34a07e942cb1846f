"""Write example_workflows/*.json and subgraphs/*.json from the API graphs beside this file.

python tests/workflows/make.py                the JSON files
python tests/workflows/make.py --thumbnails   and a picture of each workflow, made by itself
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from canvas import blueprint, workflow
from layouts import BLUEPRINTS, WORKFLOWS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OURS = {"cnr_id": "seedling", "ver": "0.1.0"}  # the first version that runs these graphs
CORE = {"cnr_id": "comfy-core", "ver": "0.33.0"}
REAL = "https://huggingface.co/Comfy-Org/Qwen-Image-2.1/resolve/main"
# What the page offers to download when such a file is chosen and not there: (folder, stem).
MODELS = {
    "SeedlingLoadDiT": ("diffusion_models", "qwen_image_2.1_bf16"),
    "SeedlingLoadEncoder": ("text_encoders", "qwen3vl_8b_bf16"),
    "SeedlingLoadVAE": ("vae", "qwen_image_2.1_vae_bf16"),
}
ASK = """
import json, sys, tempfile
from pathlib import Path
from seedling.host.library import load, object_info
from seedling.host.paths import Folders
folders = Folders(Path(sys.argv[1]))
folders.make()
print(json.dumps(object_info(load(folders))))
"""


def object_info(home: Path) -> dict[str, Any]:
    """What the studio answers to GET /object_info; in a process of its own, for its stand-ins."""
    command = [sys.executable, "-c", ASK, str(home)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=home)
    return json.loads(done.stdout)


def properties(infos: dict[str, Any]) -> dict[str, Any]:
    """For each node type: its pack, the version, and the files that it may want."""
    found: dict[str, Any] = {
        name: dict(OURS if name.startswith("Seedling") else CORE) for name in infos
    }
    for name, (folder, stem) in MODELS.items():
        file = f"{stem}.safetensors"
        url = f"{REAL}/{folder}/{file}"
        found[name]["models"] = [{"name": file, "url": url, "directory": folder}]
    return found


def graph(stem: str) -> dict[str, Any]:
    return json.loads((HERE / f"{stem}.api.json").read_text(encoding="utf-8"))


def documents(infos: dict[str, Any]) -> dict[str, str]:
    """The text of every file, by its path below the repository's root."""
    extra = properties(infos)
    found = {
        f"example_workflows/{title}.json": workflow(title, graph(stem), infos, layout, extra)
        for title, (stem, layout) in WORKFLOWS.items()
    }
    found |= {
        f"subgraphs/{plan.name}.json": blueprint(plan, graph(stem), infos, extra)
        for stem, plan in BLUEPRINTS.items()
    }
    return {
        path: json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        for path, value in found.items()
    }


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--thumbnails", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        infos = object_info(Path(home))
    for path, text in documents(infos).items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
    if given.thumbnails:
        from thumbnails import make_all

        make_all(ROOT)


if __name__ == "__main__":
    main()
