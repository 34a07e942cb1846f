"""The rules of the house: how the package is imported, who may import whom, sizes, names, links.

Nothing here runs a model. Each rule is a small function that returns what breaks it, in words.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ("quant", "model_loaders", "sampling")
# Each part and the parts below it that it may import; a part may always import itself.
MAY_IMPORT = {
    "": {"nodes"},
    "quant": set(),
    "model_loaders": {"quant"},
    "sampling": {"model_loaders", "quant"},
    "nodes": {*ENGINE},
    "host": {"nodes", *ENGINE},
    "training": {"benchmarks", *ENGINE},
    "benchmarks": {"host", "training", *ENGINE},
}
COMFYUI = {"comfy_extras", "comfy_execution", "execution", "folder_paths", "latent_preview"} | {
    "node_helpers", "nodes", "server",
}  # fmt: skip
BRIDGE = ("nodes/comfy_bridge.py", "nodes/comfy_codecs.py")  # all that knows ComfyUI itself
NETWORK = {"aiohttp", "http", "httpx", "huggingface_hub", "requests", "socket", "urllib"}
ORACLES = {"diffusers", "pytest", "skimage"}
SLOW_TO_IMPORT = {"diffusers", "transformers"}
LINES, LINES_HARD = 400, 450
FUNCTION, FUNCTION_HARD = 60, 90
ARGUMENTS, ARGUMENTS_HARD = 8, 10


def tracked(*suffixes: str) -> list[Path]:
    """Files of the repository relative to its root, new ones too. No suffix means all."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    listed = None
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(command, capture_output=True, text=True)
    if listed and listed.returncode == 0:
        files = [Path(name) for name in listed.stdout.split("\0") if name]
    else:  # an unpacked archive, or a checkout that git distrusts
        skip = re.compile(
            r"(^|/)(\.(?!ci/|gitignore|comfyignore)|build/|__pycache__|[^/]*egg-info)"
        )
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        files = [path for path in found if not skip.search(path.as_posix())]
    wanted = (f for f in files if not suffixes or f.suffix in suffixes)
    return sorted(f for f in wanted if (ROOT / f).is_file())


def part_of(file: Path) -> str:
    return file.parts[0] if len(file.parts) > 1 else ""


PACKAGE = [f for f in tracked(".py") if part_of(f) in MAY_IMPORT and f.name != "setup.py"]


def run(code: str, *arguments: object, cwd: Path) -> str:
    """Run `code` in a fresh interpreter outside the repository; its stdout, or fail with stderr.

    With an environment of its own: pytest imports the root's __init__.py too, and a variable that
    this sets would be inherited and so go unnoticed.
    """
    command = [sys.executable, "-I", "-B", "-c", code, *map(str, arguments)]
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
    done = subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- importing ---------------------------------------------------------------------------------

# How ComfyUI loads a pack (nodes.py, load_custom_node): the module's name is the folder's path.
BY_PATH = """
import importlib.util, sys
def load(folder):
    spec = importlib.util.spec_from_file_location(folder, folder + "/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[folder] = module
    spec.loader.exec_module(module)
    return module
"""

MEASURE = """
import json, logging, os, sys, time
opened = []
sys.addaudithook(lambda event, _: opened.append(event) if event.startswith("socket.") else None)
def world():
    root = logging.getLogger()
    hooks = sys.meta_path, sys.path_hooks
    return repr((sys.path, dict(os.environ), root.handlers, root.level, hooks))
before, modules, start = world(), set(sys.modules), time.process_time()
pack = load(sys.argv[1]) if len(sys.argv) > 1 else __import__("seedling")
cost = time.process_time() - start
print(json.dumps({
    "cost": cost, "opened": opened, "same": before == world(), "web": pack.WEB_DIRECTORY,
    "entry": hasattr(pack, "comfy_entrypoint"), "legacy": hasattr(pack, "NODE_CLASS_MAPPINGS"),
    "new": sorted({name.partition(".")[0] for name in set(sys.modules) - modules}),
}))
"""


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """The repository as a custom node whose folder is no Python identifier."""
    folder = tmp_path / "custom_nodes" / "seed-pack"
    folder.parent.mkdir()
    folder.symlink_to(ROOT, target_is_directory=True)
    return folder


@pytest.mark.parametrize("way", ["package", "path"])
def test_import_is_free(way: str, tmp_path: Path, pack: Path) -> None:
    """Rule: importing costs < 0.3 s of CPU, opens no socket, changes no global, loads no torch."""
    arguments = [pack] if way == "path" else []
    seen = [json.loads(run(BY_PATH + MEASURE, *arguments, cwd=tmp_path)) for _ in range(3)]
    assert min(s["cost"] for s in seen) < 0.3
    assert seen[0]["same"], (
        "importing changed sys.path, os.environ, the root logger or an import hook"
    )
    assert seen[0]["opened"] == []
    outside = set(seen[0]["new"]) - set(sys.stdlib_module_names) - {"seedling", str(pack)}
    assert not outside, f"importing the package loaded {sorted(outside)}"
    assert not seen[0]["entry"], "without ComfyUI there is nothing to enter"
    assert not seen[0]["legacy"], "NODE_CLASS_MAPPINGS would make ComfyUI skip comfy_entrypoint"
    assert seen[0]["web"] == "./web"


def test_inside_comfyui_nodes_stay_apart_and_errors_show(tmp_path: Path) -> None:
    """With a comfy_api the entry point appears, `nodes` stays ComfyUI's, a broken node is heard."""
    comfy, pack = tmp_path / "comfy", tmp_path / "custom_nodes" / "seed-pack"
    (comfy / "comfy_api").mkdir(parents=True)
    (comfy / "comfy_api" / "__init__.py").touch()
    (comfy / "nodes.py").write_text("OWNER = 'ComfyUI'\n")
    (pack / "nodes").mkdir(parents=True)
    shutil.copy(ROOT / "__init__.py", pack)
    (pack / "nodes" / "load.py").write_text("import nodes as comfy_nodes\n")
    ours = pack / "nodes" / "__init__.py"
    enter = BY_PATH + "sys.path.insert(0, sys.argv[2]); pack = load(sys.argv[1])\n"

    ours.write_text(
        "from .load import comfy_nodes\ndef comfy_entrypoint(): return comfy_nodes.OWNER\n"
    )
    assert run(enter + "print(pack.comfy_entrypoint())", pack, comfy, cwd=tmp_path) == "ComfyUI\n"

    ours.write_text("raise RuntimeError('broken node')\n")
    with pytest.raises(AssertionError, match="RuntimeError: broken node"):
        run(enter, pack, comfy, cwd=tmp_path)


def test_engine_imports_under_a_path_as_its_name(tmp_path: Path, pack: Path) -> None:
    """Every engine module loads in a package called `/somewhere/seed-pack`, and needs no node."""
    names = [".".join(("", *f.with_suffix("").parts)) for f in PACKAGE if part_of(f) in ENGINE]
    names = [name.removesuffix(".__init__") for name in names]
    code = (
        "import importlib, json\nload(sys.argv[1])\n"
        "for name in json.loads(sys.argv[2]): importlib.import_module(name, sys.argv[1])\n"
        "print({'seedling', 'aiohttp', 'comfy_api', 'nodes'} & set(sys.modules))"
    )
    assert run(BY_PATH + code, pack, json.dumps(names), cwd=tmp_path) == "set()\n"


# ---- layers ------------------------------------------------------------------------------------


def imports(file: Path) -> Iterator[tuple[int, str, int, bool]]:
    """(line, dotted name, relative level, runs at import time) of each import in a file."""

    def visit(node: ast.AST, eager: bool) -> Iterator[tuple[int, str, int, bool]]:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = ".".join(filter(None, (node.module, alias.name)))
                yield node.lineno, name, node.level, eager
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, eager)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, eager and not inside)

    yield from visit(ast.parse((ROOT / file).read_text(encoding="utf-8")), True)


def own_fault(file: Path, name: str, level: int) -> str | None:
    """What is wrong with importing `name` from `level` packages up, all inside our package."""
    base = list(file.parent.parts)
    if level - 1 > len(base):
        return "reaches above the package"
    target = base[: len(base) - level + 1] + name.split(".")
    part, other = part_of(file), target[0] if target[0] in MAY_IMPORT else ""
    if other and other != part and other not in MAY_IMPORT[part]:
        return f"{part or 'the top'}/ may not import {other}/"
    family = target[2:3] if target[:2] == ["model_loaders", "families"] else []
    is_family = family and (ROOT / "model_loaders" / "families" / family[0]).is_dir()
    if is_family and part not in ("training", "benchmarks"):
        if file.parts[:2] != ("model_loaders", "families"):
            return f"names the family {family[0]}; ask the registry instead"
    return None


def foreign_fault(file: Path, name: str, eager: bool) -> str | None:
    """What is wrong with importing the absolute `name` in this file, the usual suspects only."""
    part, top = part_of(file), name.partition(".")[0]
    if top == "seedling":
        return (
            "imports itself by name; ComfyUI gives the package another one, use a relative import"
        )
    if top == "comfy":
        if file.as_posix() not in BRIDGE:
            return f"only {' and '.join(BRIDGE)} may import comfy"
        return "comfy is imported inside functions" if eager else None
    if top in COMFYUI | {"comfy_api"}:
        return None if part == "nodes" else f"only nodes/ may import ComfyUI's {top}"
    if top in NETWORK and name != "urllib.parse" and not name.startswith("urllib.parse."):
        return None if part == "host" else f"only host/ may import {top}"
    if top in ORACLES and part not in ("training", "benchmarks"):
        return f"{top} is for tests and benchmarks"
    if top in SLOW_TO_IMPORT and eager and part not in ("training", "benchmarks"):
        return f"{top} is imported inside functions: it takes seconds"
    return None


@pytest.mark.parametrize("file", PACKAGE, ids=str)
def test_imports_run_downwards(file: Path) -> None:
    faults = []
    for line, name, level, eager in imports(file):
        fault = own_fault(file, name, level) if level else foreign_fault(file, name, eager)
        if fault:
            faults.append(f"{file}:{line}: {name}: {fault}")
    assert not faults, "\n".join(faults)


def test_the_layer_rule_bites() -> None:
    """The checks above, on imports that must be refused and on their harmless neighbours."""
    dit = Path("model_loaders/families/x/dit.py")
    assert own_fault(dit, "sampling.noise", 4)
    assert own_fault(dit, "anything", 5)
    assert own_fault(dit, "quant.operations", 4) is None
    assert own_fault(Path("quant/operations.py"), "model_loaders", 2)
    assert own_fault(Path("host/cli.py"), "training", 2)
    assert own_fault(Path("__init__.py"), "nodes.comfy_entrypoint", 1) is None
    assert foreign_fault(dit, "seedling.quant", True)
    assert foreign_fault(dit, "comfy_api.latest", False)
    assert foreign_fault(dit, "urllib.request", False)
    assert foreign_fault(dit, "urllib.parse", True) is None
    assert foreign_fault(dit, "transformers", True)
    assert foreign_fault(dit, "transformers", False) is None
    for bridge in map(Path, BRIDGE):
        assert foreign_fault(bridge, "comfy.sd", True)
        assert foreign_fault(bridge, "comfy.sd", False) is None
    assert foreign_fault(Path("nodes/loaders.py"), "comfy.sd", False)


# ---- sizes -------------------------------------------------------------------------------------


def judge(sizes: list[tuple[str, int]], soft: int, hard: int) -> None:
    """Warn above `soft`, fail above `hard`."""
    for place, size in sizes:
        if soft < size <= hard:
            warnings.warn(f"{place}: {size}, the house keeps to {soft}", stacklevel=2)
    too_much = [f"{place}: {size}, at most {hard}" for place, size in sizes if size > hard]
    assert not too_much, "\n".join(too_much)


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for file in tracked(".py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file}:{node.lineno} {node.name}", node


def test_files_are_short() -> None:
    files = tracked(".py", ".js", ".css")
    counts = [(str(f), len((ROOT / f).read_text(encoding="utf-8").splitlines())) for f in files]
    judge(counts, LINES, LINES_HARD)


def test_functions_are_short() -> None:
    sizes = [(place, (node.end_lineno or 0) - node.lineno + 1) for place, node in functions()]
    judge(sizes, FUNCTION, FUNCTION_HARD)


def test_argument_lists_are_short() -> None:
    counts = []
    for place, node in functions():
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        counts.append((place, len([a for a in given if a.arg not in ("self", "cls")])))
    judge(counts, ARGUMENTS, ARGUMENTS_HARD)


# ---- names and links ---------------------------------------------------------------------------

TEXT = (
    ".cfg",
    ".css",
    ".html",
    ".js",
    ".json",
    ".md",
    ".py",
    ".sh",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
)
MACHINE_PATH = re.compile(r"(?<![\w.~*)\]}])/(?:home|root|work|Users|mnt)/\w|\b[A-Z]:\\\\?Users")


def test_no_file_names_a_machine() -> None:
    faults = []
    for file in [*tracked(*TEXT), Path("Makefile"), Path(".ci/run")]:
        for number, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), 1):
            if found := MACHINE_PATH.search(line):
                faults.append(f"{file}:{number}: {found.group()}…")
    assert not faults, "\n".join(faults)


def test_the_changelog_knows_the_version() -> None:
    """tomllib needs Python 3.11 and we promise 3.10, hence the expression."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    entry = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version and entry and version[1] == entry[1]


def slugs(text: str) -> set[str]:
    """The anchors that a Markdown page offers: GitHub's rule, good enough for plain headings."""
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", tracked(".md"), ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(
        r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL
    )
    links = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(
        r"""(?:src|href)=["']([^"']+)""", text
    )
    faults = []
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (ROOT / page).parent / path.replace("%20", " ") if path else ROOT / page
        if not target.exists():
            faults.append(f"{page}: {link} leads nowhere")
        elif anchor and target.suffix == ".md" and anchor not in slugs(target.read_text()):
            faults.append(f"{page}: {link}: no such heading")
    assert not faults, "\n".join(faults)


# ---- packaging ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_wheel_is_complete(tmp_path: Path) -> None:
    """What pip installs holds every module and every file that a run needs, and no test."""
    import zipfile

    source = tmp_path / "source"
    for file in tracked():
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, source / file)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "-q", "."]
    done = subprocess.run(
        [*command, "--no-build-isolation", "-w", str(tmp_path)],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("seedling/")}
    data = ("assets", "example_workflows", "locales", "subgraphs", "web")
    needed = PACKAGE + [file for file in tracked() if part_of(file) in data]
    missing = [str(f) for f in needed if f"seedling/{f.as_posix()}" not in inside]
    assert not missing, f"not in the wheel: {missing}"
    assert not [name for name in inside if "/tests/" in name or name.endswith("/setup.py")]
