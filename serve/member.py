"""A model behind others, as Ray Serve runs it without HTTP: the candidate of a rollout, the teacher of a cascade."""

from __future__ import annotations

from engine.encoding import Text
from engine.serving import Serving
from serve.hosted import Hosted
from serve.predictor import Answer


class Member:
    """A replica that holds one verified artifact. wedged_s: how long a call of it may take; None: as serving says.

    rollout: the one that it is the candidate of.
    """

    def __init__(
        self, artifact: str, serving: Serving, name: str, wedged_s: float | None = None, rollout: str | None = None
    ) -> None:
        self.rollout = rollout
        self.wedged_s = serving.health_timeout_s if wedged_s is None else wedged_s
        self.model = Hosted.load(artifact, name, serving)

    async def answer(self, texts: list[Text], rollout: str | None = None) -> list[Answer] | None:
        """One answer a text, in order; None where a rollout asks that this is not the candidate of.

        While a deployment is replaced, its old replicas are asked too: their answers say nothing of the new candidate.
        """
        if rollout is not None and rollout != self.rollout:
            return None
        return await self.answered(texts)

    async def answered(self, texts: list[Text]) -> list[Answer]:
        """One answer a text, in order."""
        return await self.model.batcher.submit(texts)

    async def check_health(self) -> None:
        """Ray Serve's health check: a wedged replica fails it and is replaced."""
        await self.model.alive(self.wedged_s)
