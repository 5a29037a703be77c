"""Write the reference of the command line from its parser: python docs/commands.py > FILE."""

import argparse
import os

os.environ["COLUMNS"] = "100"  # of the help texts

from mmtard_bench.cli import _parser


def main() -> None:
    """Print a page: each command with its help."""
    parser = _parser()
    print("# Commands\n\nWritten from the parser. Every command also prints this with `--help`.\n")
    print(f"```text\n{parser.format_help().rstrip()}\n```")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                print(f"\n## {name}\n\n```text\n{command.format_help().rstrip()}\n```")


if __name__ == "__main__":
    main()
