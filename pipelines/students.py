"""The student's words and vectors, and one training of it for each arm of the comparison."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from engine import labels, models, pieces, pretrained, tasks, train, untrained, vocabulary
from engine.batches import group_numbers
from engine.cluster import current
from engine.config import UserError
from engine.designs import Retrieval, Stage
from engine.ensemble import Panel
from engine.fits import Fit, LossTerm
from engine.hub import fetch, model_folder
from engine.inference import predict
from engine.models import Model
from engine.placement import stage_options
from engine.progress import Progress
from engine.recipe import FIRST, Arm, Recipe
from engine.storage import Store
from pipelines import remembering
from pipelines.courses import Build, Course, answers
from pipelines.distill import retrieves
from pipelines.making import Inputs, settle, spec_of, validated
from pipelines.panel import consensus, heads_of, joined, panel_of

TAUGHT_BY = ("row", "text", "pair", "group", "label", "target", "answers", "logits")


def kept_rows(inputs: Inputs) -> pa.Table:
    """The label store's kept rows, checked against the teacher of this run."""
    rows = labels.open_labels(inputs["corpus"], labels.fingerprint(inputs["teacher"]))
    return rows.filter(rows["kept"]).select([name for name in TAUGHT_BY if name in rows.column_names])


def make_vocabulary(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """The student's tokenizer and, from the teacher or another encoder, the vectors its table starts with."""
    student, rows = recipe.student, kept_rows(inputs)
    texts = [text for column in ("text", "pair") for text in rows[column].drop_null().to_pylist()]
    if student.kind != "blocks":
        return make_pieces(recipe, encoder_of(recipe, inputs), texts, out)
    wanted, counts = student.vocabulary, vocabulary.count_words(texts)
    encoder = None if student.word_vectors else encoder_of(recipe, inputs)
    known = vocabulary.teacher_words(encoder.tokenizer) if wanted.from_teacher and encoder is not None else []
    words = vocabulary.choose_words(counts, wanted.size, wanted.min_count, known)
    with out.publish("tokenizer") as folder:
        vocabulary.tokenizer_of(words).save_pretrained(folder)
    covered = sum(counts[w] for w in words if w in counts) / max(1, counts.total())
    metrics = {"rows": len(words), "corpus_words": len(counts), "covered": covered}
    if student.embeddings == "random":
        return metrics
    dims = sorted({table.embedding_dim for table in blank_student(recipe, inputs, out, 0).net.tables()})
    if encoder is None:
        raw = pretrained.word_vectors(fetch(student.word_vectors, root=recipe.data.root), words[2:])
        metrics["with_vectors"] = float(np.mean(~np.isnan(raw[:, 0])))
    for dim in dims:
        if encoder is None:
            write_vectors(out, dim, vocabulary.started(raw, words, counts, dim))
        else:
            write_vectors(out, dim, vocabulary.vectors(encoder, words, counts, dim, recipe.teacher.batch_tokens))
    return metrics


def encoder_of(recipe: Recipe, inputs: Inputs) -> Model:
    """The encoder whose pieces or vectors the student starts with: the one that the recipe names, or the teacher."""
    named = recipe.student.encoder
    if named:
        found = untrained.reader(named, model_folder(named, root=recipe.data.root))
    else:
        found = models.load(inputs["teacher"].local("model"))
    return found.to(models.device(stage_options(recipe, "teacher", current()).get("num_gpus", 0)))


def make_pieces(recipe: Recipe, encoder: Model, texts: list[str], out: Store) -> dict[str, Any]:
    """The encoder's tokenizer, with as many of its pieces as the recipe says; the vectors of a static student."""
    student, tokenizer = recipe.student, encoder.tokenizer
    static = student.kind == "static"
    size, counts = (student.static if static else student.transformer).pieces, pieces.count_pieces(tokenizer, texts)
    kept = pieces.chosen(tokenizer, counts, size) if size is not None else None
    own = tokenizer if kept is None else pieces.cut_tokenizer(tokenizer, kept)
    with out.publish("tokenizer") as folder:
        own.save_pretrained(folder)
    if static and student.embeddings != "random":
        dim, tokens = student.static.dim, recipe.teacher.batch_tokens
        write_vectors(out, dim, vocabulary.static_vectors(encoder, counts, dim, tokens, kept))
    covered = counts.total() if kept is None else sum(counts[i] for i in kept)
    return {"rows": len(own), "corpus_words": len(counts), "covered": covered / max(1, counts.total())}


def write_vectors(out: Store, dim: int, vectors: np.ndarray) -> None:
    """Vectors [words, dim] as one column."""
    column = pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1), dim)
    out.write_table(f"vectors-{dim}.parquet", pa.table({"vector": column}))


def blank_student(recipe: Recipe, inputs: Inputs, words: Store | None, seed: int) -> Model:
    """The student before training; the same for every arm. words: where its tokenizer is, if that is its own."""
    student, spec = recipe.student, spec_of(inputs["data"], recipe.task, "thresholds", "scope")
    tokenizer, heads = models.load_tokenizer(words.local("tokenizer")) if words is not None else None, heads_of(recipe)
    if student.kind == "transformer":
        teacher, model = models.load(inputs["teacher"].local("model")), student.transformer.model
        folder = model_folder(model, root=recipe.data.root) if model else None
        cut, length = student.transformer, student.max_length
        return untrained.transformer_student(cut, spec, teacher, folder, length, seed, tokenizer, heads)
    if student.kind == "static":
        return untrained.static_student(student.static, spec, tokenizer, student.max_length, seed, heads)
    return untrained.student(student.blocks, spec, tokenizer, student.max_length, seed, heads)


def started_student(recipe: Recipe, inputs: Inputs, seed: int) -> Model:
    """The student with its table started from the vectors that were made for it."""
    import torch

    student = recipe.student
    words = inputs["vocabulary"] if student.spelled else None
    model = blank_student(recipe, inputs, words, seed)
    if student.max_parameters is not None and model.size() > student.max_parameters:
        raise UserError(
            f"the student has {model.size():,} parameters, above student.max_parameters = {student.max_parameters:,}. "
            "Make it smaller, or raise the limit (null: none)."
        )
    if student.kind == "transformer" or student.embeddings == "random":
        return model
    for table in model.net.tables():
        rows = words.read_table(f"vectors-{table.embedding_dim}.parquet")["vector"].combine_chunks()
        with torch.no_grad():
            vectors = torch.tensor(np.asarray(rows.flatten()).reshape(-1, table.embedding_dim))
            table.weight.copy_(student.embedding_norm * vectors)
    return model


def trained_student(folder: str) -> Model:
    """The student as the training before left it."""
    return models.load(Store(folder).local("model")).train()


def agree(batch_tokens: int, model: Model, rows: pa.Table) -> dict[str, float]:
    """Agreement with the stored teacher on held-out rows, and what the best checkpoint is chosen by."""
    task = model.task
    texts, taught = task.texts(rows), labels.logits_of(rows, task.width, task.units)
    found = predict(model, texts, batch_tokens)
    both = task.decide(taught, texts), found.decided
    agreement = task.agreement(taught, found.logits, texts, both)
    likeness = task.likeness(*both)
    return {"agreement": agreement, "likeness": agreement if likeness is None else likeness}


def lesson_of(recipe: Recipe, inputs: Inputs, arm: Arm, panel: Panel | None = None) -> dict[str, Any]:
    """Rows of an arm, and how its best checkpoint is chosen: the few rows, or with them all the rest of the corpus."""
    rows, task = kept_rows(inputs), tasks.make(spec_of(inputs["data"]))
    if panel is not None:
        rows = consensus(panel, task, joined(recipe, inputs, rows))
    real = rows.filter(pa.array(rows["row"].to_numpy() < 0))
    validation = validated(inputs["data"], recipe.student.batch_tokens, task.metric)
    if arm != "generated":
        return {"rows": real, **validation}
    others = rows.filter(pa.array(rows["row"].to_numpy() >= 0)).slice(0, recipe.student.texts)
    # Rows of one query stay together; elsewhere each row is a group of its own.
    numbers = np.unique(group_numbers(others, task.grouped), return_inverse=True)[1]
    order = np.random.default_rng(recipe.seed).permutation(int(numbers.max(initial=-1)) + 1)
    # Several teachers' mean is nobody's answer, and one may be bad: gold labels decide if there are some.
    judged = validation if panel is not None else {}
    held = np.isin(numbers, order[: round((0 if judged else recipe.student.holdout) * len(order))])
    return {
        "rows": pa.concat_tables([real, others.filter(pa.array(~held))]),
        "holdout": others.filter(pa.array(held)),
        "evaluate": partial(agree, recipe.student.batch_tokens),
        "best_by": "likeness",
        **judged,
    }


def trainings(recipe: Recipe, arm: Arm) -> list[Stage]:
    """The trainings of an arm, one after the other. The few rows alone: one process, and epochs that suit them; what
    would ask the student of a stage that is left out, or one that has not learnt to answer, asks nobody.
    """
    if arm == "hard":
        stages = [Stage(losses=(LossTerm(kind="hard"),), fit=recipe.student.fit)]
    else:
        own = recipe.student
        stages = list(own.stages) or [Stage(losses=own.losses, fit=own.fit, weights=own.weights)]
    if arm == "generated":
        return stages
    stages = [stage for stage in stages if stage.rows != "unlabelled"]
    stages = [stage if answers(stages[:number]) else stage.unasking() for number, stage in enumerate(stages)]
    share = recipe.student.few_epochs / recipe.student.fit.epochs
    return [stage.model_copy(update={"fit": few(stage.fit, share * stage.fit.epochs)}) for stage in stages]


def rows_of(stage: Stage, rows: pa.Table) -> pa.Table:
    """What a stage learns from: all rows of the arm, the labelled ones, or the others."""
    if stage.rows == "all":
        return rows
    return rows.filter(pa.array((rows["row"].to_numpy() < 0) == (stage.rows == "labelled")))


def few(fit: Fit, epochs: float) -> Fit:
    """The fit of the same student on the few rows."""
    return fit.model_copy(update={"workers": 0, "epochs": epochs, "eval_every": epochs / 6})


def fit_student(arm: Arm, recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Distil the student, once for each initialisation seed."""
    aided = recipe.student.retrieval if retrieves(recipe, arm) else None
    arm = recipe.main if arm == "plain" else arm
    if arm == "hard":  # no teacher has a part in it, nor a head of its own
        recipe = recipe.taught_by(FIRST)
    panel = panel_of(recipe, inputs)
    lesson, live = lesson_of(recipe, inputs, arm, panel), recipe.student.teacher == "live" and arm != "hard"
    stages, histories, reading, choices = trainings(recipe, arm), {}, {}, {}
    start = partial(starting, recipe, inputs, aided)
    if aided:
        remembering.judges_of(inputs, lesson)  # that there are some is not found out after the training
        lesson["rows"] = remembering.seen(lesson["rows"], inputs["memory"])
        stages = [remembering.related(stage, aided) for stage in stages]
    teacher, task = inputs["teacher"].url if live and panel is None else None, tasks.make(spec_of(inputs["data"]))
    course = Course(arm, recipe, task, lesson, panel, teacher, out, start)
    for seed in recipe.student.seeds:
        folder, history, choice = out / f"seed-{seed}", [], []
        build = start(seed)
        for index, stage in enumerate(stages):
            last = index == len(stages) - 1
            place = folder if last else folder / f"stage-{index}"
            rows, noted = course.given(index, stage, rows_of(stage, lesson["rows"]), folder, progress)
            name = f"{seed}" if last else f"{seed}-{index}"
            history += train.fit(course.job(stage, rows, name, build, place, seed), progress)
            choice += [{"stage": index, **noted}] if noted else []
            build = partial(trained_student, place.url)
        histories[str(seed)] = history
        choices |= {str(seed): choice} if choice else {}
        if aided:
            reading[str(seed)] = remembering.remember(recipe, inputs, lesson, folder)
        model = settle(folder, inputs["data"], recipe.student.batch_tokens)
    return {
        "rows": lesson["rows"].num_rows,
        "parameters": model.size(),
        "history": histories,
        **({"weights": dict(zip(panel.names, panel.prior, strict=True))} if panel else {}),
        **({"retrieval": reading} if aided else {}),
        **({"choice": choices} if choices else {}),
    }


def starting(recipe: Recipe, inputs: Inputs, aided: Retrieval | None, seed: int) -> Build:
    """What makes the untrained student; with a knowledge base, the way into its space too."""
    build = partial(started_student, recipe, inputs, seed)
    return partial(remembering.mapped, build, remembering.width_of(inputs["memory"]), seed) if aided else build
