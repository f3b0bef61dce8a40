"""Model files that were damaged, or made by somebody who means ill: one function a kind of file.

Each takes a generator, the folder of the zoo, the case's own folder and the path that a payload
would make if it ran; it leaves a file there and returns the command line that is to read it.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy as copy_of
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

from archive_payloads import (
    CONSTANTS,
    PLANTS,
    PROGRAM,
    WEIGHTS,
    Entries,
    Touch,
    code,
    torch_pickle,
    write_entries,
)
from fuzz_lines import policy
from fuzz_zoo import ARCH, copy

Mutator = Callable[[Random, Path, Path, Path], list[str]]
STRAY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 40, 1 << 63, -(1 << 63), 1 << 64, 10**30),
    *(0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "s0", "0", "é", "\x00", "../x", "/x"),
    *("x" * 2000, "float32", "llama", "F32", [], {}, [1], [[]], {"x": 1}, {"as_int": 1}),
    *({"name": "x"}, [-1], [1 << 40], [0, 1 << 62], "\udcff", "true", "{{7*7}}", "%n"),
)
_TYPES = "llama gpt2 mistral qwen3 gpt_neox phi opt mamba bert t5 nope ../x"
MODEL_TYPES = _TYPES.split()


def any_place(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside JSON data."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from any_place(value, (*path, key))


def stray(random: Random) -> Any:
    """A value that belongs nowhere; one of its own, for it may be changed in turn."""
    return copy_of(random.choice(STRAY))


def mutate_json(random: Random, data: Any, marker: Path, times: int = 1) -> Any:
    """`data` with some values replaced, dropped, renamed or doubled."""
    for _ in range(times):
        places = list(any_place(data)) if isinstance(data, dict | list) else []
        if not places:
            return stray(random)
        *path, last = random.choice(places)
        holder = data
        for key in path:
            holder = holder[key]
        match random.randrange(11):
            case 0:
                del holder[last]
            case 1 if isinstance(holder, dict):
                holder[_name(random, marker)] = holder.pop(last)
            case 2 if isinstance(holder, list):
                holder.insert(last, holder[last])
            case 3:
                holder[last] = code(marker)
            case 4 | 5 | 6 if isinstance(holder[last], int) and not isinstance(holder[last], bool):
                holder[last] += random.choice((-1, 1, 8, 1 << 20))
            case 5 | 6 | 7:
                *other, end = random.choice(places)
                found = data
                try:
                    for key in (*other, end):
                        found = found[key]
                    holder[last] = json.loads(json.dumps(found))
                except (KeyError, IndexError, TypeError):  # what was changed above it
                    holder[last] = None
            case _:
                holder[last] = stray(random)
    return data


def _name(random: Random, marker: Path) -> str:
    return random.choice(["x", "", "a.b", "../x", f"x={code(marker)}", "é", "__class__", "self"])


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """`data` with some of its bytes flipped, cut off, doubled or moved."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(found)) if found else 0
        if random.random() < 0.3:  # directories and headers stand at the ends
            at = max(0, len(found) - random.randrange(1, 300)) if random.random() < 0.6 else at % 64
        match random.randrange(7):
            case 0 | 1 | 2 if found:
                found[at % len(found)] ^= 1 << random.randrange(8)
            case 3:
                del found[at:]
            case 4:
                found[at:at] = random.randbytes(random.choice((1, 8, 100)))
            case 5:
                found += found[:at]
            case _:
                del found[at : at + random.choice((1, 4, 64))]
    return bytes(found)


# --- export archives ---


def archive(random: Random, zoo: Path, here: Path, marker: Path) -> list[str]:
    """A .pt2 file."""
    path = here / random.choice(["m.pt2", "m.pt", "m", "m.safetensors"])
    with zipfile.ZipFile(zoo / "model.pt2") as clean:
        entries = {name.partition("/")[2]: clean.read(name) for name in clean.namelist()}
    _archive(random, entries, path, marker)
    return _reading(random, path.name)


def _archive(random: Random, entries: Entries, path: Path, marker: Path) -> None:
    kind = random.randrange(10)
    if kind < 5:
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            name = random.choice((PROGRAM, PROGRAM, PROGRAM, WEIGHTS, CONSTANTS))
            data = mutate_json(random, json.loads(entries[name]), marker)
            entries[name] = json.dumps(data).encode()
    elif kind == 5:
        random.choice(PLANTS).plant(entries, marker)
    elif kind == 6:
        name, other = random.choices(list(entries), k=2)
        match random.randrange(6):
            case 0:
                del entries[name]
            case 1:
                entries[name], entries[other] = entries[other], entries[name]
            case 2:
                entries[_entry_name(random)] = entries[name]
            case 3:
                entries[name] = mutate_bytes(random, entries[name])
            case 4:
                entries[name] = torch_pickle(marker)
            case _:
                entries[name] = random.choice(
                    (b"", b"{", b"[" * 100_000, b"null", b'"' + b"\\" * 9)
                )
    write_entries(entries, path, random.choice(["model"] * 9 + ["", "..", "a/b", "é"]))
    if kind == 7:
        with zipfile.ZipFile(path, "a", random.choice((8, 8, 0, 12, 14))) as out:
            out.writestr(f"model/data/weights/w{random.randrange(99)}", bytes(1 << 22))
            out.writestr(random.choice([f"model/{PROGRAM}", _entry_name(random)]), b"{}")
    elif kind >= 8:
        path.write_bytes(mutate_bytes(random, path.read_bytes()))


def _entry_name(random: Random) -> str:
    names = ["../x", "/x", "a\\..\\x", "..", "é", "x" * 3000, "data/../../x", "C:/x", "a//b", "./"]
    return random.choice(
        [*names, "data/weights/x.so", "models/other.json", "byteorder", "code/x.py"]
    )


def _reading(random: Random, name: str, *extra: str) -> list[str]:
    """A command that reads the file: looked at, built without a result, or with one."""
    return random.choice(
        [
            [
                "inspect",
                name,
                "--policy",
                policy(random) if random.random() < 0.2 else "scout",
                *extra,
            ],
            ["inspect", name, "--policy", "dense", "--json", *extra],
            ["build", name, "--dry-run", "--kernels", "off", *extra],
            ["build", name, "--out", "out", "--quiet", "--kernels", "off", *extra],
        ]
    )


# --- safetensors, pickles ---


def safetensors(random: Random, zoo: Path, here: Path, marker: Path) -> list[str]:
    """A state dict in safetensors whose header lies."""
    path = here / "w.safetensors"
    path.write_bytes(_safetensors(random, (zoo / "s.safetensors").read_bytes(), marker))
    return _reading(random, path.name, "--arch", ARCH)


def _safetensors(random: Random, data: bytes, marker: Path) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = random.randrange(8)
    if kind == 0:
        return mutate_bytes(random, data)
    if kind == 1:
        wrong = random.choice((0, 1, 2, length - 1, length + 1, 1 << 31, 1 << 40, (1 << 64) - 1))
        return struct.pack("<Q", wrong) + data[8:]
    if kind == 2:
        names = [name for name in header if name != "__metadata__"]
        one, other = random.choice(names), random.choice(names)
        field = random.choice(("data_offsets", "shape", "dtype"))
        header[one][field] = header[other][field]
    elif kind == 3:
        name = random.choice([name for name in header if name != "__metadata__"])
        at, by = random.randrange(2), random.choice((-1, 1, 4, -4, 1 << 40, 1 << 63))
        header[name]["data_offsets"][at] += by
    else:
        header = mutate_json(random, header, marker, random.choice((1, 1, 2, 4)))
    text = json.dumps(header).encode()
    if random.random() < 0.1:
        text = random.choice((text[:-1], text + b" " * 9, text * 2, b"[]", b"{" * 50_000, b"{}"))
    return struct.pack("<Q", len(text)) + text + body


def pickled(random: Random, zoo: Path, here: Path, marker: Path) -> list[str]:
    """A pickle with a payload, as it is or dressed as something else."""
    forms = [pickle.dumps(Touch(marker), protocol) for protocol in range(6)]
    forms += [torch_pickle(marker), _legacy(marker), pickle.dumps({"w": Touch(marker), 1: [2]})]
    forms += [pickle.dumps([1, 2]) + forms[4], (zoo / "state.pt").read_bytes()]
    forms.append((zoo / "module.pt").read_bytes())
    data = random.choice(forms)
    if random.random() < 0.5:
        data = mutate_bytes(random, data)
    name = random.choice(["m.pt", "m.pt2", "m.safetensors", "m.bin", "m"])
    if random.random() < 0.15:
        copy(zoo, here, "llama")
        (here / "llama" / "model.safetensors").unlink()
        (here / "llama" / random.choice(["pytorch_model.bin", "model.safetensors"])).write_bytes(
            data
        )
        return _reading(random, "llama")
    (here / name).write_bytes(data)
    return _reading(random, name, *random.choice(([], ["--arch", ARCH])))


def _legacy(marker: Path) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save({"w": Touch(marker)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


# --- folders ---


def transformers(random: Random, zoo: Path, here: Path, marker: Path) -> list[str]:
    """A transformers folder: its config, its weights, code that lies in it."""
    copy(zoo, here, "llama")
    folder = here / "llama"
    config = json.loads((folder / "config.json").read_text())
    kind = random.randrange(12)
    if kind < 6:
        config = mutate_json(random, config, marker, random.choice((1, 1, 1, 2, 4)))
    elif kind == 6:
        config["model_type"] = random.choice(MODEL_TYPES)
        config["architectures"] = random.choice([config["architectures"], [], None, ["os.system"]])
    elif kind == 7:
        (folder / "modeling_x.py").write_text(code(marker))
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code(marker))
        value = random.choice(["modeling_x.X", "other/repo--modeling_x.X", ["modeling_x.X", None]])
        config[random.choice(["auto_map", "custom_pipelines", "trust_remote_code"])] = {
            random.choice(["AutoConfig", "AutoModelForCausalLM", "x"]): value
        }
    elif kind == 8:
        weights = folder / "model.safetensors"
        weights.write_bytes(_safetensors(random, weights.read_bytes(), marker))
    elif kind == 9:
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "model.safetensors"}}
        index = mutate_json(random, index, marker, random.choice((0, 1, 2)))
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == 10:
        for name in random.sample(sorted(p.name for p in folder.iterdir()), 2):
            (folder / name).write_bytes(mutate_bytes(random, (folder / name).read_bytes()))
    else:
        other = random.choice(["adapter_config.json", "generation_config.json", "tokenizer.json"])
        held = stray(random)
        (folder / other).write_text(
            json.dumps({"x": held, "auto_mapping": {"parent_library": "os"}})
        )
    if kind != 10:
        (folder / "config.json").write_text(json.dumps(config))
    return _reading(random, "llama")


def package(random: Random, zoo: Path, here: Path, marker: Path) -> list[str]:
    """A folder of memcompile's own, its digests often set right again."""
    copy(zoo, here, "engine")
    folder = here / "engine"
    manifest = json.loads((folder / "manifest.json").read_text())
    kind = random.randrange(8)
    if kind < 3:
        manifest = mutate_json(random, manifest, marker, random.choice((1, 1, 2, 4)))
    elif kind == 3:
        _archive_again(random, folder / "program.pt2", marker)
    elif kind == 4:
        weights = folder / "weights.safetensors"
        weights.write_bytes(_safetensors(random, weights.read_bytes(), marker))
    elif kind == 5:
        shutil.copyfile(zoo / "fitted.safetensors", folder / "policy.safetensors")
        manifest["files"]["policy.safetensors"] = {}
        if random.random() < 0.5:
            manifest["policy"] = {
                "preset": "hybrid",
                "state_layers": [0],
                "window": 8,
                "page_size": 8,
            }
    elif kind == 6:
        name = random.choice(sorted(p.name for p in folder.iterdir()))
        if random.random() < 0.3:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(mutate_bytes(random, (folder / name).read_bytes()))
    else:
        (folder / random.choice(["x.py", "tokenizer.json", "../beside"])).write_text(code(marker))
    if kind != 6 or random.random() < 0.5:
        _digests(manifest, folder)
        if kind != 6:
            (folder / "manifest.json").write_text(json.dumps(manifest))
    prompt = ["--prompt", "1 2 3", "--ids", "--max-new-tokens", "2", "--kernels", "off"]
    return ["run", "engine", *prompt, *random.choice(([], ["--read", "dense"]))]


def _archive_again(random: Random, path: Path, marker: Path) -> None:
    with zipfile.ZipFile(path) as clean:
        entries = {name.partition("/")[2]: clean.read(name) for name in clean.namelist()}
    _archive(random, entries, path, marker)


def _digests(manifest: Any, folder: Path) -> None:
    files = manifest.get("files") if isinstance(manifest, dict) else None
    for name, facts in files.items() if isinstance(files, dict) else ():
        path = folder / name if isinstance(name, str) and "\x00" not in name else folder
        if isinstance(facts, dict) and len(name) < 200 and path.is_file():
            data = path.read_bytes()
            facts |= {"bytes": len(data), "sha256": sha256(data).hexdigest()}


def policy_file(random: Random, zoo: Path, here: Path, marker: Path) -> list[str]:
    """A fitted policy whose tensors or whose account of itself is another's."""
    copy(zoo, here, "model.pt2")
    data = (zoo / "fitted.safetensors").read_bytes()
    if random.random() < 0.6:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        about = json.loads(header["__metadata__"]["memcompile-policy"])
        about = mutate_json(random, about, marker, random.choice((1, 1, 2, 4)))
        header["__metadata__"]["memcompile-policy"] = json.dumps(about)
        text = json.dumps(header).encode()
        data = struct.pack("<Q", len(text)) + text + data[8 + length :]
    else:
        data = _safetensors(random, data, marker)
    (here / "p.safetensors").write_bytes(data)
    return _reading(random, "model.pt2", "--policy", "p.safetensors")


MUTATORS: dict[str, Mutator] = {
    "archive": archive,
    "safetensors": safetensors,
    "pickle": pickled,
    "transformers": transformers,
    "package": package,
    "policy file": policy_file,
}
