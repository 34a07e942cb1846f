"""`folder_paths` as nodes call it, over the folders of a studio."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

from ..paths import LEGACY, MODEL_FOLDERS, MODEL_SUFFIXES, Folders, PathError, annotated_path


def folder_paths(folders: Folders) -> ModuleType:
    """A module with the functions of ComfyUI's `folder_paths` that only read."""

    def get_full_path(folder_name: str, filename: str) -> str | None:
        path = folders.model_path(folder_name, filename)
        return str(path) if path else None

    def get_full_path_or_raise(folder_name: str, filename: str) -> str:
        path = get_full_path(folder_name, filename)
        if path is None:
            raise FileNotFoundError(
                f"There is no {filename!r} among the {folder_name} of this studio."
            )
        return path

    def exists_annotated_filepath(name: str) -> bool:
        try:
            return annotated_path(folders, name).is_file()
        except (FileNotFoundError, PathError):
            return False

    values: dict[str, Any] = {
        "folders": folders,
        "base_path": str(folders.base),
        "models_dir": str(folders.base / "models"),
        "supported_pt_extensions": set(MODEL_SUFFIXES),
        "folder_names_and_paths": {
            kind: ([str(root) for root in folders.model_roots(kind)], set(MODEL_SUFFIXES))
            for kind in MODEL_FOLDERS
        },
        "map_legacy": lambda name: LEGACY.get(name, name),
        "get_folder_paths": lambda kind: [str(root) for root in folders.model_roots(kind)],
        "get_filename_list": folders.model_files,
        "get_full_path": get_full_path,
        "get_full_path_or_raise": get_full_path_or_raise,
        "get_input_directory": lambda: str(folders.of("input")),
        "get_output_directory": lambda: str(folders.of("output")),
        "get_temp_directory": lambda: str(folders.of("temp")),
        "get_user_directory": lambda: str(folders.user),
        "get_annotated_filepath": lambda name, default_dir=None: str(annotated_path(folders, name)),
        "exists_annotated_filepath": exists_annotated_filepath,
    }
    module = ModuleType("folder_paths")
    module.__spec__ = importlib.machinery.ModuleSpec("folder_paths", None)
    vars(module).update(values)
    return module


def studio() -> Folders:
    """The folders of the host that this process belongs to."""
    return sys.modules["folder_paths"].folders
