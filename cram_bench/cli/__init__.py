"""The command line: ``cram-bench train | sweep | report | reproduce | renew | probe | explore | export | runs |
settings``.

Its words are in `grammar`, what each command does in `commands` and `exploring`, how a terminal is told of it in
`terminal`. Nothing heavy is imported before a command is known, so that ``--help`` answers at once.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import shlex
import sys
from collections.abc import Sequence

from cram_bench.cli import commands
from cram_bench.cli.grammar import parser_of_commands
from cram_bench.cli.terminal import Printable, as_can_be, line_of, say, warnings_on_a_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 when done, 1 after a problem said in one line, 2 a wrong call, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("cram_bench", as_can_be)
        sys.stdout.reconfigure(errors="cram_bench")
    parser = parser_of_commands()
    arguments, others = parser.parse_known_args(argv)
    if others:
        how = "; settings are given as -s NAME VALUE, and `cram-bench settings` lists them"
        parser.error(
            f"unrecognized arguments: {shlex.join(others)}{how if arguments.run is commands.run_train else ''}"
        )
    arguments.argv = argv
    try:
        with warnings_on_a_line(), contextlib.redirect_stdout(Printable(sys.stdout)):  # type: ignore[type-var]
            return arguments.run(arguments)
    except KeyboardInterrupt:
        on = "; the same command goes on from the last finished epoch" if arguments.run in commands.TRAINING else ""
        print(f"interrupted{on}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        say(line_of(error))
        return 1
