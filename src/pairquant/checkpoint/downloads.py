"""Models that are given by a hub name: downloaded, or found in the hub's cache on this machine."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..support.errors import SourceError, did_you_mean
from .side_files import WEIGHTS

#: What is not downloaded: weights in other formats (pickles above all), or once more in the publisher's own layout.
NOT_DOWNLOADED = (*(p for p in WEIGHTS if p != "*.safetensors"), "consolidated*", "original/*", "onnx/*", "openvino/*")


def download(name: str) -> Path:
    """Return the directory of a model's files, after those that are not in the cache have been downloaded.

    Raises `SourceError` for what is no hub name, and if the hub does not have it or cannot be reached.
    """
    try:
        return Path(snapshot_download(name, ignore_patterns=list(NOT_DOWNLOADED)))
    except HFValidationError as error:
        raise SourceError(f"model {name!r} does not exist{nearby(Path(name), '*')}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(
            f"model {name!r} is no local directory, and cannot be fetched from the hub{nearby(Path(name), '*')}\n  {reason[0]}"
        ) from error


def in_cache(name: str, revision: str | None = None, cache: str | None = None) -> Path:
    """Return the directory in a cache of the hub with what was downloaded of a model, which may not be all of it.

    revision: the branch, tag or commit that is wanted, by default the branch "main", as it was when it was last looked at;
    cache: a directory that is used instead of the hub's own. Raises `SourceError` if nothing was downloaded of the model.
    """
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise SourceError(f"model {name!r} is not in the hub's cache. Download it: `hf download {name}`.") from error


def nearby(path: Path, pattern: str) -> str:
    """Return words that name files beside a path that are called nearly as it is; none if there are none."""
    parent = path.parent
    return did_you_mean(str(path), [str(p) for p in parent.glob(pattern)]) if parent.is_dir() else ""
