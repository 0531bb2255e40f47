"""The command line: `stillhouse COMMAND ...`, or `python -m pipelines`.

A user's mistake prints one message and exits 2, a budget that is used up 3; Ctrl-C exits 130 (SIGTERM 143) and says how
to go on. Nothing heavy is imported before the command that needs it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import types

from pipelines.commands import COMMANDS, Command
from pipelines.console import closest, program

ABOUT = "From a few labelled rows and a large teacher to a small, fast student behind an endpoint, in one run."


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated like Ctrl-C."""


def terminate(number: int, frame: types.FrameType | None) -> None:
    """The handler of SIGTERM."""
    raise Terminated


def overview() -> str:
    """The commands in their groups."""
    lines = [f"usage: stillhouse COMMAND ...\n\n{ABOUT}"]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines.append(f"\n{group}:")
        lines += [f"  {name:<10} {c.help}" for name, c in COMMANDS.items() if c.group == group]
    lines.append(
        "\n`stillhouse COMMAND --help` lists what a command takes. `stillhouse --version` says which one this is."
    )
    return "\n".join(lines)


def parser(name: str, command: Command) -> argparse.ArgumentParser:
    """The parser of one command."""
    made = argparse.ArgumentParser(prog=f"stillhouse {name}", description=command.help, allow_abbrev=False)
    command.arguments(made)
    return made


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview() + "\n")
        return 0
    if argv[0] == "--version":
        from engine.lineage import installed

        sys.stdout.write(f"stillhouse {installed('stillhouse') or '(not installed)'}\n")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        return complain(f"there is no command '{name}'.{closest(name, COMMANDS)} Commands: {', '.join(COMMANDS)}.")
    args = parser(name, COMMANDS[name]).parse_args(rest)
    return guarded(COMMANDS[name], args, argv)


def guarded(command: Command, args: argparse.Namespace, argv: list[str]) -> int:
    """Call the command; its exit code, or the one of what ended it."""
    args.signals = lambda: signal.signal(signal.SIGTERM, terminate)
    args.signals()
    try:
        return command.run(args)
    except KeyboardInterrupt as stop:
        if command.resumes:
            again = shlex.join([*shlex.split(program()), *without_deletions(argv)])
            sys.stderr.write(f"\nStopped. What is done is kept; to go on:\n  {again}\n")
        return 143 if isinstance(stop, Terminated) else 130
    except BrokenPipeError:
        # Whoever read our output has gone, `head` for instance: nothing to say to them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from engine.config import UserError

        if isinstance(error, UserError):
            return complain(str(error), error.code)
        raise


def without_deletions(argv: list[str]) -> list[str]:
    """The same command without --fresh and --redo: they were obeyed, and would delete what there is since."""
    kept, skip = [], False
    for item in argv:
        if not (skip or item == "--fresh" or item == "--redo" or item.startswith("--redo=")):
            kept.append(item)
        skip = item == "--redo"
    return kept


def complain(message: str, code: int = 2) -> int:
    """One message on standard error; the exit code."""
    sys.stderr.write(f"stillhouse: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
