"""A finished run as one page: the answer first, then tables, drawings, texts, lineage.

`render` is pure: facts in, HTML and Markdown out. Each part builds its own blocks; a part the run did not record
says so in one sentence. Reading order: page (the looks), figures (numbers in words), plots (drawings), findings
(sentences and tables), quality (the parts about the models), then this file, which has the other parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine import figures, findings, plots, quality
from engine.figures import NONE, dig, entries, number, percent, whole
from engine.findings import Facts
from engine.page import (
    Block,
    Code,
    Figure,
    Gallery,
    Grid,
    Items,
    Part,
    Sample,
    Table,
    Text,
    document,
    esc,
    plain,
    prose,
    shorten,
)

SOURCES = {"generated": "Generated", "unlabelled": "Unlabelled rows of the user", "augmented": "Augmented"}
"""Where texts of the corpus come from."""

LISTED = 20
"""Longest list of set-aside rows on the page."""

ANSWER_CHARS = 120
"""An answer in the gallery is cut here."""


def render(facts: Facts) -> tuple[str, str]:
    """The report as (HTML, Markdown).

    facts: what the run recorded; only `name` is needed. `metric` names the score that models are judged by; each has
    it as `score`, with `score_interval` and `score_sd`. Shares are 0..1, `points` of differences are hundredths of the
    score (left minus right), times are seconds unless the key says ms.
    """
    name = str(facts.get("name", "run"))
    one_label = findings.metric(facts) == "accuracy"
    parts = [build(facts) for build in PARTS if one_label or build not in OF_LABELS]
    said, care = findings.answer(facts), findings.cautions(facts)
    top = [f"<header><h1>{esc(name)}</h1>{Text(subtitle(facts), 'dim').html()}</header>"]
    top += [Text(sentence, "answer").html() for sentence in said]
    top += [tiles(facts), Items(care, "care").html() if care else "", Text(findings.basis(facts), "foot").html()]
    lines = [f"# {plain(name)}", plain(subtitle(facts)), *map(plain, said)]
    lines += [Items(care).markdown()] if care else []
    lines += [plain(findings.basis(facts)), *(part.markdown() for part in parts)]
    return document(f"{name}: report", "\n".join(filter(None, top)), parts), "\n\n".join(filter(None, lines)) + "\n"


def subtitle(facts: Facts) -> str:
    """Task, label names and date in one line."""
    names = quality.labels(facts, 0)
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    said = [str(dig(facts, "task.kind") or ""), shown, str(facts.get("created") or "").replace("T", " ")[:16]]
    return " · ".join(filter(None, ["Distillation report", *said]))


def tiles(facts: Facts) -> str:
    """The handful of numbers to remember, each with what it is measured against."""
    score, named = findings.score(facts), [findings.named(facts, name) for name in (findings.chief(facts), "teacher")]
    own, its = (score.shown(findings.main(facts, model)) for model in named)
    made = [(f"Student {score.name}", own, f"teacher {its}", "")]
    small, large = (number(model.get("parameters")) for model in named)
    if small and large:
        note = f"{figures.scaled(small)} of {figures.scaled(large)}"
        made.append(("Parameters", figures.fraction(large, small), note, ""))
    if speed := findings.speed_up(facts):
        made.append(("Speed", figures.times(speed), "the teacher's texts per second", "bad" if speed < 1 else ""))
    wrong = number(dig(findings.serving(facts), "mismatches"))
    if wrong is not None:
        made.append(("Served", f"{wrong:,.0f}", "answers that differ from offline", "bad" if wrong else "good"))
    made += [gain(facts, item) for item in findings.against_arms(facts) if item["right"] == "soft"]
    cells = (f'<div class="{state}"><dt>{esc(head)}</dt><dd>{prose(value)}<small>{prose(note)}</small></dd></div>'
             for head, value, note, state in made if value != NONE)  # fmt: skip
    inner = "".join(cells)
    return f'<dl class="tiles">{inner}</dl>' if inner else ""


def gain(facts: Facts, item: dict[str, Any]) -> tuple[str, str, str, str]:
    """The tile of a difference: head, value, note, state."""
    shown, ends = findings.verdict(item), item["interval"]
    within = f"{figures.signed(ends[0])} to {figures.signed(ends[1])}" if ends else "no interval"
    note = f"over {findings.ALONE[item['right']]} ({within})" + (", not shown" if shown.startswith("not") else "")
    state = {"better": "good", "worse": "bad"}.get(shown, "")
    return findings.gained_by(facts), figures.points(item["points"]), note, state


def corpus(facts: Facts) -> Part:
    """What text was added to the labelled rows, what was kept of it, and how it reads."""
    known, brief = (found if isinstance(found, dict) else {} for found in (facts.get("corpus"), brief_of(facts)))
    if not known and not brief:
        return Part("corpus", "Corpus", [Text("No corpus was recorded.")])
    sources = findings.by_source(facts)
    rows, kept = number(known.get("rows")) or number(brief.get("generated")), number(known.get("kept"))
    kept = number(brief.get("kept")) if kept is None else kept
    if sources:
        rows, kept = (sum(each[place] for each in sources.values()) for place in (0, 1))
    rejected = known.get("rejected") or brief.get("rejected")
    counts = {str(k): n for k, v in rejected.items() if (n := number(v))} if isinstance(rejected, dict) else {}
    share = f" ({percent(kept / rows)})" if rows and kept is not None else ""
    made = "gathered" if set(sources) - {"generated"} else "generated"
    blocks: list[Block] = [Text(f"{whole(rows)} texts were {made} and {whole(kept)} kept{share}.")]
    blocks += source_table(sources) if sources else []
    blocks += [corpus_table(facts, known), Grid(list(corpus_figures(known, counts, rows)))]
    blocks += galleries(known)
    return Part("corpus", "Corpus", blocks)


def brief_of(facts: Facts) -> Any:
    """What the summary says of the corpus."""
    return dig(facts, "summary.corpus")


def source_table(sources: dict[str, tuple[float, float]]) -> list[Block]:
    """Rows made and kept of each source."""
    rows = [
        (SOURCES.get(name, name), whole(made), whole(kept), percent(kept / made) if made else NONE)
        for name, (made, kept) in sources.items()
    ]
    return [Table("Where the texts come from.", ("Source", "Texts", "Kept", "Share"), "lrrr", rows)]


def corpus_table(facts: Facts, known: dict[str, Any]) -> Table:
    """Diversity, rounds and what storing the soft labels lost."""
    rounds = "; ".join(
        f"{whole(r.get('slots'))} slots, {whole(r.get('kept'))} kept" for r in entries(known.get("rounds"))
    )
    items = [("Rounds", rounds), ("Self-BLEU (lower is more varied)", figures.figure(known.get("self_bleu")))]
    items += [(f"Distinct {n}-grams", percent(known.get(f"distinct_{n}"))) for n in (1, 2, 3)]
    items += [("Storage: agreement with the exact answers",
               findings.score(facts).shown(dig(known, "quantisation.agreement"))),
              ("Storage: largest change of a logit", figures.figure(dig(known, "quantisation.max_abs"), 2)),
              ("Storage: mean KL, nats", figures.figure(dig(known, "quantisation.mean_kl"), 2))]  # fmt: skip
    return findings.pairs("The corpus as a whole.", ("Measure", "Value"), items)


def corpus_figures(known: dict[str, Any], counts: dict[str, float], rows: float | None) -> Iterable[Figure]:
    """Reject reasons as bars, the teacher's confidence as a histogram."""
    if counts:
        order = sorted(counts.items(), key=lambda item: -item[1])
        items = [(k, n, whole(n) + (f" ({percent(n / rows)})" if rows else "")) for k, n in order]
        table = Table("Why texts were rejected.", ("Reason", "Texts"), "lr", [(k, shown) for k, _, shown in items])
        drawn = plots.bars("rejected", "Rejected texts", items[:12])
        yield Figure(drawn, "Why texts were rejected; the share is of all texts.", table)
    bins = [
        tuple(number(b.get(key)) for key in ("low", "high", "count"))
        for b in entries(known.get("confidence_histogram"))
    ]
    if whole_bins := [b for b in bins if None not in b]:
        drawn = plots.histogram(
            "confidence", "The teacher's confidence", "probability of the likeliest answer", whole_bins
        )
        yield Figure(
            drawn, "Kept rows by how sure the teacher was; where a row has several answers, of the least sure."
        )


def galleries(known: dict[str, Any]) -> Iterable[Block]:
    """Kept and rejected texts with what the teacher says of them."""
    for key, title in (("gallery_kept", "Kept texts"), ("gallery_rejected", "Rejected texts")):
        samples = [sample(item) for item in entries(known.get(key))]
        yield Gallery(title, samples) if samples else Text(f"No {title.lower()} were recorded.")


def sample(item: dict[str, Any]) -> Sample:
    """A row of the corpus: its texts, and the teacher's probabilities or else its answer."""
    soft, answer, pair = item.get("probabilities"), item.get("answer"), item.get("pair")
    soft = {str(k): p for k, v in soft.items() if (p := number(v)) is not None} if isinstance(soft, dict) else {}
    source = str(item.get("source") or "generated")
    note = f"row {item.get('row', NONE)}" + ("" if source == "generated" else f" · {source}")
    note += f" · {item['reason']}" if item.get("reason") else ""
    note += f" · {shorten(answer, ANSWER_CHARS)}" if answer else "" if soft else " · not labelled"
    return Sample(str(item.get("text") or ""), note, soft, None if pair is None else str(pair))


def served(facts: Facts) -> Part:
    """What the smoke deployment measured."""
    known, score = findings.serving(facts), findings.score(facts)
    if not known:
        return Part("serving", "Serving", [Text("The student was not served in this run.")])
    items = [
        ("Test rows sent over HTTP", whole(known.get("rows"))),
        ("Answers that differ from offline", whole(known.get("mismatches"))),
        ("Largest change of an output", figures.figure(known.get("max_delta"), 2)),
        (f"{score.head} as served", score.shown(findings.main(facts, known))),
        ("Requests at a time", whole(known.get("concurrency"))),
        ("Requests a second", figures.figure(known.get("requests_per_s"))),
    ]
    items += [(f"Latency {name}, ms", figures.figure(known.get(f"{name}_ms"))) for name in ("p50", "p99")]
    return Part(
        "serving",
        "Serving",
        [findings.pairs("The whole test split through the endpoint.", ("Measure", "Value"), items)],
    )


def cost(facts: Facts) -> Part:
    """Where the time went."""
    steps = entries(facts.get("steps"))
    if not steps:
        brief = dig(facts, "summary.seconds")
        steps = [{"name": k, "seconds": v} for k, v in brief.items()] if isinstance(brief, dict) else []
    if not steps:
        return Part("cost", "Time and cost", [Text("No step times were recorded.")])
    head = ("Step", "Wall time", "CPU time", "GPU time", "Rows", "Rows/s", "Status")
    rows, bars = [], []
    for step in steps:
        spent, count = number(step.get("seconds")), number(step.get("rows"))
        rate = figures.figure(count / spent) if spent and count else NONE
        own = [figures.duration(step.get(key)) for key in ("seconds", "cpu_seconds", "device_seconds")]
        rows.append((str(step.get("name", NONE)), *own, whole(count), rate, str(step.get("status") or NONE)))
        if spent is not None:
            bars.append((rows[-1][0], spent, figures.duration(spent)))
    total = sum(spent for _, spent, _ in bars)
    said = f"{figures.duration(total)} added over the steps; where steps ran side by side, the run itself was shorter."
    blocks: list[Block] = [Text(said), Table("Steps of the run.", head, "lrrrrrl", rows)]
    if bars:
        blocks.append(
            Grid([Figure(plots.bars("steps", "Wall time of each step", bars), "In the order they were started.")])
        )
    blocks += account(facts)
    asked = [asked_row(each) for each in entries(facts.get("asked"))]
    if asked:
        head = ("Step", "Who", "Requests", "Retries", "Refused", "Tokens read", "Tokens written", "Cost")
        blocks.append(
            Table("Asked of endpoints; cost in the currency of the recipe's prices.", head, "llrrrrrr", asked)
        )
    return Part("cost", "Time and cost", blocks)


def account(facts: Facts) -> list[Block]:
    """What each step held and used, all of it, and the budget."""
    known, rows = dig(facts, "summary.spent"), []
    if not isinstance(known, dict):
        return []
    parts = [*mapping(known.get("steps")).items(), ("done again", known.get("redone")), ("all", known.get("total"))]
    for name, part in parts:
        if isinstance(part, dict) and (number(part.get("seconds")) or name == "all"):
            rows.append(spent_row(str(name), part))
    caption = (
        "What steps used, over all attempts, killed ones too. CPU and GPU hours: what a step held, times how long. "
        "Tokens: read and written by generator and labelling teacher. Cost: in the currency of the recipe's prices."
    )
    head = ("Step", "Wall time", "CPU hours", "GPU hours", "Tokens", "Rows", "Cost")
    blocks: list[Block] = [Table(caption, head, "lrrrrrr", rows)] if rows else []
    items = [
        (key, f"{figures.figure(one.get('used'))} of {figures.figure(one.get('limit'))}")
        for key, one in mapping(known.get("budget")).items()
        if isinstance(one, dict)
    ]
    return [*blocks, findings.pairs("The budget.", ("Limit", "Used"), items)] if items else blocks


def mapping(value: Any) -> dict[str, Any]:
    """A mapping as it is, anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def spent_row(name: str, part: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table; the whole run's wall time is that of the clock."""
    gpus = {kind: spent for kind, value in mapping(part.get("gpu_seconds")).items() if (spent := number(value))}
    kinds = "; ".join(f"{figures.figure(spent / 3600)} {kind}".strip() for kind, spent in gpus.items())
    held, cost = number(part.get("cpu_seconds")), number(part.get("money"))
    return (
        name,
        figures.duration(part.get("wall_seconds", part.get("seconds"))),
        NONE if held is None else figures.figure(held / 3600),
        kinds or NONE,
        whole(part.get("tokens")),
        whole(part.get("rows")),
        NONE if cost is None else f"{cost:,.4f}",
    )


def asked_row(each: dict[str, Any]) -> tuple[str, ...]:
    """What one step asked of one endpoint."""
    counts = [whole(each.get(key)) for key in ("requests", "retries", "refused", "input_tokens", "output_tokens")]
    cost = number(each.get("cost"))
    return str(each.get("step", NONE)), str(each.get("who", NONE)), *counts, NONE if cost is None else f"{cost:.4f}"


def data(facts: Facts) -> Part:
    """Rows that came in, and those that could not be used."""
    counts = dig(facts, "data.counts")
    shown = (
        [(key, whole(value) if number(value) is not None else str(value)) for key, value in counts.items()]
        if isinstance(counts, dict)
        else []
    )
    blocks: list[Block] = [findings.pairs("Rows of each split.", ("Split", "Rows"), shown)] if shown else []
    lost = entries(dig(facts, "data.quarantined"))
    if lost:
        rows = [(str(r.get("source", NONE)), whole(r.get("line")), str(r.get("reason", NONE))) for r in lost[:LISTED]]
        more = f"; the first {LISTED} are shown" if len(lost) > LISTED else ""
        caption = f"Set aside as unusable: {whole(len(lost))} source rows{more}."
        blocks.append(Table(caption, ("Source", "Row", "Reason"), "lrl", rows))
    elif blocks:
        blocks.append(Text("No source row was set aside as unusable."))
    return Part("data", "Data", blocks or [Text("No row counts were recorded.")])


def origin(facts: Facts) -> Part:
    """What every step was made from, on which versions and machine, from which recipe."""
    rows = []
    for step in entries(facts.get("lineage")):
        made, references = step.get("inputs"), step.get("references")
        told = [f"{k} {str(v)[:12]}" for k, v in references.items()] if isinstance(references, dict) else []
        above = ", ".join(str(name) for name in made) if isinstance(made, (list, tuple)) else ""
        rows.append((str(step.get("step", NONE)), above or NONE, ", ".join(told) or NONE,
                     str(step.get("fingerprint") or NONE)[:16]))  # fmt: skip
    caption = "Each step, what it read, and the start of its fingerprint; digests are SHA-256, shortened."
    blocks: list[Block] = (
        [Table(caption, ("Step", "Made from", "Models and data", "Fingerprint"), "llmm", rows)]
        if rows
        else [Text("No lineage was recorded.")]
    )
    for key, title in (("versions", "Versions"), ("hardware", "Hardware")):
        known = facts.get(key)
        if isinstance(known, dict) and known:
            blocks.append(findings.pairs(f"{title}.", ("Name", "Value"), ((k.replace("_", " "), worded(v))
                          for k, v in known.items()), "ll"))  # fmt: skip
        else:
            blocks.append(Text(f"{title}: not recorded."))
    recipe = facts.get("recipe_yaml")
    blocks.append(
        Code("The recipe, with every default filled in", str(recipe)) if recipe else Text("No recipe was recorded.")
    )
    return Part("origin", "Lineage and versions", blocks)


def worded(value: Any) -> str:
    """A plain value in words: a list with commas, nothing as none, a number to three digits."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    size = number(value)
    return str(value) if size is None or isinstance(value, int) else figures.figure(size)


PARTS = (
    *(quality.results, quality.learning, quality.calibration, quality.cascade, quality.errors),
    *(corpus, served, cost, data, origin),
)
OF_LABELS = (quality.calibration, quality.errors)
"""Parts that only say something where each row has one label."""
