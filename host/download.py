"""`seedling download NAME`: the files of a published model, into ComfyUI's folders.

The only part of the project that asks another machine, and only when somebody types it. What is
asked is the Hugging Face Hub, through `huggingface_hub` (its address, its tokens). That library
begins every file anew after an interruption, so the bytes are fetched here: a file gets its name
only when its size and its checksum are those that the repository told beforehand; until then it
lies in a folder beside, where the next try goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import os
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..model_loaders.families import FAMILIES
from ..model_loaders.family import Offer, PublishedFile
from .models import ModelsError, models_folder

STAGING = ".seedling-download"  # under models/, so that the last step is a rename
CHUNK = 1 << 20
TRIES, TIMEOUT = 5, 60  # connections in a row that bring nothing; seconds of silence


class DownloadError(ValueError):
    """A download that cannot be done; the message says why, and what to do."""


@dataclass(frozen=True)
class Remote:
    """A file as its repository describes it at one commit."""

    file: PublishedFile
    target: Path
    size: int  # bytes
    checksum: str  # SHA-256, or of a small file git's SHA-1
    address: str  # where the bytes are now

    @property
    def there(self) -> bool:
        return self.target.exists()


def offers() -> dict[str, Offer]:
    """All that can be downloaded, by name."""
    return {offer.name: offer for family in FAMILIES for offer in family.offers}


def run(given: argparse.Namespace, say: Callable[[str], None]) -> int:
    """`given.name` or a list of names; the exit code. Raises DownloadError, ModelsError."""
    known = offers()
    if given.name is None:
        say(listing(known))
        return 0
    if given.name not in known:
        raise DownloadError(f"There is no {given.name}; known are {', '.join(known)}.")
    offer, models = known[given.name], models_folder(given.comfyui)
    if models is None:
        raise ModelsError(
            "Where is ComfyUI, into whose folders the files go? Name it with --comfyui DIR or the "
            "variable COMFYUI_DIR."
        )
    hub = library()
    say(terms(offer))
    if not given.accept_licence:
        ask()
    download(offer, models, hub, say)
    return 0


def listing(known: dict[str, Offer]) -> str:
    width = max(map(len, known))
    return "\n".join(
        f"{o.name:<{width}}  {o.title}, {o.licence.name}"
        f"{'' if o.licence.commercial else ', non-commercial'}"
        for o in known.values()
    )


def terms(offer: Offer) -> str:
    """What is about to be fetched, and under which licence."""
    use = "commercial use allowed" if offer.licence.commercial else "non-commercial"
    files = [f"  {f.folder}/{f.name}  ({f.repository})" for f in offer.files]
    return "\n".join(
        [
            offer.title,
            f"{offer.licence.name}, {use}. {offer.licence.notice}",
            f"The licence's text is in the repository {offer.files[0].repository}.",
            *files,
        ]
    )


def ask() -> None:
    """Let the user accept the licence. Raises DownloadError for everything but yes."""
    if not sys.stdin.isatty():
        raise DownloadError("Nobody is here to accept the licence; add --accept-licence.")
    if input("Do you accept this licence? [y/N] ").strip().lower() not in ("y", "yes"):
        raise DownloadError("The licence was not accepted; nothing was downloaded.")


def library() -> Any:
    """huggingface_hub. Raises DownloadError where it is missing."""
    try:
        import huggingface_hub
    except ImportError:
        raise DownloadError(
            "Downloads need huggingface_hub: pip install 'seedling[download]'."
        ) from None
    return huggingface_hub


def download(offer: Offer, models: Path, hub: Any, say: Callable[[str], None]) -> list[Path]:
    """Fetch the files of `offer` that are missing under `models`; the paths of all of them.

    Every file is looked up before the first is fetched. Raises DownloadError.
    """
    remotes = [look_up(file, models / file.folder / file.name, hub) for file in offer.files]
    for remote in remotes:
        if remote.there and remote.target.stat().st_size != remote.size:
            raise DownloadError(
                f"{remote.target} is there and is another file ({remote.target.stat().st_size} "
                f"bytes, published are {remote.size}); move it away or give it another name."
            )
    missing = [remote for remote in remotes if not remote.there]
    need = sum(remote.size for remote in missing)
    free = shutil.disk_usage(models).free
    if need > free:
        raise DownloadError(
            f"{offer.title} needs {need / 1e9:.1f} GB, but {models} has {free / 1e9:.1f} GB free."
        )
    for remote in remotes:
        if remote.there:
            say(f"{remote.target} is there already.")
        else:
            say(f"{remote.file.name}, {remote.size / 1e9:.3g} GB")
            fetch(remote, models / STAGING, hub)
            say(f"{remote.target}")
    staging = models / STAGING
    if staging.is_dir() and not any(staging.iterdir()):  # nothing else is to be continued
        staging.rmdir()
    return [remote.target for remote in remotes]


def look_up(file: PublishedFile, target: Path, hub: Any) -> Remote:
    """What the repository says of `file` now. Raises DownloadError."""
    where = f"{file.repository}/{file.path}"
    seen = asked(
        where, lambda: hub.get_hf_file_metadata(hub.hf_hub_url(file.repository, file.path))
    )
    checksum, hexadecimal = str(seen.etag or ""), set("0123456789abcdef")
    if seen.size is None or len(checksum) not in (40, 64) or set(checksum) - hexadecimal:
        raise DownloadError(f"{where} comes without size and checksum, so it is not fetched.")
    return Remote(file, target, seen.size, checksum, seen.location)


def fetch(remote: Remote, staging: Path, hub: Any) -> None:
    """Fetch one file, or the rest of it, check it and put it in its place.

    The part that is there is named by the checksum, so it goes on only with the same bytes.
    """
    where = f"{remote.file.repository}/{remote.file.path}"
    staging.mkdir(exist_ok=True)
    part, idle = staging / f"{remote.checksum}.part", 0
    while size_of(part) < remote.size or not part.exists():
        before = size_of(part)
        try:
            receive(remote, part, hub)
        except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
            idle = 0 if size_of(part) > before else idle + 1
            if idle == TRIES:
                raise _failed(where, error) from error
            time.sleep(min(2**idle, 30))
            remote = look_up(remote.file, remote.target, hub)  # addresses expire
    size, checksum = size_of(part), checksum_of(part, remote.checksum)
    if (size, checksum) != (remote.size, remote.checksum):
        part.unlink()
        raise DownloadError(
            f"{where} arrived damaged: {size} bytes with the checksum {checksum}, published are "
            f"{remote.size} with {remote.checksum}. It was deleted; run the command again."
        )
    remote.target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, remote.target)


def receive(remote: Remote, part: Path, hub: Any) -> None:
    """Append to `part` what it lacks, as far as the connection lasts."""
    from tqdm import tqdm

    start = size_of(part)
    headers = {"User-Agent": "seedling", "Range": f"bytes={start}-"}
    if urlsplit(remote.address).netloc == urlsplit(hub.hf_hub_url("a/b", "c")).netloc:
        headers |= hub.utils.build_hf_headers()  # the token is for the Hub, not for its stores
    request = urllib.request.Request(remote.address, headers=headers)
    opener = urllib.request.build_opener(_NoRedirect)
    with opener.open(request, timeout=TIMEOUT) as answer:
        if answer.status != 206:
            start = 0
        with (
            part.open("r+b" if start else "wb") as file,
            tqdm(total=remote.size, initial=start, unit="B", unit_scale=True) as bar,
        ):
            file.seek(start)
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if size_of(part) < remote.size:
        raise ConnectionError("the connection ended too early")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The Hub said already where the bytes are; nobody else is told the token."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def checksum_of(path: Path, like: str) -> str:
    """The checksum of a file, of the kind of `like`: SHA-256, or git's SHA-1 of a blob."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(usedforsecurity=False)
    if len(like) == 40:
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def asked(where: str, ask: Callable[[], Any]) -> Any:
    """What the Hub answers. Raises DownloadError, whichever of its errors the library raises."""
    from huggingface_hub import errors

    try:
        return ask()
    except errors.GatedRepoError:
        raise DownloadError(
            f"{where} is given only to those who accepted its licence on the Hub: do that in your "
            "account there, then log in here with `hf auth login`."
        ) from None
    except Exception as error:  # connections fail in the classes of whatever library makes them
        raise _failed(where, error) from error


def _failed(where: str, error: Exception) -> DownloadError:
    why = str(error).strip().partition("\n")[0] or type(error).__name__
    return DownloadError(
        f"{where} cannot be fetched: {why}. What arrived is kept; run the command again."
    )
