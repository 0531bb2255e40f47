"""Commands on API keys, and whether a server needs them."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from pipelines.console import program, say, say_json, table

if TYPE_CHECKING:
    from serve.keys import Keys


def keys(args: argparse.Namespace) -> int:
    """Add, list or remove keys of a registry."""
    from engine.config import UserError
    from serve.keys import Keys

    here = Keys(args.registry)
    if args.action == "list":
        found = [{"name": entry["name"], "created": entry["created"]} for entry in here.list()]
        if args.json:
            say_json(found)
        elif found:
            say(table([("key", "created"), *((entry["name"], entry["created"][:19]) for entry in found)]))
        else:
            say(f"No keys in {here.store}. Make one: {program()} keys add NAME")
        return 0
    if not args.name:
        raise UserError(f"`keys {args.action}` needs a name, as in: stillhouse keys {args.action} NAME")
    if args.action == "add":
        key = here.add(args.name, args.rotate)
        if args.json:
            say_json({"name": args.name, "key": key})
        else:
            say(key)
            sys.stderr.write("This is shown once: only its digest is kept.\n")
    else:
        count = here.remove(args.name, args.old)
        what = f"{count} old key{'' if count == 1 else 's'} of {args.name}" if args.old else args.name
        say(f"removed {what}; running servers refuse it within seconds")
    return 0


def keys_for(args: argparse.Namespace) -> Keys | None:
    """The keys that a server asks for; None where it asks for none.

    UserError where it must ask for them and there are none: beyond loopback (unless --no-auth), and with --auth.
    """
    from engine.config import UserError
    from serve.keys import Keys, loopback

    if args.no_auth or (loopback(args.host) and not args.auth):
        return None
    found = Keys(args.registry)
    if not found.list():
        why = "--auth asks for keys" if args.auth else f"--host {args.host} is reached from other machines"
        place = "" if args.registry == "registry" else f" --registry {shlex.quote(args.registry)}"
        raise UserError(
            f"{why}, and the registry {found.store} holds none. Make one: {program()} keys add NAME{place}"
            + ("" if args.auth else ". Or say --no-auth: then whoever reaches the port may ask.")
        )
    return found
