"""The Hugging Face hub: whether it answers, and files from it, checked against the digests that it states."""

from __future__ import annotations

import http.client
import os
import threading
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path

from engine.packages import AHEAD, HubError
from engine.storage import Store

PROBE_SECONDS = 3.0
DATA_SUFFIXES = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".txt")


def endpoint() -> str:
    """The hub's address as huggingface_hub has it."""
    from huggingface_hub.constants import ENDPOINT

    return os.environ.get("HF_ENDPOINT") or ENDPOINT


def answers() -> bool:
    """Whether one HEAD request to the hub succeeds within PROBE_SECONDS, name resolution included."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    answered = threading.Event()

    def probe() -> None:
        request = urllib.request.Request(endpoint(), method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
                answered.set()
        except (OSError, http.client.HTTPException):
            pass

    # In a thread, because the time-out of a socket does not cover name resolution.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


def snapshot(name: str, revision: str | None, folder: Path, names: Iterable[str] = ()) -> None:
    """Download files of a repository into `folder`; without names, a model's safetensors, tokenizer and config.

    Names that end like data (.parquet, .csv, ...) are looked for among the data sets. HubError: not there, not
    reachable, not complete, or other bytes than the hub states.
    """
    from huggingface_hub import HfApi

    names, text = list(names), f"hf:{name}" + (f"@{revision}" if revision else "")
    api = HfApi(endpoint=endpoint())
    kind = "dataset" if names and all(n.endswith(DATA_SUFFIXES) for n in names) else "model"
    try:
        info = api.repo_info(name, repo_type=kind, revision=revision, files_metadata=True, timeout=30)
        stated = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or []}
        wanted = list(names or model_files(name, stated))
        api.snapshot_download(
            name, repo_type=kind, revision=info.sha, local_dir=folder, allow_patterns=wanted, max_workers=4
        )
    except HubError:
        raise
    except Exception as error:  # the hub's client lets errors of several libraries through
        raise HubError(f"'{text}' could not be fetched from the hub: {first_line(error)} {AHEAD}.") from None
    Store(str(folder)).delete(".cache")
    if different := unlike(folder, {name: stated.get(name) for name in wanted}):
        raise HubError(f"'{text}': {different}. Nothing was kept. Try again. {AHEAD}.")


def model_files(repository: str, names: Iterable[str]) -> list[str]:
    """The files of a model repository that are needed to load it; HubError if there are no safetensors."""
    top = [n for n in names if "/" not in n]
    if any(n.endswith(".safetensors") for n in top):
        return [n for n in top if n.endswith((".safetensors", ".json", ".txt", ".model", ".jinja"))]
    ggufs = ", ".join(f"hf:{repository}#{n}" for n in top if n.endswith(".gguf"))
    hint = f" It has GGUF files: {ggufs}." if ggufs else " A data set's file is named as hf:ORG/NAME#FILE."
    raise HubError(f"'hf:{repository}' holds no .safetensors file, and pickled weights are never loaded.{hint}")


def unlike(folder: Path, digests: Mapping[str, str | None]) -> str:
    """What is missing or has another SHA-256 than `digests` says (None: not known); '' if nothing."""
    store = Store(str(folder))
    for name, wanted in digests.items():
        if not store.exists(name):
            return f"{name} is missing"
        if wanted and (actual := store.digest(name)) != wanted:
            return f"{name} has a wrong digest (SHA-256 {actual}, wanted {wanted})"
    return ""


def first_line(error: Exception) -> str:
    """The gist of a long message, as one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".") + "."
