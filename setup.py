"""Names the subpackages: pyproject.toml's `packages.find` cannot put `seedling.` before a name."""

from setuptools import find_namespace_packages, setup

PARTS = ["nodes", "host", "model_loaders", "sampling", "quant", "training", "benchmarks"]

# Namespace packages too: training/ and benchmarks/ hold commands and need no __init__.py.
found = find_namespace_packages(
    include=[pattern for part in PARTS for pattern in (part, f"{part}.*")],
    exclude=["*.__pycache__"],
)
# Its own name, which pip's build does not tell setuptools: else setup.py becomes seedling.setup.
setup(packages=["seedling", *(f"seedling.{name}" for name in found)], script_name="setup.py")
