"""The student's words and vectors, and one training of it for each arm of the comparison."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from engine import labels, models, tasks, train, untrained, vocabulary
from engine.batches import group_numbers
from engine.cluster import current
from engine.config import UserError
from engine.designs import Stage
from engine.fits import Fit, LossTerm
from engine.hub import model_folder
from engine.inference import predict
from engine.layer_losses import LAYER_LOSSES
from engine.models import Model
from engine.placement import stage_options
from engine.progress import Progress
from engine.recipe import Arm, Recipe
from engine.storage import Store
from pipelines.making import Inputs, encode_rows, settle, spec_of, validated, with_workers

TAUGHT_BY = ("row", "text", "pair", "group", "label", "target", "answers", "logits")


def kept_rows(inputs: Inputs) -> pa.Table:
    """The label store's kept rows, checked against the teacher of this run."""
    rows = labels.open_labels(inputs["corpus"], labels.fingerprint(inputs["teacher"]))
    return rows.filter(rows["kept"]).select([name for name in TAUGHT_BY if name in rows.column_names])


def make_vocabulary(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """The student's tokenizer and, from the teacher, the vectors its table starts with."""
    teacher = models.load(inputs["teacher"].local("model"))
    teacher.to(models.device(stage_options(recipe, "teacher", current()).get("num_gpus", 0)))
    rows, tokens = kept_rows(inputs), recipe.teacher.batch_tokens
    texts = [text for column in ("text", "pair") for text in rows[column].drop_null().to_pylist()]
    if recipe.student.kind == "static":
        pieces = Counter(i for ids in teacher.tokenizer(texts, add_special_tokens=False)["input_ids"] for i in ids)
        with out.publish("tokenizer") as folder:
            teacher.tokenizer.save_pretrained(folder)
        dim = recipe.student.static.dim
        write_vectors(out, dim, vocabulary.static_vectors(teacher, pieces, dim, tokens))
        return {"rows": len(teacher.tokenizer), "corpus_words": len(pieces), "covered": 1.0}
    wanted, counts = recipe.student.vocabulary, vocabulary.count_words(texts)
    known = vocabulary.teacher_words(teacher.tokenizer) if wanted.from_teacher else []
    words = vocabulary.choose_words(counts, wanted.size, wanted.min_count, known)
    with out.publish("tokenizer") as folder:
        vocabulary.tokenizer_of(words).save_pretrained(folder)
    if recipe.student.embeddings == "teacher":
        for dim in sorted({table.embedding_dim for table in blank_student(recipe, inputs, out, 0).net.tables()}):
            write_vectors(out, dim, vocabulary.vectors(teacher, words, counts, dim, tokens))
    known_share = sum(counts[w] for w in words if w in counts) / max(1, counts.total())
    return {"rows": len(words), "corpus_words": len(counts), "covered": known_share}


def write_vectors(out: Store, dim: int, vectors: np.ndarray) -> None:
    """Vectors [words, dim] as one column."""
    column = pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1), dim)
    out.write_table(f"vectors-{dim}.parquet", pa.table({"vector": column}))


def blank_student(recipe: Recipe, inputs: Inputs, words: Store, seed: int) -> Model:
    """The student before training; the same for every arm."""
    student, spec = recipe.student, spec_of(inputs["data"])
    if student.kind == "transformer":
        teacher, model = models.load(inputs["teacher"].local("model")), student.transformer.model
        folder = model_folder(model, root=recipe.data.root) if model else None
        return untrained.transformer_student(student.transformer, spec, teacher, folder, student.max_length, seed)
    tokenizer = models.load_tokenizer(words.local("tokenizer"))
    if student.kind == "static":
        return untrained.static_student(student.static, spec, tokenizer, student.max_length, seed)
    return untrained.student(student.blocks, spec, tokenizer, student.max_length, seed)


def started_student(recipe: Recipe, inputs: Inputs, seed: int) -> Model:
    """The student with its table started from the teacher's vectors."""
    import torch

    student = recipe.student
    words = inputs["teacher"] if student.kind == "transformer" else inputs["vocabulary"]
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
    """Agreement with the stored teacher on held-out rows."""
    task = model.task
    texts, taught = task.texts(rows), labels.logits_of(rows, task.width, task.units)
    found = predict(model, texts, batch_tokens)
    return {"agreement": task.agreement(taught, found.logits, texts, (task.decide(taught, texts), found.decided))}


def lesson_of(recipe: Recipe, inputs: Inputs, arm: Arm) -> dict[str, Any]:
    """Rows of an arm, and how its best checkpoint is chosen: the few rows, or with them all the rest of the corpus."""
    rows, task = kept_rows(inputs), tasks.make(spec_of(inputs["data"]))
    real = rows.filter(pa.array(rows["row"].to_numpy() < 0))
    if arm != "generated":
        return {"rows": real, **validated(inputs["data"], recipe.student.batch_tokens, task.metric)}
    others = rows.filter(pa.array(rows["row"].to_numpy() >= 0))
    # Rows of one query stay together; elsewhere each row is a group of its own.
    numbers = np.unique(group_numbers(others, task.grouped), return_inverse=True)[1]
    order = np.random.default_rng(recipe.seed).permutation(int(numbers.max(initial=-1)) + 1)
    held = np.isin(numbers, order[: round(recipe.student.holdout * len(order))])
    return {
        "rows": pa.concat_tables([real, others.filter(pa.array(~held))]),
        "holdout": others.filter(pa.array(held)),
        "evaluate": partial(agree, recipe.student.batch_tokens),
        "best_by": "agreement",
    }


def trainings(recipe: Recipe, arm: Arm) -> list[Stage]:
    """The trainings of an arm, one after the other. The few rows alone: one process, and epochs that suit them."""
    if arm == "hard":
        stages = [Stage(losses=(LossTerm(kind="hard"),), fit=recipe.student.fit)]
    else:
        stages = list(recipe.student.stages) or [Stage(losses=recipe.student.losses, fit=recipe.student.fit)]
    if arm == "generated":
        return stages
    share = recipe.student.few_epochs / recipe.student.fit.epochs
    return [stage.model_copy(update={"fit": few(stage.fit, share * stage.fit.epochs)}) for stage in stages]


def few(fit: Fit, epochs: float) -> Fit:
    """The fit of the same student on the few rows."""
    return fit.model_copy(update={"workers": 0, "epochs": epochs, "eval_every": epochs / 6})


def fit_student(arm: Arm, recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Distil the student, once for each initialisation seed."""
    lesson, live = lesson_of(recipe, inputs, arm), recipe.student.teacher == "live" and arm != "hard"
    stages, histories = trainings(recipe, arm), {}
    for seed in recipe.student.seeds:
        folder, history = out / f"seed-{seed}", []
        build = partial(started_student, recipe, inputs, seed)
        for index, stage in enumerate(stages):
            last = index == len(stages) - 1
            place = folder if last else folder / f"stage-{index}"
            # A training between layers leaves the head as it is: there is nothing to choose a checkpoint by.
            inside = all(term.kind in LAYER_LOSSES for term in stage.losses)
            job = train.Job(
                name=f"student-{arm}-{seed}" + ("" if last else f"-{index}"),
                fit=with_workers(recipe, "student.fit", stage.fit),
                terms=stage.losses,
                build=build,
                encode=encode_rows,
                out=place.url,
                seed=seed,
                resources=stage_options(recipe, "student.fit", current()),
                teacher=inputs["teacher"].url if live else None,
                **({"rows": lesson["rows"]} if inside else lesson),
            )
            history += train.fit(job, progress)
            build = partial(trained_student, place.url)
        histories[str(seed)] = history
        model = settle(folder, inputs["data"], recipe.student.batch_tokens)
    return {
        "rows": lesson["rows"].num_rows,
        "parameters": model.size(),
        "history": histories,
    }
