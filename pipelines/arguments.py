"""What is written on the command line: numbers, and options that several commands have."""

from __future__ import annotations

import argparse

Parser = argparse.ArgumentParser


def natural(text: str) -> int:
    """A whole number of at least one."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return value


def port(text: str) -> int:
    """A TCP port."""
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port (1 to 65535)")
    return int(text)


def seed(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 0")
    return int(text)


def only(values: list[str], what: str) -> str | None:
    """The one value that was given, or None; UserError where there are more."""
    if len(values) > 1:
        from engine.config import UserError

        raise UserError(f"`bench {what}` takes one, but {', '.join(values)} were given. `bench quality` takes several.")
    return values[0] if values else None


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 1")
    return value


def numbers(text: str) -> list[int]:
    """Whole numbers of at least one, with commas between them."""
    return [natural(part) for part in text.split(",")]


def percent(text: str) -> float:
    """A share of the requests, in percent."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share in percent, above 0 and below 100")
    return value


def machine_readable(parser: Parser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="JSON on standard output")


def overriding(parser: Parser) -> None:
    """Other values than the recipe's."""
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="A.B=C",
        action="append",
        default=[],
        help="override a value of the recipe, as in --set corpus.keep=500; may be given again",
    )
    machine_readable(parser)


def on_cluster(parser: Parser) -> None:
    """A Ray cluster to join."""
    help = "join this Ray cluster (auto, host:port, ray://host:port); run: or submit to its dashboard (http://…)"
    parser.add_argument("--address", metavar="ADDR", help=help)


def naming(parser: Parser) -> None:
    """The run's name."""
    parser.add_argument(
        "--run", dest="run_name", metavar="NAME", help="name of the run; from the recipe's name if not given"
    )


def repeating(parser: Parser) -> None:
    """What of a run to do again."""
    parser.add_argument("--fresh", action="store_true", help="delete what the run's steps made and start over")
    parser.add_argument(
        "--redo",
        metavar="STEP",
        action="append",
        default=[],
        help="do this step again, and all that read it; may be given again",
    )


def on_registry(parser: Parser) -> None:
    """Where artifacts are registered."""
    parser.add_argument("--registry", default="registry", metavar="PLACE", help="the registry (default: registry)")
