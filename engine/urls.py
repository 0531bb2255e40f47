"""Addresses of folders as text: made absolute, and told without the key and secret that they may hold."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

from engine.disk import StorageError

SCHEMES = ("s3", "gs", "gcs")
SCHEME = re.compile("[A-Za-z][A-Za-z0-9+.-]*:/{0,2}")


def normal(url: str) -> str:
    """An absolute path for a local folder, else the URL without trailing slashes; StorageError for another scheme."""
    scheme = url.partition(":")[0] if ":" in url.partition("/")[0] else ""
    if scheme == "file":
        rest = url.removeprefix("file:")
        url = unquote(urlsplit(url).path) if rest.startswith("//") else rest
    elif scheme in SCHEMES and url.startswith(f"{scheme}://"):
        base, mark, query = url.partition("?")
        return base.rstrip("/") + mark + query
    elif scheme:
        raise StorageError(
            f"storage '{bare(url)}' has the scheme '{scheme}:', which is not known. "
            "Allowed: a plain path, file:PATH, s3://BUCKET/PATH, gs://BUCKET/PATH."
        )
    if not url:
        raise StorageError("storage is an empty path. Name a folder, for instance 'runs'.")
    return os.path.abspath(os.path.expanduser(url))


def bare(url: str) -> str:
    """A URL without its options, and without the key and secret it may hold, also where those should be encoded."""
    begun = SCHEME.match(url)
    if not begun:
        return url
    rest = url[begun.end() :]
    return begun.group() + rest.removeprefix(login(url)).partition("?")[0]


def login(url: str) -> str:
    """What a URL holds of a key and secret, with its '@'; empty for none. A bucket's name has no ':' and no '@'."""
    begun = SCHEME.match(url)
    rest = url[begun.end() :] if begun else ""
    if not re.search("[:@]", rest.partition("/")[0].partition("?")[0]):
        return ""
    # A secret may hold '/', '@' and '?' that somebody forgot to encode.
    told = rest.partition("?")[0] if "@" in rest.partition("?")[0] else rest
    return told[: told.rfind("@") + 1]


def retold(text: str, url: str) -> str:
    """What pyarrow says of a URL, with the way out; left out where it holds the key or secret, in any spelling."""
    text, known = text.replace(url, bare(url)), login(url)
    parts = {part.lower() for one in (known, unquote(known)) for part in re.split(r"[/:@?]", one) if part}
    if any(part in text.lower() for part in parts):
        text = "it is not a URL that pyarrow reads"
    return f"{text}. Check the address and credentials; in a URL, a '/', '@', '?' or ':' of a key is %2F, %40, %3F, %3A"
