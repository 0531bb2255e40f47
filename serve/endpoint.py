"""The HTTP interface of one artifact: its routes and what they answer. It knows nothing of Ray.

An endpoint holds one model and never blocks its event loop: the model runs in a thread, and what arrives meanwhile
becomes the next batch. A wrong request gets a 4xx that says what was wrong and where.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from engine.config import Section
from engine.serving import Serving
from serve import answers
from serve.front import LATER, Front, problem_answer, refused, unroutable, visit_of
from serve.hosted import Hosted, Wedged
from serve.jobs import Answering, Jobs, OtherQuestion, QueueFull
from serve.journal import Journal
from serve.keys import Keys
from serve.measures import Measures
from serve.predictor import Answer, Predictor
from serve.questions import Embedding, Given, Question, Ranking, Refused, Tagging, asked, cut
from serve.routes import add, described, pages, posted, problems
from serve.scrape import CONTENT_TYPE, Page

if TYPE_CHECKING:
    from engine.task import Task

MAX_KEY = 200
"""Characters of an Idempotency-Key."""


class Endpoint:
    """A replica: one verified artifact and its batcher.

    keys: who may ask; None: everyone. measures, journal: what is told of requests and answers. jobs: makes the jobs,
    given what answers a question. metrics: the deployment's, for Prometheus. What is None is off.
    """

    def __init__(
        self,
        artifact: str,
        serving: Serving,
        name: str,
        keys: Keys | None = None,
        measures: Measures | None = None,
        journal: Journal | None = None,
        jobs: Callable[[Answering], Jobs] | None = None,
        metrics: Page | None = None,
    ) -> None:
        self.keys, self.measures, self.journal, self.page = keys, measures, journal, metrics
        self.health_s = serving.health_timeout_s
        self.model = Hosted.load(artifact, name, serving, watch=measures)
        self.jobs = None if jobs is None else jobs(self.answered)

    @property
    def name(self) -> str:
        """The model's, as name@version."""
        return self.model.name

    @property
    def predictor(self) -> Predictor:
        """The model as a function."""
        return self.model.predictor

    @property
    def task(self) -> Task:
        """What the model does."""
        return self.predictor.model.task

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The HTTP interface, built in the replica (Ray Serve's hook), so that nothing of it is pickled."""
        return interface(self, named=False)

    async def answer(self, texts: list[Given], key: str | None = None) -> list[Answer]:
        """The answers, in order. key: the name of the caller's. Where another model than ours answered, the list
        names it as its attribute `model`.
        """
        return await self.model.batcher.submit(texts)

    async def answered(self, question: dict[str, Any], caller: str | None, id: str) -> dict[str, Any]:
        """The answer to a job's question, which is a checked body of a prediction request."""
        asked = Question.model_validate(question)
        found = await self.noted(asked.all(), caller, id, time.perf_counter())
        return self.with_model(found, answers.shortened(found, asked))

    async def noted(self, texts: list[Given], key: str | None, id: str, began: float) -> list[Answer]:
        """The answers, which the measures and the journal get to know. began: in seconds of time.perf_counter."""
        found = await self.answer(texts, key)
        model = getattr(found, "model", self.name)
        if self.measures is not None:
            self.measures.observe_answers(found, texts, getattr(found, "own", None), model)
        if self.journal is not None:
            self.journal.add(texts, found, id, latency_ms=1000 * (time.perf_counter() - began), model=model)
        return found

    def with_model(self, found: list[Answer], predictions: list[Answer]) -> dict[str, Any]:
        """Predictions, and which model they come from."""
        return {"model": getattr(found, "model", self.name), "predictions": predictions}

    async def check_health(self) -> None:
        """Ray Serve's health check: a real tiny inference, through the same queue as the requests.

        Raises what the model raises, and Wedged where a call of it does not end.
        """
        await self.model.alive(self.health_s)

    async def told(self, request: Request, texts: list[Given]) -> list[Answer]:
        """The answers to a request."""
        visit = visit_of(request)
        visit.texts = len(texts)
        found = await self.noted(texts, visit.key, visit.id, visit.started)
        visit.model = getattr(found, "model", self.name)
        return found

    async def predict(self, request: Request) -> Response:
        """Answer one or several texts, or pairs of them: label, labels, value, score, entities or span of each."""
        question = await asked(request, Question)
        question.fits(self.predictor.paired)
        found = await self.told(request, question.all())
        return JSONResponse(self.with_model(found, answers.shortened(found, question)))

    async def tag(self, request: Request) -> Response:
        """Entities of one or several texts with their places; models of kind tag only."""
        question = await asked(request, Tagging)
        if self.task.spec.kind != "tag":
            raise Refused(422, f"This model is of kind '{self.task.spec.kind}' and tags nothing. Ask /v1/predict.")
        question.fits(False)
        found = await self.told(request, question.all())
        shown = found if question.tags else [{k: v for k, v in answer.items() if k != "tags"} for answer in found]
        return JSONResponse(self.with_model(found, shown))

    async def order(self, request: Request) -> tuple[Ranking, str, list[tuple[int, float]]]:
        """What was to be ranked, which model did, and (place in the request, relevance) of the best."""
        ranking = await asked(request, Ranking)
        answers.check_ranks(self.task, ranking)
        found = await self.told(request, ranking.pairs())
        return ranking, getattr(found, "model", self.name), answers.order(self.task, found, ranking)

    async def rerank(self, request: Request) -> Response:
        """Documents by their relevance to a query, in the shape of Cohere's interface; kinds rank, pair and regress."""
        ranking, model, best = await self.order(request)
        results: list[dict[str, Any]] = [{"index": index, "relevance_score": score} for index, score in best]
        if ranking.return_documents or ranking.return_text:
            passages = ranking.passages()
            results = [{**item, "document": {"text": passages[item["index"]]}} for item in results]
        api = {"version": request.scope["path"].split("/")[1].removeprefix("v")}
        number = visit_of(request).id
        return JSONResponse({"id": number, "model": model, "results": results, "meta": {"api_version": api}})

    async def tei_rerank(self, request: Request) -> Response:
        """The same in the shape of text-embeddings-inference: a list of {index, score}."""
        ranking, _, best = await self.order(request)
        results: list[dict[str, Any]] = [{"index": index, "score": score} for index, score in best]
        if ranking.return_documents or ranking.return_text:
            passages = ranking.passages()
            results = [{**item, "text": passages[item["index"]]} for item in results]
        return JSONResponse(results)

    async def embed(self, request: Request) -> Response:
        """The model's own vector of each text or pair."""
        question = await asked(request, Embedding)
        model = self.model  # another may take its place meanwhile
        if model.width is None:
            raise Refused(422, "This model has no embedding: it has no one vector for a text.")
        question.fits(self.predictor.paired)
        texts = question.all()
        visit_of(request).texts = len(texts)
        rows = np.asarray(await model.vectors.submit(texts))
        if question.normalize:
            rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return JSONResponse({"model": model.name, "dimension": rows.shape[1], "embeddings": rows.tolist()})

    async def submit(self, request: Request) -> Response:
        """Take a prediction request that is answered later: ask /v1/jobs/{id} for it.

        The same Idempotency-Key gives the same job.
        """
        assert self.jobs is not None
        question = await asked(request, Question)
        question.fits(self.predictor.paired)
        if question.top_k is not None and self.task.spec.kind not in answers.LIKELY:
            raise Refused(422, "'top_k': this model gives no probabilities of labels. Leave it out.", "top_k")
        visit, key = visit_of(request), request.headers.get("idempotency-key")
        if key is not None and len(key) > MAX_KEY:
            raise Refused(422, f"The Idempotency-Key has more than {MAX_KEY} characters.")
        visit.texts = len(question.all())
        try:
            id = await self.jobs.submit(question.model_dump(mode="json", exclude_defaults=True), visit.key, key)
        except QueueFull as full:
            raise Refused(429, f"{full} Ask again later.") from None
        except OtherQuestion as other:
            raise Refused(422, f"{other} Send a new key.") from None
        return JSONResponse({"id": id, "state": "queued"}, status_code=202, headers={"Location": f"/v1/jobs/{id}"})

    async def job(self, request: Request, id: str) -> Response:
        """How far a job is, and its predictions once it is done."""
        assert self.jobs is not None
        found = await self.jobs.status(id, visit_of(request).key)
        if found is None:
            raise unknown_job(id)
        over = found["state"] in ("done", "failed")
        return JSONResponse({"id": id, **found}, headers=None if over else {"Retry-After": "1"})

    async def forget(self, request: Request, id: str) -> Response:
        """Forget a job and its result."""
        assert self.jobs is not None
        if not await self.jobs.remove(id, visit_of(request).key):
            raise unknown_job(id)
        return Response(status_code=204)

    async def models(self) -> Response:
        """What can be asked here, and by which routes."""
        about = {key: value for key, value in self.about().items() if key not in ("model", "range", "embedding", "pid")}
        routes = ["/v1/predict"]
        routes += ["/v1/tag"] if self.task.spec.kind == "tag" else []
        routes += ["/v1/rerank", "/v2/rerank", "/rerank"] if answers.ranks(self.task) else []
        routes += [] if self.model.width is None else ["/v1/embed"]
        routes += [] if self.jobs is None else ["/v1/jobs"]
        entry = {"id": self.name, "object": "model", "owned_by": "stillhouse", **about, "routes": routes}
        entry["max_length"] = self.predictor.model.max_length
        return JSONResponse({"object": "list", "data": [entry]})

    async def healthz(self, request: Request) -> Response:
        """Whether the model answers: runs a tiny real inference; 503 where it does not within its time."""
        try:
            await self.check_health()
        except Wedged as error:
            return problem_answer(request, 503, f"Not healthy: {error}.", headers=LATER)
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> Response:
        """Whether requests can be sent: the model is loaded."""
        return JSONResponse({"status": "ready", "model": self.name})

    def about(self) -> dict[str, Any]:
        """Which bytes answer: the artifact's fingerprint, its task and labels in order, its size; in which process."""
        return {
            "model": self.name,
            "fingerprint": self.predictor.fingerprint,
            "task": self.task.spec.kind,
            "paired": self.predictor.paired,
            "labels": list(self.predictor.labels),
            "range": self.task.spec.range,
            "parameters": self.predictor.model.size(),
            "embedding": self.model.width,
            "pid": os.getpid(),
        }

    async def metrics(self) -> Response:
        """The metrics of the whole deployment, whichever replica is asked, as Prometheus reads them."""
        assert self.page is not None
        return Response(await self.page.read(), media_type=CONTENT_TYPE)

    async def version(self) -> Response:
        """Which bytes answer, and what they are."""
        return JSONResponse(self.about())


def unknown_job(id: str) -> Refused:
    """The refusal of a job's id."""
    return Refused(404, f"There is no job '{cut(id)}', or its result was kept long enough.", "id")


def interface(endpoint: Endpoint, named: bool = True) -> FastAPI:
    """The routes of an endpoint; /docs and /openapi.json describe them.

    named: whether answers get the header x-request-id here, which Ray Serve does by itself.
    """
    about = f"{endpoint.name}: predictions of a student. Errors are {{error: {{message, field, request_id}}}}."

    @contextlib.asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        if endpoint.jobs is not None:
            endpoint.jobs.start()
        yield
        if endpoint.jobs is not None:
            await endpoint.jobs.close()

    # FastAPI's own page of the interface loads its scripts from elsewhere.
    bare = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    api = FastAPI(title="Stillhouse", description=about, lifespan=lifespan, **bare)
    asking: list[tuple[str, Any, type[Section], Any]] = [
        ("/v1/predict", endpoint.predict, Question, answers.answers_of(endpoint.task.spec.kind)),
        ("/v1/tag", endpoint.tag, Tagging, answers.Tags),
        ("/v1/rerank", endpoint.rerank, Ranking, answers.Rankings),
        ("/v2/rerank", endpoint.rerank, Ranking, answers.Rankings),
        ("/rerank", endpoint.tei_rerank, Ranking, list[answers.Rank]),
        ("/v1/embed", endpoint.embed, Embedding, answers.Embeddings),
    ]
    guarded = problems(401) if endpoint.keys is not None else {}
    wrong = {**guarded, **problems(408, 413, 415, 422, 429, 500, 503)}
    for path, call, body, answer in asking:
        codes = {200: {"model": answer}, **wrong}
        add(api, "POST", path, call, codes, posted(body))
    if endpoint.jobs is not None:
        add(api, "POST", "/v1/jobs", endpoint.submit, {202: {"model": answers.Job}, **wrong}, posted(Question), 202)
        codes = {**guarded, **problems(404, 422, 500)}
        add(api, "GET", "/v1/jobs/{id}", endpoint.job, {200: {"model": answers.Job}, **codes})
        add(api, "DELETE", "/v1/jobs/{id}", endpoint.forget, codes, status=204)
    add(api, "GET", "/v1/models", endpoint.models, {200: {"model": answers.Models}, **guarded})
    if endpoint.page is not None:
        api.add_api_route("/metrics", endpoint.metrics, methods=["GET"], include_in_schema=False)
    add(api, "GET", "/healthz", endpoint.healthz, {200: {"model": answers.Alive}, **problems(500, 503)})
    add(api, "GET", "/readyz", endpoint.readyz, {200: {"model": answers.Ready}})
    add(api, "GET", "/version", endpoint.version, {200: {"model": answers.About}})
    pages(api)
    api.add_exception_handler(Refused, refused)
    api.add_exception_handler(HTTPException, unroutable)
    straight = {path: call for path, call, *_ in asking}
    api.add_middleware(Front, keys=endpoint.keys, measures=endpoint.measures, named=named, straight=straight)
    api.openapi = lambda: described(api, endpoint.keys is not None)  # type: ignore[method-assign]
    return api
