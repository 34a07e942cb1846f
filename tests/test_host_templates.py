"""What the studio says of templates and blueprints, and where it sends a first visit."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
PERSON = {"Accept": "text/html,application/xhtml+xml"}
WELCOME = "/?template=Text-to-Image&source=default"
TUTORIAL = "/api/settings/Comfy.TutorialCompleted"
needs_page = pytest.mark.skipif(
    not find_spec("comfyui_frontend_package"), reason="comfyui-frontend-package is not installed"
)


# ---- templates and blueprints ------------------------------------------------------------------


def test_templates_are_listed_and_served(host: Any) -> None:
    """As "Getting Started", which is what the page shows to somebody new."""
    (group,) = host.get("/templates/index.json")[1]
    assert (group["title"], group["isEssential"]) == ("Getting Started", True)
    assert [each["name"] for each in group["templates"]] == [path.stem for path in EXAMPLES]
    assert all(len(each["description"]) > 20 for each in group["templates"])
    for path in EXAMPLES:
        name = path.stem.replace(" ", "%20")
        assert host.ask("GET", f"/templates/{name}.json")[2] == path.read_bytes()
        status, headers, data = host.ask("GET", f"/templates/{name}-1.jpg")
        assert (status, headers["content-type"]) == (200, "image/jpeg")
        assert data == path.with_suffix(".jpg").read_bytes()
    assert host.get("/api/workflow_templates")[1] == {}, "they would be listed twice"


def test_dashes_stand_for_spaces_in_a_templates_name(host: Any) -> None:
    """The page's ?template= takes no space."""
    wanted = (ROOT / "example_workflows" / "Text to Image.json").read_bytes()
    assert host.ask("GET", "/templates/Text-to-Image.json")[2] == wanted
    assert host.get("/templates/Text-to-Nothing.json")[0] == 404
    outside = BLUEPRINTS[0].name.replace(" ", "%20")
    assert host.get(f"/templates/..%2Fsubgraphs%2F{outside}")[0] >= 400


def test_blueprints_are_listed_and_served(host: Any) -> None:
    listed = host.get("/api/global_subgraphs")[1]
    assert sorted(entry["name"] for entry in listed.values()) == [p.stem for p in BLUEPRINTS]
    for key, entry in listed.items():
        whole = host.get(f"/api/global_subgraphs/{key}")[1]
        assert whole["data"] == (ROOT / "subgraphs" / f"{entry['name']}.json").read_text("utf-8")
        assert {k: v for k, v in whole.items() if k != "data"} == entry
        assert json.loads(whole["data"])["definitions"]["subgraphs"][0]["name"] == entry["name"]


# ---- the first visit ---------------------------------------------------------------------------


@needs_page
def test_a_first_visit_is_sent_to_text_to_image(host: Any) -> None:
    """Even where another browser has been: the page is told that it does not know this user."""
    host.post(TUTORIAL, True)
    status, headers, _ = host.ask("GET", "/", headers=PERSON)
    assert (status, headers["location"]) == (302, WELCOME)
    assert headers["cache-control"] == "no-store"
    assert host.get(TUTORIAL)[1] is False


@needs_page
def test_a_further_visit_is_left_alone(host: Any) -> None:
    _, headers, _ = host.ask("GET", "/", headers=PERSON)
    cookie = headers["set-cookie"].partition(";")[0]
    host.post(TUTORIAL, True)
    status, headers, data = host.ask("GET", "/", headers=PERSON | {"Cookie": cookie})
    assert status == 200 and b"<html" in data
    assert headers["set-cookie"].startswith(cookie), "the visit does not renew the cookie"
    assert host.get(TUTORIAL)[1] is True


@needs_page
def test_a_cookie_of_another_port_does_not_count(host: Any) -> None:
    """The page keeps its tabs for each port, the browser its cookies for all."""
    cookie = {"Cookie": f"seedling-{host.port + 1}=1"}
    assert host.ask("GET", "/", headers=PERSON | cookie)[0] == 302


@needs_page
@pytest.mark.parametrize(
    ("path", "headers"), [("/", {}), (WELCOME, PERSON), ("/?template=Image-Set", PERSON)]
)
def test_only_the_plain_address_and_only_people_are_sent_on(
    host: Any, path: str, headers: dict[str, str]
) -> None:
    status, _, data = host.ask("GET", path, headers=headers)
    assert status == 200 and b"<html" in data
