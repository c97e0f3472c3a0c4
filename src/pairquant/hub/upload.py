"""Uploading: what can go wrong is found out before hours of work, by `require_writable`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..checkpoint.files import read_json
from ..checkpoint.read import Checkpoint, ModelFiles
from ..checkpoint.record import REPORT_FILE
from ..support.errors import ConfigError, HubError, SourceError, did_you_mean
from .card import Origin, write_card

#: Left where they are: what a run that was killed has left behind, and hidden files.
IGNORED = (".*", "*.partial")
#: Files that tell where source and calibration text were on this machine.
TELLING = ("config.json", REPORT_FILE)


def require_writable(name: str, private: bool = False) -> str:
    """Return `OWNER/NAME` for `NAME` or `OWNER/NAME`, if the logged-in user may write there.

    Raises `ConfigError` for impossible names, foreign owners, and public repositories if it is to be `private`;
    `HubError` without a token that can write, or without a hub.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"hub name {name!r} is not allowed: {_first_line(error)}") from error
    full_name = _owned(name)
    if private and (found := _model(full_name)) and not found.private:
        raise ConfigError(f"{full_name!r} is there already, and is public. Choose another name, or drop --private.")
    return full_name


def _owned(name: str) -> str:
    """Return the name with its owner: the user, or one of the user's organizations."""
    with _explained("checking who is logged in"):
        user = HfApi().whoami()
    token = user.get("auth", {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError(
            f"the hub token {token.get('displayName', '')!r} may only read. Make one that can write at "
            "https://huggingface.co/settings/tokens and log in with `hf auth login`."
        )
    owner, slash, rest = name.rpartition("/")
    if not slash:
        return f"{user['name']}/{rest}"
    owners = [user["name"], *(org["name"] for org in user.get("orgs", ()) if org.get("roleInOrg") != "read")]
    if owner not in owners:
        raise ConfigError(
            f"hub name {name!r} belongs to {owner!r}, where {user['name']!r} cannot write; allowed: "
            f"{', '.join(owners)}{did_you_mean(owner, owners)}"
        )
    return name


def push(
    model: str | Path,
    name: str,
    *,
    private: bool = False,
    results: str | Path | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """Upload a packed checkpoint with a model card; returns its address.

    name: `NAME` or `OWNER/NAME`, made if it does not exist, public unless `private`. results: a file of
    `pairquant eval --json`. base_model: hub name of the original, by default the source that was quantized if it came
    from the hub; license: by default that model's. A README.md that somebody wrote is kept; the source's
    own stays below the card. Raises `SourceError` if `model` is no directory, `CheckpointError` if it is none of ours, and
    what `require_writable` raises.
    """
    if not Path(model).is_dir():
        raise SourceError(
            f"{str(model)!r} is no directory. What is pushed is a checkpoint that `quantize` has written."
        )
    checkpoint = Checkpoint.open(ModelFiles.find(str(model)))
    full_name = require_writable(name, private)
    base_model = base_model or _source_on_hub(checkpoint)
    origin = Origin(base_model, license or (_license_of(base_model) if base_model else None))
    write_card(checkpoint, full_name, origin, Path(results) if results else None)
    with _explained(f"uploading to {full_name!r}"):
        api = HfApi()
        address = api.create_repo(full_name, private=private or None, exist_ok=True)
        api.create_commit(full_name, _additions(checkpoint.directory), commit_message="Upload by pairquant")
    return str(address)


def _additions(directory: Path) -> list[CommitOperationAdd]:
    """Return every file of the checkpoint, without this machine's paths."""
    additions = []
    for file in sorted(directory.rglob("*")):
        place = file.relative_to(directory)
        if file.is_file() and not any(fnmatch(part, pattern) for part in place.parts for pattern in IGNORED):
            told = str(place) in TELLING
            content = json.dumps(_without_paths(read_json(file)), indent=2).encode() if told else file
            additions.append(CommitOperationAdd(place.as_posix(), content))
    return additions


def _without_paths(content: Any) -> Any:
    """Return Return JSON with absolute paths reduced to their last part."""
    if isinstance(content, dict):
        return {key: _without_paths(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_paths(value) for value in content]
    return Path(content).name if isinstance(content, str) and Path(content).is_absolute() else content


def _source_on_hub(checkpoint: Checkpoint) -> str | None:
    """Return the source's hub name, when it was given by one: `OWNER/NAME` that is not a path on this machine."""
    source = (checkpoint.config.provenance or {}).get("source")
    if not isinstance(source, str) or source.count("/") != 1 or source.endswith(".gguf") or Path(source).exists():
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source


def _license_of(name: str) -> str | None:
    """Return the license that the model's card names; None if there is no such model, or its card names none."""
    found = _model(name)
    return found.card_data.get("license") if found and found.card_data else None


def _model(name: str) -> ModelInfo | None:
    """Return what the hub says of a model; None if there is none, or none that this user may see."""
    with _explained(f"looking up {name!r}"):
        try:
            return HfApi().model_info(name)
        except RepositoryNotFoundError:
            return None


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn the errors of the hub's client into `HubError`; what: the action that failed, as the message begins."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError(f"{what}: no one is logged in. Log in with `hf auth login`, or set HF_TOKEN.") from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{what}: the environment says offline. Unset HF_HUB_OFFLINE.") from error
    except HfHubHTTPError as error:
        raise HubError(f"{what}: the hub refused. {_first_line(error)}") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise HubError(
            f"{what}: the hub cannot be reached ({_first_line(error)}). Check the network, and HF_ENDPOINT."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
