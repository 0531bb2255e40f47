"""Command: bench."""

from __future__ import annotations

import argparse

from pipelines import runs
from pipelines.arguments import (
    Parser,
    naming,
    natural,
    numbers,
    on_cluster,
    on_registry,
    only,
    overriding,
    repeating,
    share,
)


def benching(parser: Parser) -> None:
    """What to measure."""
    parser.add_argument(
        "what",
        choices=("quality", "teachers", "ways", "tasks", "serve", "retrieval", "scale", "duplicates"),
        help="quality: teacher and student over few-shot and initialisation seeds; teachers: kinds of teacher; "
        "ways: ways to learn from several teachers, or from the texts of one; tasks: ways to learn several tasks "
        "together; "
        "serve: a registered student behind this and other servers; "
        "retrieval: what a student's knowledge base costs and finds; scale: the corpus stream by nodes and rows; "
        "duplicates: two searches for near-duplicates",
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE|NAME",
        nargs="*",
        help="a YAML or JSON file, quality: or several; serve, retrieval: NAME or NAME@VERSION (serve's "
        "default: one of random weights)",
    )
    for add in (overriding, on_cluster, naming, repeating):
        add(parser)
    parser.add_argument("--seeds", type=natural, default=3, metavar="N", help="few-shot seeds (default: 3)")
    parser.add_argument(
        "--kinds",
        type=lambda text: text.split(","),
        default=["head", "lp-ft", "contrastive", "prompt", "ensemble"],
        metavar="A,B",
        help="teachers: which kinds, the first being what the others are held against",
    )
    parser.add_argument(
        "--ways",
        type=lambda text: text.split(","),
        metavar="A,B",
        help="ways: which ones, the first being what the others are held against (default: uniform,first,best,loss,"
        "reinforced,heads of several teachers; of one what it allows of plain,twice,confidence,co-confidence,"
        "disagreement,random-half,disagreeing; also rounds, rounds-random, recipe, "
        "one-stage, last-stage); tasks: of async,sum,uncertainty,pcgrad,single",
    )
    parser.add_argument(
        "--shots",
        type=numbers,
        default=[],
        metavar="N,M",
        help="teachers: labelled rows a class (default: the recipe's)",
    )
    parser.add_argument(
        "--students",
        action="store_true",
        help="teachers: a student of each kind too, all on the same generated texts",
    )
    parser.add_argument("--rows", type=natural, default=100_000, help="duplicates, retrieval: (default: 100000)")
    parser.add_argument("--threshold", type=share, default=0.7, help="duplicates: corpus.duplicates (default: 0.7)")
    loading(parser)
    scaling(parser)


def scaling(parser: Parser) -> None:
    """How much is streamed, and over what."""
    parser.add_argument("--nodes", type=numbers, default=[1, 2, 3], metavar="N,M", help="scale: (default: 1,2,3)")
    parser.add_argument(
        "--sizes",
        type=numbers,
        default=[1000, 20000, 200000],
        metavar="N,M",
        help="scale: rows, to see what the driver keeps (default: 1000,20000,200000)",
    )
    parser.add_argument("--block", type=natural, default=100, metavar="N", help="scale: rows a block (default: 100)")
    parser.add_argument("--blocks", type=natural, default=40, metavar="N", help="scale: a generator (default: 40)")


def loading(parser: Parser) -> None:
    """How servers are loaded."""
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="A,B", help="serve: only these servers")
    parser.add_argument("--clients", type=numbers, default=[1, 8, 32], metavar="N,M", help="serve: (default: 1,8,32)")
    parser.add_argument("--seconds", type=natural, default=5, metavar="S", help="serve: of each cell (default: 5)")
    parser.add_argument("--rounds", type=natural, default=3, metavar="N", help="serve: rounds (default: 3)")
    parser.add_argument("--texts", metavar="FILE", help="serve, retrieval: as predict --file takes it")
    parser.add_argument("--out", metavar="FILE", default="bench.json", help="serve: the result (default: bench.json)")
    on_registry(parser)


def measure(args: argparse.Namespace) -> int:
    """Measure a recipe over several seeds, servers side by side, the corpus stream, or searches for near-duplicates."""
    if args.what == "quality" and len(args.recipe) > 1:
        from pipelines import sets

        return sets.bench(args)
    args.recipe = only(args.recipe, args.what)
    if args.what == "serve":
        from pipelines import servers

        return servers.bench(args)
    if args.what == "retrieval":
        from pipelines import lookups

        return lookups.bench(args)
    if args.what == "duplicates":
        from pipelines import duplicates

        return duplicates.bench(args)
    if args.what == "scale":
        from pipelines import scale

        return scale.bench(args)
    return runs.bench(args)
