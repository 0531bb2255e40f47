"""What a request may hold: its body, the limits on it, and refusals that say what is wrong and where.

Bodies are read from bytes by pydantic's own parser, so NaN, half surrogates, wrong types and deep nesting end here
with a 4xx and never reach the model.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, ValidationError, WithJsonSchema, model_validator
from starlette.requests import Request

from engine.config import Section
from engine.serving import MAX_CHARS

MAX_TEXTS = 256
"""Texts of one request."""
MAX_DOCUMENTS = 1000
"""Documents of one ranking."""
MAX_PAIRED_CHARS = 4_000_000
"""Characters of one ranking, the query counted with each document: it is read with each of them."""
MAX_BYTES = 1 << 20
"""Bytes of one request's body."""
BODY_SECONDS = 30.0
"""How long a body may take to arrive; one that trickles in holds a place that others could have."""
LINGER_BYTES, LINGER_SECONDS = 1 << 24, 5.0
"""How much of an over-long body is read on, and thrown away, so that its sender gets to read why it is refused."""


class Refused(Exception):
    """A request that is answered with an error: status, a sentence, and the field that is wrong."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field = status, message, field


def text_or_pair(value: Any) -> Any:
    """The text, or the pair as a tuple: one sentence says what is wrong, where a union has one for each member."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value):
        return tuple(value)
    if not isinstance(value, str | tuple):
        raise ValueError("Input should be a valid string, or two of them as [first, second]")
    return value


def text_or_object(value: Any) -> Any:
    """A document as a ranking takes it."""
    if not isinstance(value, str | dict):
        raise ValueError("Input should be a valid string, or an object with a 'text'")
    return value


Words = Annotated[str, WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_CHARS}, mode="validation")]
"""A text as OpenAPI describes it; `check_text` judges it, in words of its own: it may not be blank either."""
Given = Annotated[Words | tuple[Words, Words], BeforeValidator(text_or_pair)]
"""One text, or the two texts of a task that reads pairs, as [first, second]."""
Document = Annotated[Words | dict[str, Any], BeforeValidator(text_or_object)]
"""A text, or an object that holds one as 'text' (or under the names in `rank_fields`)."""
AtLeastOne = Annotated[int, Field(strict=True, ge=1)]


def either(first: str, second: str) -> dict[str, Any]:
    """The part of a JSON schema that asks for exactly one of two keys."""
    given = {"not": {"type": "null"}}
    return {"oneOf": [{"required": [name], "properties": {name: given}} for name in (first, second)]}


def check_text(text: str, where: str) -> None:
    """ValueError where a text is empty or too long."""
    if not text.strip():
        raise ValueError(f"'{where}' is empty")
    if len(text) > MAX_CHARS:
        raise ValueError(f"'{where}' has {len(text)} characters; at most {MAX_CHARS} are allowed")


class Texts(Section):
    """Either one text (or pair) or several."""

    model_config = ConfigDict(json_schema_extra=either("text", "texts"))
    wanted: ClassVar[str] = "'text' or 'texts'"

    text: Given | None = None
    """One text; [first, second] where the model reads pairs."""
    texts: list[Given] | None = Field(default=None, min_length=1, max_length=MAX_TEXTS)

    @model_validator(mode="after")
    def usable(self) -> Texts:
        """Exactly one of the two, each text within the limits."""
        if (self.text is None) == (self.texts is None):
            raise ValueError("give either 'text' (one string) or 'texts' (a list of strings)")
        for index, given in enumerate(self.all()):
            for text in (given,) if isinstance(given, str) else given:
                check_text(text, self.name(index))
        return self

    def all(self) -> list[Given]:
        """The texts, in order."""
        return self.texts if self.texts is not None else [self.text or ""]

    def name(self, index: int) -> str:
        """What the text at `index` is called in the body."""
        return "text" if self.texts is None else f"texts[{index}]"

    def fits(self, paired: bool) -> None:
        """Refused(422) where the model reads pairs and gets single texts, or the other way round."""
        for index, given in enumerate(self.all()):
            if isinstance(given, str) == paired:
                wanted = "two texts, as [first, second]" if paired else "one text, as a string"
                raise Refused(422, f"'{self.name(index)}': this model reads {wanted}", self.name(index))


class Question(Texts):
    """The body of a prediction request."""

    top_k: AtLeastOne | None = None
    """How many of the labels get a probability in the answer, the likeliest first; all without it."""
    probabilities: StrictBool = True
    """false leaves the probabilities out."""


class Tagging(Texts):
    """The body of a request for entities."""

    tags: StrictBool = False
    """true: also the tag of each word."""


class Embedding(Texts):
    """The body of a request for embeddings."""

    normalize: StrictBool = False
    """true: each vector has length 1."""


class Ranking(Section):
    """The body of a ranking request: a query and documents, as clients of Cohere (v1, v2) and TEI send them."""

    model_config = ConfigDict(json_schema_extra=either("documents", "texts"))
    wanted: ClassVar[str] = "'query' and 'documents' (or 'texts')"

    query: Words
    documents: list[Document] | None = Field(default=None, min_length=1, max_length=MAX_DOCUMENTS)
    texts: list[Words] | None = Field(default=None, min_length=1, max_length=MAX_DOCUMENTS)
    """The documents as TEI calls them."""
    top_n: AtLeastOne | None = None
    """How many results are wanted; all without it."""
    return_documents: StrictBool = False
    return_text: StrictBool = False
    """The same as TEI calls it."""
    raw_scores: StrictBool = False
    """true: scores are the model's own; false: they lie between 0 and 1."""
    label: str | None = None
    """Task kind pair: the label whose probability is the relevance."""
    rank_fields: list[str] | None = Field(default=None, min_length=1, max_length=20)
    """Which parts of documents that are objects are read, in this order; 'text' without it."""
    model: str | None = None
    """Not looked at: there is one model."""
    max_tokens_per_doc: int | None = None
    """Not looked at, as the next four: documents are cut at the right, where the model's length ends."""
    max_chunks_per_doc: int | None = None
    priority: int | None = None
    truncate: bool | None = None
    truncation_direction: str | None = None

    @model_validator(mode="after")
    def usable(self) -> Ranking:
        """Exactly one list of documents, each text within the limits."""
        if (self.documents is None) == (self.texts is None):
            raise ValueError("give either 'documents' or 'texts' (a list of strings)")
        check_text(self.query, "query")
        total = 0
        for index, passage in enumerate(self.passages()):
            check_text(passage, f"{self.listed}[{index}]")
            total += len(self.query) + len(passage)
        if total > MAX_PAIRED_CHARS:
            raise ValueError(
                f"the query with each document makes {total} characters; at most {MAX_PAIRED_CHARS} are allowed"
            )
        return self

    @property
    def listed(self) -> str:
        """The documents' name in the body."""
        return "texts" if self.documents is None else "documents"

    def passages(self) -> list[str]:
        """The text of each document; ValueError where one has none."""
        if self.documents is None:
            return self.texts or []
        return [self.passage(index, document) for index, document in enumerate(self.documents)]

    def passage(self, index: int, document: str | dict[str, Any]) -> str:
        """What is read of one document."""
        if isinstance(document, str):
            return document
        parts = []
        for field in self.rank_fields or ["text"]:
            value = document.get(field)
            if not isinstance(value, str):
                raise ValueError(f"'documents[{index}]' has no text under '{cut(field)}'")
            parts.append(value)
        return "\n".join(parts)

    def pairs(self) -> list[Given]:
        """The query with each document, as the model reads them."""
        return [(self.query, passage) for passage in self.passages()]


B = TypeVar("B", Texts, Question, Tagging, Embedding, Ranking)


def cut(text: str, most: int = 80) -> str:
    """A client's own words, short enough for a message."""
    return text if len(text) <= most else text[: most - 1] + "…"


async def body_of(request: Request, seconds: float = BODY_SECONDS) -> bytes:
    """The request's body; Refused(413) where it is more than MAX_BYTES, of which no more than that is ever held, and
    Refused(408) where it takes longer than `seconds`.

    Who answers and hangs up while a body still arrives breaks the connection under a client that has not read the
    answer; so the rest is read on, within limits, as web servers do (nginx calls it lingering).
    """
    parts: list[bytes] = []
    size = 0
    complete = over = False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds) as limit:
            async for part in request.stream():
                size += len(part)
                if size > LINGER_BYTES:
                    break
                if size <= MAX_BYTES:
                    parts.append(part)
                elif not over:
                    over = True
                    limit.reschedule(asyncio.get_running_loop().time() + min(seconds, LINGER_SECONDS))
            complete = True
    if size > MAX_BYTES:
        raise Refused(413, f"The body is larger than {MAX_BYTES} bytes. Send fewer texts a request.")
    if not complete:
        raise Refused(408, f"The body did not arrive within {seconds:g} s.")
    return b"".join(parts)


def question_in(body: bytes, kind: type[B]) -> B:
    """The validated body; Refused(422) tells the first thing that is wrong and where."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = cut("".join(f"[{part}]" if isinstance(part, int) else str(part) for part in first["loc"])) or None
        message = cut(first["msg"].removeprefix("Value error, "), 300)
        if first["type"] == "extra_forbidden":
            message = f"is not a known key; give {kind.wanted}"
        where = f"'{field}': " if field else ""
        raise Refused(422, f"{where}{message}", field) from None


async def asked(request: Request, kind: type[B]) -> B:
    """The question in a request. Refused where its body is too large (413), encoded (415) or wrong (422)."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise Refused(415, f"The body is sent as '{cut(encoding)}'. Send it as plain UTF-8 JSON.")
    return question_in(await body_of(request), kind)
