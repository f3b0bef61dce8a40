"""Command lines: every command and option the program has, with values good, odd and absurd."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import click
from fuzz_zoo import ARCH

from memcompile.compiler.cli import commands
from memcompile.models.memory import PRESETS

MODELS = ["model.pt2"] * 8 + ["llama"] + ["state.pt", "s.safetensors", "module.pt", "flat.pt2"]
FOLDERS = ["engine"] * 6 + ["hollow", "llama"]
_PATHS = """
    config.json text.txt ids.txt noise.bin empty hollow fitted.safetensors absent absent/deep
    engine/manifest.json engine/program.pt2 model.pt2/x . .. / ./model.pt2 ../here
"""
_NUMBERS = """
    0 1 2 3 8 16 63 64 65 -1 +1 -0 007 1_0 0x10 1e3 1.5 1e999 nan -inf none true
    2147483647 2147483648 9223372036854775807 9223372036854775808 18446744073709551616
    1000000000000000000000000000000 ٣ ½ ² 1,2 1+2 16,8 0.5 .5 0,1 1,
"""
ODD_PATHS, NUMBERS = _PATHS.split(), _NUMBERS.split()
TEXTS = [
    *(
        "",
        " ",
        "-",
        "--",
        "---",
        "=",
        ":",
        ",",
        "+",
        "a",
        "0",
        "one two",
        "1 2 3",
        "\n",
        "\t",
        "%s",
    ),
    *(
        "{}",
        "{0}",
        "$(touch canary)",
        "`touch canary`",
        "; touch canary",
        "'",
        '"',
        "\\",
        "../..",
        "~",
    ),
    *("é", "漢字", "\u202e", "\ufeff", "\U0001f600", "\udcff", "\x1b[31m", "\x07", "[red]x[/red]"),
    *("[/]", "x" * 300, "x" * 5000, "9" * 5000, "CON", "-h", "--help", "a=b", "a=b=c", "=a"),
]
# Options whose honest large values are honest long work.
WORK = {"--steps", "--samples", "--batch", "--repeat", "--runs", "--rounds", "--checkpoint-every"}
FEW = ["1", "2", "0", "-1", "x", "", "1.5", "nan", "²"]


def line(random: Random) -> list[str]:
    """One command line; file names are of a folder that holds the zoo."""
    if random.random() < 0.04:
        return [_word(random) for _ in range(random.randrange(5))]
    name = random.choice([*commands.commands, "build", "build", "inspect"])
    command = commands.commands[name]
    words: list[str] = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            words += [_operand(random, parameter)] * (random.random() < 0.95)
    options = [p for p in command.params if isinstance(p, click.Option)]
    required = [p for p in options if p.required and random.random() < 0.9]
    some = random.choices(options, k=random.choice((0, 0, 1, 1, 2, 3, 5))) if options else []
    if name == "run" and random.random() < 0.6:
        words += ["--ids", "--prompt", "1 2 3", "--max-new-tokens", "2"]
    for option in [*required, *some]:
        words += _option(random, option)
    # Without kernels: what is looked for here is not in the code that they generate.
    if any(p.name == "kernels" for p in options) and "--kernels" not in words:
        words += ["--kernels", "off"]
    if random.random() < 0.1:
        words = _damaged(random, words)
    if isinstance(command, click.Group):
        words = [random.choice([*command.commands, _word(random)]), *words]
    shown = [] if name == "build" and random.random() < 0.8 else [name]
    return [*shown, *words]


def _operand(random: Random, argument: click.Argument) -> str:
    if random.random() < 0.12:
        return random.choice([*ODD_PATHS, *TEXTS])
    known = FOLDERS if argument.name == "folder" else [*MODELS, *FOLDERS[:2]]
    return random.choice(known)


def _option(random: Random, option: click.Option) -> list[str]:
    flag = random.choice([*option.opts, *option.secondary_opts])
    if random.random() < 0.04:
        flag = _typo(random, flag)
    if option.is_flag or option.count:
        return [flag if random.random() < 0.97 else f"{flag}={_word(random)}"]
    value = _value(random, option)
    if random.random() < 0.03:
        return [flag]
    return [f"{flag}={value}"] if flag.startswith("--") and random.random() < 0.3 else [flag, value]


def _value(random: Random, option: click.Option) -> str:
    flag, kind = option.opts[0], option.type
    if random.random() < 0.08:
        return _word(random)
    if flag in WORK:
        return random.choice(FEW)
    if isinstance(kind, click.Choice):
        known = [str(getattr(c, "value", c)) for c in kind.choices if c not in ("auto", "required")]
        word = random.choice(known)
        return word if random.random() < 0.85 else _typo(random, word)
    if flag == "--policy":
        return policy(random)
    if flag == "--set":
        return _setting(random, random.choice(list(PRESETS)))
    if flag == "--arch":
        known = [
            ARCH,
            "nowhere:Net",
            "torch.nn:Linear",
            "pathlib:Path",
            ":",
            "a:",
            ".x:y",
            "..",
            "1:2",
        ]
        return random.choice([*known, f"{ARCH}.forward", "archive_payloads:", "os:getcwd", "a b:c"])
    if flag in ("--tasks", "--wording"):
        return ",".join(random.choices(["text_loss", "needle", "bytes", "natural", "x", ""], k=2))
    if flag == "--ids" or isinstance(kind, click.Path):
        outputs = ["out", "new/out", "engine", "out.safetensors", "out.html"]
        known = outputs if flag == "--out" else ["text.txt", "ids.txt", "config.json", "llama"]
        return random.choice([*known * 3, *ODD_PATHS])
    if kind is click.STRING and not isinstance(kind, click.ParamType | type(None)):
        return _word(random)
    if kind is click.STRING:
        return random.choice([*TEXTS, *NUMBERS])
    return random.choice(NUMBERS)


def policy(random: Random) -> str:
    """A policy with fields, mostly one that exists."""
    name = random.choice([*PRESETS, *PRESETS, "fitted.safetensors", "absent.safetensors", ""])
    if random.random() < 0.06:
        name = _typo(random, name)
    kind = name if name in PRESETS else random.choice(list(PRESETS))
    fields = [_setting(random, kind) for _ in range(random.choice((0, 0, 1, 2, 3)))]
    return f"{name}:{','.join(fields)}" if fields else name


def _setting(random: Random, kind: str) -> str:
    fields = [f.name for f in dataclasses.fields(PRESETS[kind])]  # type: ignore[arg-type]
    name = random.choice([*fields, "max_context"]) if random.random() < 0.95 else _word(random)
    default: Any = next(
        (f.default for f in dataclasses.fields(PRESETS[kind]) if f.name == name),  # type: ignore[arg-type]
        None,
    )
    values = [str(default).lower(), *random.choices(NUMBERS, k=3), "mean-std", "0=dense+1=scout"]
    value = random.choice(values) if random.random() < 0.93 else _word(random)
    return f"{name}={value}"


def _word(random: Random) -> str:
    return random.choice([*TEXTS, *NUMBERS, *ODD_PATHS, *commands.commands])


def _typo(random: Random, word: str) -> str:
    if not word:
        return "x"
    at = random.randrange(len(word))
    return random.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + "x" + word[at:],
            word.upper(),
            word + word,
            word[:at],
        ]
    )


def _damaged(random: Random, words: list[str]) -> list[str]:
    words = list(words)
    match random.randrange(4):
        case 0 if words:
            del words[random.randrange(len(words))]
        case 1:
            words.insert(random.randint(0, len(words)), _word(random))
        case 2 if words:
            at = random.randrange(len(words))
            words.insert(at, words[at])
        case _:
            random.shuffle(words)
    return words
