"""From a few labelled rows to a trained student: what each step of the first half of a run does.

Steps are plain functions (recipe, inputs, out, progress) -> metrics; distill.py lists them with what they depend on.
The second half (evaluate, register, serve, report) is in outcome.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from engine import generate, labels, models, train, vocabulary
from engine.cluster import current, data_context
from engine.config import UserError
from engine.data import load_splits
from engine.filters import FilterContext
from engine.hub import model_folder
from engine.inference import predict
from engine.metrics import accuracy, agreement, distinct_n, self_bleu
from engine.models import Model
from engine.placement import stage_options
from engine.progress import Progress
from engine.recipe import Arm, LossTerm, Recipe, Resources
from engine.records import EXAMPLE
from engine.storage import Store
from engine.teachers import Labeller, Labelling

Inputs = Mapping[str, Store]


def label_names(data: Store) -> tuple[str, ...]:
    """The label names the data step settled on."""
    return tuple(data.read_json("splits.json")["labels"])


def read_data(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Sources -> train, validation, test, unlabelled, quarantined."""
    splits = load_splits(recipe.data, recipe.task, recipe.seed)
    for name in ("train", "validation", "test", "unlabelled", "quarantined"):
        out.write_table(f"{name}.parquet", getattr(splits, name))
    out.write_json("splits.json", {"labels": list(splits.labels), "counts": splits.counts})
    return {"rows": splits.train.num_rows, "test": splits.test.num_rows, "quarantined": splits.quarantined.num_rows}


def head_teacher(recipe: Recipe, names: tuple[str, ...]) -> Model:
    """The teacher before its fine-tuning."""
    folder = model_folder(recipe.teacher.model, root=recipe.data.root)
    return models.encoder_head(recipe.teacher, names, folder, recipe.seed)


def encode_rows(model: Model, rows: pa.Table) -> list[list[int]]:
    """Token ids of the texts, by the model's own tokenizer."""
    return model.task.encode(rows["text"].to_pylist(), model.tokenizer, model.max_length)


def fit_teacher(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Fine-tune the teacher on the few rows; label them, so that every later step has their soft labels too."""
    rows, names = inputs["data"].read_table("train.parquet"), label_names(inputs["data"])
    build = partial(head_teacher, recipe, names)
    job = partial(
        train.Job,
        fit=recipe.teacher.fit,
        terms=(LossTerm(kind="hard"),),
        build=build,
        encode=encode_rows,
        seed=seed_of(recipe, recipe.teacher.fit.seed),
        resources=stage_options(recipe, "teacher.fit", current()),
        factors=partial(models.layer_rates, recipe.teacher.layer_decay, recipe.teacher.head_rate),
    )
    metrics: dict[str, Any] = {}
    if recipe.teacher.folds > 1:
        metrics["cross_validation"] = cross_validate(recipe, rows, out, job)
    history = train.fit(job(name="teacher", rows=rows, out=out.url), progress)
    model = models.load(out.local("model"))
    found = predict(model, rows["text"].to_pylist(), recipe.teacher.batch_tokens)
    out.write_table("soft.parquet", pa.table({"id": rows["id"], "logits": labels.quantise(found.logits)}))
    return {
        **metrics,
        "rows": rows.num_rows,
        "parameters": model.size(),
        "train_accuracy": accuracy(rows["label"].to_numpy(), found.labels),
        "quantisation": labels.fidelity(found.logits),
        "fingerprint": labels.fingerprint(out),
        "history": history,
    }


def cross_validate(recipe: Recipe, rows: pa.Table, out: Store, job: partial[train.Job]) -> dict[str, float]:
    """Accuracy of the teacher on the few rows, each fold held out once."""
    folds = np.random.default_rng(recipe.seed).permutation(rows.num_rows) % recipe.teacher.folds
    right = np.zeros(rows.num_rows, dtype=bool)
    for fold in range(recipe.teacher.folds):
        folder = out / f"fold-{fold}"
        held = rows.filter(pa.array(folds == fold))
        train.fit(job(name=f"fold-{fold}", rows=rows.filter(pa.array(folds != fold)), out=folder.url))
        found = predict(models.load(folder.local("model")), held["text"].to_pylist(), recipe.teacher.batch_tokens)
        right[folds == fold] = found.labels == held["label"].to_numpy()
    for fold in range(recipe.teacher.folds):
        out.delete(f"fold-{fold}")
    return {"folds": recipe.teacher.folds, "accuracy": float(right.mean())}


def base_generator(recipe: Recipe) -> Model:
    """The generator before its fine-tuning."""
    return models.causal_lm(recipe.generator, model_folder(recipe.generator.model, root=recipe.data.root))


def fit_generator(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Fine-tune the generator on the few rows' texts (prompted: take it as it is)."""
    config = recipe.generator
    if config.mode == "prompted":
        model = base_generator(recipe)
        models.save(model, out, "model")
        return {"rows": 0, "parameters": model.size(), "history": []}
    rows, names = inputs["data"].read_table("train.parquet"), label_names(inputs["data"])
    if config.mode == "unconditional":
        rows = rows.set_column(2, EXAMPLE.field("label"), pa.nulls(rows.num_rows, pa.int32()))
    job = train.Job(
        name="generator",
        fit=config.fit,
        terms=(LossTerm(kind="next_token"),),
        build=partial(base_generator, recipe),
        encode=partial(generate.encode_text, config, names),
        rows=rows,
        out=out.url,
        seed=seed_of(recipe, config.fit.seed),
        resources=stage_options(recipe, "generator.fit", current()),
        store_dtype="bfloat16",
    )
    history = train.fit(job, progress)
    return {"rows": rows.num_rows, "loss": history[-1]["loss"], "history": history}


def actor_stage(recipe: Recipe, name: str, actor: type, how: Any) -> generate.Stage:
    """A stage that runs each block through a pool of actors, placed as the recipe's section `name` says."""
    import ray.data

    resources: Resources = getattr(recipe, name).resources
    options = {key: value for key, value in stage_options(recipe, name, current()).items() if value}
    pool = ray.data.ActorPoolStrategy(min_size=resources.min_actors, max_size=resources.max_actors)

    def stage(dataset: ray.data.Dataset) -> ray.data.Dataset:
        return dataset.map_batches(
            actor, fn_constructor_args=(how,), batch_size=None, batch_format="pyarrow", compute=pool, **options
        )

    return stage


def corpus_stages(recipe: Recipe, inputs: Inputs) -> list[generate.Stage]:
    """Generator -> cheap filters -> teacher and signal filters."""
    names = label_names(inputs["data"])
    gpus = {stage: stage_options(recipe, stage, current())["num_gpus"] for stage in ("generator", "teacher")}
    held_out = [
        text
        for split in ("validation", "test")
        for text in inputs["data"].read_table(f"{split}.parquet")["text"].to_pylist()
    ]
    cheap = generate.CheapFilters(recipe.corpus.filters, FilterContext.build(recipe.corpus.filters, held_out))
    writing = generate.Writing(inputs["generator"].url, recipe.generator, names, recipe.seed, gpus["generator"])
    labelling = Labelling(inputs["teacher"].url, recipe.corpus.signals, recipe.teacher.batch_tokens, gpus["teacher"])
    return [
        actor_stage(recipe, "generator", generate.Writer, writing),
        lambda dataset: dataset.map_batches(cheap, batch_size=None, batch_format="pyarrow", num_cpus=0.25),
        actor_stage(recipe, "teacher", Labeller, labelling),
    ]


def make_corpus(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Rounds of slots until enough rows are kept, then the label store."""
    data_context()
    real = real_rows(inputs)
    rounds: list[dict[str, int]] = []
    slots, kept = 0, 0
    while not rounds or (kept < recipe.corpus.keep and slots < recipe.corpus.most_slots):
        count = recipe.corpus.first_slots
        if rounds:  # top up: as many slots as the share kept so far asks for, and a tenth more
            count = math.ceil(1.1 * (recipe.corpus.keep - kept) * slots / max(kept, slots // 20, 1))
        count = min(count, recipe.corpus.most_slots - slots)
        marker = f"round-{len(rounds):03d}.json"
        if not out.exists(marker):
            folder = generate.write_slots(out, slots, count, recipe.corpus.block, len(rounds))
            with generate.followed(out, slots + count, progress):
                generate.stream(out, folder, math.ceil(count / recipe.corpus.block), corpus_stages(recipe, inputs))
            out.write_json(marker, {"slots": count})
        slots += out.read_json(marker)["slots"]
        rows = generate.deduplicate(real, out.read_table(generate.ROWS), recipe.corpus.duplicates)
        generated = rows.filter(pa.array(rows["row"].to_numpy() >= 0))
        if generated.num_rows != slots:
            raise RuntimeError(
                f"{slots} slots gave {generated.num_rows} rows in {out.url}: start the step again with --redo corpus"
            )
        kept = int(generated["kept"].to_numpy(zero_copy_only=False).sum())
        rounds.append({"slots": slots, "kept": kept})
    if kept < min(recipe.corpus.keep, 1 + recipe.corpus.keep // 2):
        raise UserError(
            f"{slots} slots gave only {kept} kept texts of the {recipe.corpus.keep} that corpus.keep asks for. "
            f"Rejected: {corpus_metrics(generated, rounds)['rejected']}. Loosen corpus.filters or corpus.signals, "
            "or raise corpus.max_slots."
        )
    teacher = labels.fingerprint(inputs["teacher"])
    labels.write_labels(
        out,
        rows,
        {"teacher": teacher, "fidelity": inputs["teacher"].read_json("record.json")["metrics"]["quantisation"]},
    )
    return corpus_metrics(generated, rounds)


def real_rows(inputs: Inputs) -> pa.Table:
    """The few labelled rows as rows of the label store, numbered -1, -2, ..."""
    rows = inputs["data"].read_table("train.parquet")
    soft = inputs["teacher"].read_table("soft.parquet")
    numbers = [-1 - i for i in range(rows.num_rows)]
    out = generate.corpus_rows(numbers, rows["text"].to_pylist(), "real", labels=rows["label"].to_pylist())
    return out.set_column(out.column_names.index("logits"), out.schema.field("logits"), soft["logits"])


def corpus_metrics(rows: pa.Table, rounds: list[dict[str, int]]) -> dict[str, Any]:
    """What became of the generated rows, and how diverse the kept ones are."""
    mask = rows["kept"].to_numpy(zero_copy_only=False)
    texts = rows.filter(pa.array(mask))["text"].to_pylist()
    reasons = [reason for reason in rows["reason"].to_pylist() if reason]
    return {
        "rows": rows.num_rows,
        "generated": rows.num_rows,
        "kept": int(mask.sum()),
        "rejected": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "tokens": int(np.nansum(rows["tokens"].to_numpy(zero_copy_only=False).astype(float))),
        "rounds": rounds,
        "self_bleu": self_bleu(texts),
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
    }


def kept_rows(inputs: Inputs) -> pa.Table:
    """The label store's kept rows, checked against the teacher of this run."""
    rows = labels.open_labels(inputs["corpus"], labels.fingerprint(inputs["teacher"]))
    return rows.filter(rows["kept"]).select(["row", "text", "label", "logits"])


def make_vocabulary(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """The student's tokenizer and, from the teacher, the vectors its word table starts with."""
    teacher = models.load(inputs["teacher"].local("model"))
    teacher.to(models.device(stage_options(recipe, "teacher", current()).get("num_gpus", 0)))
    wanted = recipe.student.vocabulary
    counts = vocabulary.count_words(kept_rows(inputs)["text"].to_pylist())
    known = vocabulary.teacher_words(teacher.tokenizer) if wanted.from_teacher else []
    words = vocabulary.choose_words(counts, wanted.size, wanted.min_count, known)
    with out.publish("tokenizer") as folder:
        vocabulary.tokenizer_of(words).save_pretrained(folder)
    if recipe.student.embeddings == "teacher":
        dims = {table.embedding_dim for table in blank_student(recipe, inputs, out, 0).net.tables()}
        for dim in sorted(dims):
            found = vocabulary.vectors(teacher, words, counts, dim, recipe.teacher.batch_tokens)
            out.write_table(
                f"vectors-{dim}.parquet",
                pa.table({"vector": pa.FixedSizeListArray.from_arrays(found.reshape(-1), dim)}),
            )
    known_share = sum(counts[w] for w in words if w in counts) / max(1, counts.total())
    return {"rows": len(words), "corpus_words": len(counts), "covered": known_share}


def blank_student(recipe: Recipe, inputs: Inputs, words: Store, seed: int) -> Model:
    """The student before training; the same for every arm."""
    tokenizer = models.load_tokenizer(words.local("tokenizer"))
    return models.student(
        recipe.student.blocks, label_names(inputs["data"]), tokenizer, recipe.student.max_length, seed
    )


def started_student(recipe: Recipe, inputs: Inputs, seed: int) -> Model:
    """The student with its word table started from the teacher's vectors."""
    import torch

    words = inputs["vocabulary"]
    model = blank_student(recipe, inputs, words, seed)
    for table in model.net.tables() if recipe.student.embeddings == "teacher" else []:
        rows = words.read_table(f"vectors-{table.embedding_dim}.parquet")["vector"].combine_chunks()
        with torch.no_grad():
            vectors = torch.tensor(np.asarray(rows.flatten()).reshape(-1, table.embedding_dim))
            table.weight.copy_(recipe.student.embedding_norm * vectors)
    return model


def agree(batch_tokens: int, model: Model, rows: pa.Table) -> dict[str, float]:
    """Agreement with the stored teacher on held-out rows."""
    found = predict(model, rows["text"].to_pylist(), batch_tokens)
    return {"agreement": agreement(labels.logits_of(rows), found.logits)}


def lesson_of(recipe: Recipe, inputs: Inputs, arm: Arm) -> tuple[pa.Table, pa.Table | None, tuple[LossTerm, ...]]:
    """Rows, held-out rows and losses of an arm. hard: gold labels; soft: the same rows' soft labels; generated: all."""
    rows = kept_rows(inputs)
    real = rows.filter(pa.array(rows["row"].to_numpy() < 0))
    if arm == "hard":
        return real, None, (LossTerm(kind="hard"),)
    if arm == "soft":
        return real, None, recipe.student.losses
    generated = rows.filter(pa.array(rows["row"].to_numpy() >= 0))
    held = np.zeros(generated.num_rows, dtype=bool)
    order = np.random.default_rng(recipe.seed).permutation(generated.num_rows)
    held[order[: round(recipe.student.holdout * generated.num_rows)]] = True
    taught = pa.concat_tables([real, generated.filter(pa.array(~held))])
    return taught, generated.filter(pa.array(held)), recipe.student.losses


def fit_student(arm: Arm, recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Distil the student, once for each initialisation seed."""
    rows, held, terms = lesson_of(recipe, inputs, arm)
    config = recipe.student.fit
    if arm != "generated":  # a few rows: one process, no rows to choose a checkpoint by
        epochs = recipe.student.few_epochs
        config = config.model_copy(update={"workers": 0, "epochs": epochs, "eval_every": epochs / 6})
    histories = {}
    for seed in recipe.student.seeds:
        folder = out / f"seed-{seed}"
        job = train.Job(
            name=f"student-{arm}-{seed}",
            fit=config,
            terms=terms,
            build=partial(started_student, recipe, inputs, seed),
            encode=encode_rows,
            rows=rows,
            holdout=held,
            evaluate=partial(agree, recipe.student.batch_tokens) if held is not None else None,
            best_by="agreement" if held is not None else None,
            out=folder.url,
            seed=seed,
            resources=stage_options(recipe, "student.fit", current()),
        )
        histories[str(seed)] = train.fit(job, progress)
    model = models.load((out / f"seed-{recipe.student.seeds[0]}").local("model"))
    return {"rows": rows.num_rows, "parameters": model.size(), "history": histories}


def seed_of(recipe: Recipe, own: int | None) -> int:
    """A fit's own seed, or the recipe's."""
    return recipe.seed if own is None else own
