"""`memcompile completion SHELL`: the script that lets a shell complete commands and paths."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, ShellComplete, get_completion_class

from .options import Choice

VARIABLE = "_MEMCOMPILE_COMPLETE"
# click's own lets file names take the place of all else. Here the first word may be a command or a
# path, and both are offered.
_BASH = r"""%(complete_func)s() {
    local IFS=$'\n' response completion kind value
    response=$(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD \
        %(complete_var)s=bash_complete $1)
    COMPREPLY=()
    for completion in $response; do
        IFS=',' read -r kind value <<< "$completion"
        if [[ $kind == dir ]]; then
            compopt -o filenames
            COMPREPLY+=($(compgen -d -- "$value"))
        elif [[ $kind == file ]]; then
            compopt -o filenames
            COMPREPLY+=($(compgen -f -- "$value"))
        else
            COMPREPLY+=("$value")
        fi
    done
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


@click.command()
@click.argument("shell", type=Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands, options and paths in a shell."""
    root = context.find_root()
    script = _kind(shell)(root.command, {}, root.info_name or "memcompile", VARIABLE)
    click.echo(script.source(), nl=False)


class _Bash(BashComplete):
    source_template = _BASH

    def source(self) -> str:
        """Whatever bash is here: the script may be for another machine."""
        return self.source_template % self.source_vars()


def _kind(shell: str) -> type[ShellComplete]:
    found = _Bash if shell == "bash" else get_completion_class(shell)
    assert found is not None
    return found
