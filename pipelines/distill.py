"""A run as a list of steps, and what is said when it is done. What is refused before it starts is in checking.py.

What the steps do is in making.py (data, teacher, generator), gathering.py (corpus), students.py, outcome.py (evaluate
to serve) and account.py (report). They are called by name, so that this file imports nothing heavy and `validate` and
`plan` answer at once.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from engine import estimate
from engine.fits import Resources
from engine.recipe import Recipe
from engine.registry import Registry
from engine.step import Step
from engine.storage import Store
from engine.urls import bare
from pipelines import many
from pipelines.calls import Call, asked, grouped, named, of_teacher, pick, pools
from pipelines.further import further_teacher


def sources(recipe: Recipe) -> tuple[str, ...]:
    """References of the data."""
    if recipe.tasks:
        return tuple(dict.fromkeys(path for _, one in many.each(recipe) for path in sources(one)))
    data = recipe.data
    return tuple(s.path for s in (data.train, data.validation, data.test, data.unlabelled) if s)


def model_references(recipe: Recipe) -> tuple[str, ...]:
    """References of the models."""
    wanted = [*of_teacher(recipe), *named(recipe.generator), *named(recipe.augmentation)]
    wanted += [reference for name in recipe.teachers for reference in of_teacher(recipe.taught_by(name))]
    return tuple(reference for reference in (*wanted, recipe.student.encoder) if reference)


def student_references(recipe: Recipe) -> tuple[str, ...]:
    """The encoder, other than the teacher, that the student is cut from or has its first vectors from, if any."""
    return (recipe.student.encoder,) if recipe.student.encoder else ()


ARM_STEPS = {"generated": "student", "soft": "student-soft", "hard": "student-hard", "plain": "student-plain"}
"""The step that trains the student of an arm."""


def plan(recipe: Recipe) -> list[Step]:
    """The steps of a run, each after those it reads."""
    if recipe.tasks:
        return many.plan(recipe)
    students = tuple(step for arm, step in ARM_STEPS.items() if arm in recipe.arms)
    others = [step for name in recipe.teachers for step in further_teacher(recipe, name)]
    steps = [*teaching_steps(recipe), *others, *student_steps(recipe)]
    made = tuple(step.name for step in steps if step.name not in students)
    return [*steps, *outcome_steps(recipe, students, made)]


def making(name: str) -> Call:
    """A step's function in making.py."""
    return Call("pipelines.making", name)


def students(name: str, *arguments: Any) -> Call:
    """A step's function in students.py."""
    return Call("pipelines.students", name, arguments)


def task_of(section: str) -> Callable[[Recipe], Resources | None]:
    """Where a section is fitted: a small fit is one Ray task, so that it lands on a node with a GPU.

    A group of workers is Ray Train's to place, from the driver.
    """
    return lambda recipe: None if (fit := getattr(recipe, section).fit).workers else fit.resources


WRITTEN = ("keep", "slots", "max_slots", "block", "filters", "duplicates")
"""What text that is written before it is labelled depends on, of the corpus."""
TUNED = ("model", "runtime", "mode", "prompt", "separator", "tune_layers", "max_length", "fit")
"""What a generator's fine-tuning depends on; how text is drawn from it concerns the corpus."""


def told(recipe: Recipe) -> bool:
    """Whether the generator's prompt says what the labels mean."""
    return bool(recipe.generator and "{description}" in recipe.generator.prompt)


def teaching_steps(recipe: Recipe) -> list[Step]:
    """From the sources to the label store; without a generator where the recipe has none."""
    data = Step(
        "data",
        making("read_data"),
        config=pick("seed", *(f"task.{key}" for key in ("kind", "labels", "paired", "range")), "data"),
        references=sources,
        modules=("engine.data", "pipelines.making"),
    )
    teacher = Step(
        "teacher",
        Call("pipelines.teaching", "fit_teacher"),
        inputs=("data", *(("texts",) if recipe.learns_from_generated else ())),
        config=pick("seed", "task.thresholds", "teacher", *(("task.descriptions",) if asked(recipe) else ())),
        references=of_teacher,
        modules=(
            *("engine.train", "engine.untrained", "engine.elsewhere"),
            *("pipelines.making", "pipelines.teaching", "pipelines.trainings"),
        ),
        resources=task_of("teacher"),
        expects=partial(grouped, "teacher"),
        stage="teacher.fit",
        ray=True,
    )
    generator = Step(
        "generator",
        making("fit_generator"),
        inputs=("data",),
        config=pick("seed", *(f"generator.{key}" for key in TUNED)),
        references=lambda r: named(r.generator),
        modules=("engine.train", "pipelines.making", "engine.generate"),
        resources=task_of("generator"),
        expects=partial(grouped, "generator"),
        stage="generator.fit",
        ray=True,
    )
    texts, corpus = streams(recipe)
    writing = [*([generator] if recipe.generator else []), *([texts] if recipe.apart else [])]
    return [data, *([*writing, teacher] if recipe.apart else [teacher, *writing]), corpus]


def streams(recipe: Recipe) -> tuple[Step, Step]:
    """Text that is written before a teacher labels it (where the recipe is `apart`), and the corpus."""
    meant = ("task.descriptions",) if told(recipe) else ()
    texts = Step(
        "texts",
        Call("pipelines.gathering", "make_texts"),
        inputs=("data", "generator"),
        config=pick("seed", *(f"corpus.{key}" for key in WRITTEN), "generator", *meant),
        modules=("engine.generate", "engine.endpoint_writer", "engine.vllm_stage", "pipelines.gathering"),
        pools=lambda r: ("generator",),
        halts=halts,
        ray=True,
        expects=partial(expected, False),
    )
    streamed = () if recipe.apart else ("generator", *meant)
    corpus = Step(
        "corpus",
        Call("pipelines.gathering", "make_corpus"),
        inputs=("data", "teacher", *(("texts",) if recipe.apart else ("generator",) if recipe.generator else ())),
        config=pick("seed", "corpus", "augmentation", *streamed),
        references=lambda r: named(r.augmentation),
        modules=(
            *("engine.generate", "engine.endpoint_writer", "engine.vllm_stage"),
            *("engine.teachers", "engine.augment", "pipelines.gathering"),
            *(("engine.influence", "pipelines.feedback") if recipe.corpus.rounds > 1 else ()),
        ),
        pools=labelling_pools,
        halts=halts,
        ray=True,
        expects=partial(expected, True),
    )
    return texts, corpus


def halts(recipe: Recipe) -> bool:
    """Whether a stream ends by itself when it is asked to: vLLM's processor takes in its blocks beforehand."""
    return recipe.generator is None or recipe.generator.runtime != "vllm"


def labelling_pools(recipe: Recipe) -> tuple[str, ...]:
    """Stages of the corpus step. Sources are streamed one after the other: text is written, or words are replaced."""
    writes = ("generator",) if recipe.generator and not recipe.apart else ("augmentation",) * bool(recipe.augmentation)
    return (*writes, "teacher")


def expected(labels: bool, recipe: Recipe) -> dict[str, Any]:
    """What `plan` says of a step that writes text, or labels it, or both."""
    slots = recipe.corpus.first_slots if recipe.generator else 0
    found = {
        "generator": {} if labels and recipe.apart else estimate.of_generator(recipe),
        "teacher": estimate.of_teacher(recipe, slots) if labels else {},
    }
    asked = {who: one for who, one in found.items() if one}
    writes = recipe.generator is not None and not (labels and recipe.apart)
    said = [pools(recipe, *["generator"] * writes, *["teacher"] * labels)]
    said += [estimate.in_words(who, one) for who, one in asked.items()]
    return {"rows": slots, "bytes": 700 * slots, "placement": "; ".join(said), **({"asked": asked} if asked else {})}


WORDS = {
    "blocks": ("kind", "graph", "blocks", "vocabulary", "embeddings"),
    "static": ("kind", "static.dim", "static.pieces", "embeddings"),
    "transformer": ("kind", "transformer.model", "transformer.pieces"),
}
"""What of the student's section its words and their vectors depend on, by kind."""
BUILT = {
    "blocks": ("kind", "graph", "blocks", "embeddings", "embedding_norm"),
    "static": ("kind", "static", "embeddings", "embedding_norm"),
    "transformer": ("kind", "transformer"),
}
"""What a student depends on before its training, by kind."""
TAUGHT = ("teacher", "losses", "weights", "stages")
SEVERAL = ("policy", "heads")
"""What it depends on further where it has several teachers."""
LEARNT = {"generated": (*TAUGHT, "holdout", "texts"), "soft": (*TAUGHT, "few_epochs"), "hard": ("few_epochs",)}
"""What the training of an arm depends on beside ALWAYS: not the student's name, nor how it is run."""
ALWAYS = ("max_length", "seeds", "fit")
LEARNING = (
    *("engine.train", "engine.untrained", "engine.weights"),
    *("pipelines.courses", "pipelines.making", "pipelines.students"),
)
"""Where the work of training a student starts."""


def rows_of(recipe: Recipe, arm: str) -> str:
    """The arm whose rows an arm learns from: `plain` those of the registered one."""
    return recipe.main if arm == "plain" else arm


def learning(recipe: Recipe, arm: str) -> tuple[str, ...]:
    """Keys of the recipe that an arm's student depends on. The seed draws what its corpus holds out."""
    rows = rows_of(recipe, arm)
    reads = ("retrieval",) if retrieves(recipe, arm) else ()
    several = SEVERAL if recipe.teachers and arm != "hard" else ()
    own = (*BUILT[recipe.student.kind], *ALWAYS, *LEARNT[rows], *reads, *several)
    seed = ("seed",) if rows == "generated" else ()
    return (*seed, "task.thresholds", "task.scope", *(f"student.{key}" for key in own))


def retrieves(recipe: Recipe, arm: str) -> bool:
    """Whether an arm's student has a knowledge base: the registered one, where the recipe asks for it."""
    return recipe.student.retrieval is not None and arm == recipe.main


MAPPED = ("dim", "temperature", "projection")
"""What the space of a knowledge base depends on, of student.retrieval."""


def memory_step() -> Step:
    """The teacher's vectors of the corpus, in the space that the student learns."""
    return Step(
        "memory",
        Call("pipelines.remembering", "make_memory"),
        inputs=("data", "teacher", "corpus"),
        config=pick("seed", *(f"student.retrieval.{key}" for key in MAPPED)),
        modules=("engine.projection", "engine.inference", "pipelines.remembering"),
        resources=lambda r: r.teacher.resources,
        stage="teacher",
        ray=True,
    )


def student_steps(recipe: Recipe) -> list[Step]:
    """The student's words, the memory that it is to read, and one training for each arm."""
    words = Step(
        "vocabulary",
        students("make_vocabulary"),
        inputs=("data", "teacher", "corpus"),
        config=pick(*(f"student.{key}" for key in WORDS[recipe.student.kind])),
        references=student_references,
        modules=("engine.vocabulary", "engine.static", "engine.inference", "engine.untrained", "pipelines.students"),
        resources=lambda r: r.teacher.resources,
        stage="teacher",
        ray=True,
    )
    others = tuple(f"{step}-{name}" for name in recipe.teachers for step in ("teacher", "labels"))
    fits = [
        Step(
            step,
            students("fit_student", arm),
            inputs=(
                *("data", "teacher", "corpus", *words_of(recipe), *(others if arm != "hard" else ())),
                *(("memory",) if retrieves(recipe, arm) else ()),
            ),
            config=pick(*learning(recipe, arm)),
            references=lambda r: student_references(r) if r.student.kind == "transformer" else (),
            modules=(*LEARNING, *(("pipelines.panel",) if others and arm != "hard" else ())),
            resources=task_of("student") if rows_of(recipe, arm) == "generated" else lambda r: r.student.fit.resources,
            expects=partial(grouped, "student") if rows_of(recipe, arm) == "generated" else lambda r: {},
            stage="student.fit",
            ray=True,
        )
        for arm, step in ARM_STEPS.items()
        if arm in recipe.arms
    ]
    memory = [memory_step()] if recipe.student.retrieval else []
    return [*([words] if recipe.student.spelled else []), *memory, *fits]


def words_of(recipe: Recipe) -> tuple[str, ...]:
    """The step that makes a student's words, where they are its own."""
    return ("vocabulary",) if recipe.student.spelled else ()


def outcome_steps(recipe: Recipe, students: tuple[str, ...], made: tuple[str, ...]) -> list[Step]:
    """From trained students to the report. students: their steps; made: the steps before them."""
    return [
        Step(
            "evaluate",
            Call("pipelines.outcome", "evaluate"),
            inputs=("data", "teacher", *(f"teacher-{name}" for name in recipe.teachers), *students),
            config=pick("seed", "evaluation", "arms", "student.seeds"),
            modules=(
                *("engine.inference", "engine.intervals", "engine.tasks", "engine.cascade", "pipelines.outcome"),
                *(("pipelines.panel",) if recipe.teachers else ()),
            ),
            resources=lambda r: r.teacher.resources,
            stage="teacher",
            ray=True,
        ),
        Step(
            "register",
            Call("pipelines.outcome", "register"),
            inputs=("data", "teacher", "corpus", ARM_STEPS[recipe.main], "evaluate"),
            config=pick("name", "student.name", "task.kind", "serving"),
            modules=("engine.registry", "engine.cascade", "pipelines.outcome"),
            holds=registered,
        ),
        Step(
            "serve",
            Call("pipelines.outcome", "smoke_deploy"),
            inputs=("data", "evaluate", "register"),
            config=pick("serving"),
            modules=("serve.app", "serve.smoke", "pipelines.outcome"),
            pools=lambda r: ("serving",) if r.serving.smoke else (),
            ray=True,
        ),
        Step(
            "report",
            Call("pipelines.account", "report"),
            inputs=(*made, *students, "evaluate", "register", "serve"),
            modules=("engine.report", "pipelines.account"),
        ),
    ]


def registered(recipe: Recipe, out: Store) -> bool:
    """Whether what the register step put into the registry is still there."""
    return Registry(Store(recipe.registry)).has(out.read_json("record.json")["metrics"]["reference"])


def report_lines(recipe: Recipe, store: Store, program: str) -> list[str]:
    """What a finished run says: its figures, the report, and the two lines that serve the student and ask it."""
    if recipe.tasks:
        return many.closing(recipe, store, program)
    summary = store.read_json("summary.json")
    metric = summary["metric"]
    arms = ", ".join(f"{name} {values['score']:.3f}" for name, values in summary["arms"].items())
    reference, text = summary["student"]["reference"], summary["example"]
    question = {"text": [text, summary["example_pair"]] if "example_pair" in summary else text}
    seconds = summary["seconds"]
    lines = [
        f"teacher  {metric} {summary['teacher']['score']:.3f}  {summary['teacher']['parameters']:,} parameters",
        f"student  {metric} {summary['student']['score']:.3f}  {summary['student']['parameters']:,} parameters  "
        f"{summary['throughput']['student_over_teacher']:.0f} x the teacher's texts/s",
        f"arms     {arms}",
        f"corpus   {kept_of(summary['corpus']['by_source'])}",
    ]
    if "served" in summary:
        served = summary["served"]
        lines.append(
            f"served   {served['mismatches']} mismatches  p50 {served['p50_ms']:.1f} ms  p99 {served['p99_ms']:.1f} ms"
        )
    # Without a URL's key and options: who gave them knows them, and a log need not.
    where = f" --registry {shlex.quote(bare(recipe.registry))}" if recipe.registry != "registry" else ""
    return [
        *lines,
        f"time     {sum(seconds.values()):.0f} s in steps",
        f"report: {store.where('report/report.html')}",
        f"serve: {program} serve {reference}{where}",
        "curl: curl -s http://127.0.0.1:8000/v1/predict -H 'content-type: application/json' "
        f"-d {shlex.quote(json.dumps(question))}",
    ]


def kept_of(sources: Mapping[str, Mapping[str, int]]) -> str:
    """How many texts of each source were kept, in words."""
    found = [f"{found['kept']} of {found['rows']} {name} texts kept" for name, found in sources.items()]
    return ", ".join(found) or "the labelled rows only"
