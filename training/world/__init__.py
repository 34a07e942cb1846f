"""Glyphfarm: a procedural world of shapes with captions, edits, compositions and a checker."""

from .captions import Caption, sample_caption, write
from .checker import EditVerdict, Found, Reading, Verdict, check, check_edit, judge, kept_mask, read
from .compositions import COMPOSITION_KINDS, Composition, sample_composition
from .edits import EDIT_KINDS, Edit, describe, sample_edit
from .parse import parse
from .render import object_map, object_mask, photographs, render
from .requests import ObjectSpec, Relation, Request, sample_request
from .scenes import (
    Background,
    Scene,
    Thing,
    class_ids,
    layout,
    sample_scene,
    split,
)
from .sets import SET_KINDS, Panel, PictureSet, SetVerdict, check_set, opening, sample_set

__all__ = [
    "COMPOSITION_KINDS",
    "EDIT_KINDS",
    "SET_KINDS",
    "Background",
    "Caption",
    "Composition",
    "Edit",
    "EditVerdict",
    "Found",
    "ObjectSpec",
    "Panel",
    "PictureSet",
    "Reading",
    "Relation",
    "Request",
    "Scene",
    "SetVerdict",
    "Thing",
    "Verdict",
    "check",
    "check_edit",
    "check_set",
    "class_ids",
    "describe",
    "judge",
    "kept_mask",
    "layout",
    "object_map",
    "object_mask",
    "opening",
    "parse",
    "photographs",
    "read",
    "render",
    "sample_caption",
    "sample_composition",
    "sample_edit",
    "sample_request",
    "sample_scene",
    "sample_set",
    "split",
    "write",
]
