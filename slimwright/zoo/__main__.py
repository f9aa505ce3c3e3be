"""``python -m slimwright.zoo NAME``: train a model of the zoo, or find it in the cache; print where it is."""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; see cli.py

from slimwright.errors import SlimwrightError
from slimwright.zoo.recipes import RECIPES
from slimwright.zoo.trained import cached, record, trained

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Print the model's directory and its held-out figure on stdout; logs go to stderr. Exit codes as the CLI's."""
    parser = argparse.ArgumentParser(prog="python -m slimwright.zoo", description=__doc__)
    parser.add_argument("name", nargs="?", help="a model, e.g. gpt2; any verb takes it as zoo:gpt2 too")
    parser.add_argument("--list", action="store_true", help="the models, and which are trained")
    given = parser.parse_args(arguments)
    if given.list == (given.name is not None):
        parser.error("give NAME or --list")
    try:
        if given.list:
            for name, recipe in RECIPES.items():
                print(f"{name:18} {'trained' if cached(name) else '       '}  {recipe.description}")
        else:
            directory = trained(given.name)
            facts = record(directory)
            before = f" ({facts['before']:.4f} before)" if "before" in facts else ""
            print(f"{directory}\n{facts['metric']}: {facts['value']:.4f}{before}")
    except SlimwrightError as failure:
        print(f"slimwright: {failure}", file=sys.stderr)
        return failure.exit_code
    except KeyboardInterrupt:
        print(
            "\nslimwright: Interrupted; what is finished is kept. Continue with:\n"
            f"python -m slimwright.zoo {given.name}",
            file=sys.stderr,
        )
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
