"""One decode step of attention under onnxruntime: an exported scout against the dense forms."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import export
from ..models.memory import preset
from ..runtime import huge_pages
from . import bandwidth
from .attention_step import Shape, floor_bytes
from .memories import OneAttention
from .onnx_forms import FORMS, dense_model
from .registry import Column, Outcome, Settings, figure
from .rules import Bar, Contender, measure, states_for

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CONTEXTS = (8192, 32768, 131072)
# The preset's own defaults, and what reads a thousand tokens and no summary. The bars are the
# second's: 2,048 of 8,192 tokens are a quarter, which no form can read in a fifth of the time.
BARRED = "scout of 1024"
SCOUTS: dict[str, dict[str, Any]] = {
    "scout": {},
    BARRED: {"budget": 1024, "compensate": False},
}
SMALL: dict[str, dict[str, Any]] = {
    "scout": {"budget": 64, "page_size": 8, "sinks": 8, "window": 16},
    BARRED: {"budget": 64, "page_size": 8, "sinks": 8, "window": 16, "compensate": False},
}
ELEMENTS = {torch.float32: 1, torch.int32: 6, torch.int64: 7}
PROFILED = 20


def session(model: str | bytes, profile: bool = False) -> InferenceSession:
    """A model on the CPU, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Six sessions take turns: a worker that spins after its own would run beside another's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(tempfile.mkdtemp()) / "profile")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Bound:
    """A session on states where they lie: what each call reads and writes is bound beforehand.

    Args:
        given: by state, inputs by name.
        written: outputs by name -> the input whose memory they are written to, None for new memory
            of the shape given.
    """

    def __init__(
        self,
        runs: InferenceSession,
        given: list[dict[str, Tensor]],
        written: Mapping[str, str],
        out: str,
        shape: tuple[int, ...],
    ) -> None:
        self.runs, self.kept, self.bindings = runs, given, []
        self.out = torch.empty(shape)
        for tensors in given:
            binding = runs.io_binding()
            for name, tensor in tensors.items():
                _bind(binding.bind_input, name, tensor)
            for name, source in written.items():
                _bind(binding.bind_output, name, tensors[source])
            _bind(binding.bind_output, out, self.out)
            self.bindings.append(binding)

    def __call__(self, state: int) -> None:
        self.runs.run_with_iobinding(self.bindings[state])


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    bind(name, "cpu", 0, ELEMENTS[tensor.dtype], [*tensor.shape], tensor.data_ptr())


@dataclass(frozen=True)
class Exported:
    """A scout's model in a folder, and how it is driven."""

    folder: Path
    contract: dict[str, Any]
    options: dict[str, Any]


def exported(name: str, shape: Shape, folder: Path, settings: Settings) -> Exported:
    """OneAttention under a scout, exported as ONNX: what `--emit onnx` writes."""
    options: dict[str, Any] = {"page_size": shape.page_size, "dense_layers": 0}
    options |= SMALL[name] if settings.quick else SCOUTS[name]
    torch.manual_seed(0)
    model = OneAttention(shape).eval()
    place = export(model, folder / name, ["onnx"], "scout", kernels="off", check=False, **options)
    contract = json.loads((place / "onnx" / "state.json").read_text())
    return Exported(place / "onnx", contract, options)


def caches(shape: Shape, tokens: int, states: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [1, Hkv, tokens, D] of each state."""
    made = []
    for seed in range(states):
        draw = torch.Generator().manual_seed(seed)
        few = (1, shape.kv_heads, min(tokens, 4096), shape.dim)
        pair = []
        for _ in range(2):
            # In 2 MB pages, as long-lived buffers of a server are, for every form alike.
            held = huge_pages.zeros(
                (1, shape.kv_heads, tokens, shape.dim), torch.float32, torch.device("cpu")
            )
            drawn = torch.randn(few, generator=draw)
            for start in range(0, tokens, few[2]):
                held[:, :, start : start + few[2]] = drawn[:, :, : tokens - start]
            pair.append(held)
        made.append((pair[0], pair[1]))
    return made


def scout_inputs(
    scout: Exported, held: list[tuple[Tensor, Tensor]], tokens: int, page_size: int
) -> list[dict[str, Tensor]]:
    """The inputs of a step at each state, records drawn as they may be."""
    contract = scout.contract
    made = []
    for seed, (keys, values) in enumerate(held):
        draw = torch.Generator().manual_seed(seed)
        # State s stands s tokens before the context is full: one of them fills a page.
        given = {
            contract["tokens"]: torch.randint(64, (1, 1), generator=draw),
            contract["position"]: torch.tensor([tokens - 1 - seed % page_size], dtype=torch.int32),
        }
        if contract["lengths"] is not None:
            given[contract["lengths"]] = torch.ones(1, dtype=torch.int32)
        for state in contract["state"]:
            shape = [*state["shape"]]
            shape[state["grows"]["axis"]] = tokens // state["grows"]["tokens"]
            name = state["input"]
            if name.endswith(("_keys", "_values")):
                given[name] = keys if name.endswith("_keys") else values
            else:
                given[name] = torch.rand(shape, generator=draw) / 8
        made.append(given)
    return made


def bound_scout(scout: Exported, given: list[dict[str, Tensor]], profile: bool = False) -> Bound:
    contract = scout.contract
    runs = session(str(scout.folder / "model.onnx"), profile)
    logits = next(x for x in runs.get_outputs() if x.name == contract["logits"])
    return Bound(
        runs,
        given,
        {state["output"]: state["input"] for state in contract["state"]},
        contract["logits"],
        (1, 1, logits.shape[-1]),
    )


def bound_dense(name: str, shape: Shape, held: list[tuple[Tensor, Tensor]], tokens: int) -> Bound:
    given = []
    for seed, (keys, values) in enumerate(held):
        query, key, value, at, _ = shape.sample(tokens - 1, seed)
        given.append(
            {
                "query": query,
                "key": key,
                "value": value,
                "keys": keys,
                "values": values,
                "position": at,
            }
        )
    written = {"new_keys": "keys", "new_values": "values"}
    return Bound(
        session(dense_model(name, shape, tokens)),
        given,
        written,
        "out",
        (1, shape.heads, 1, shape.dim),
    )


def time_by_operator(scout: Exported, given: list[dict[str, Tensor]]) -> dict[str, float]:
    """Milliseconds of a step by kind of operator, the longest first, as onnxruntime counts them:
    alone, without what runs between them."""
    bound = bound_scout(scout, given, profile=True)
    for call in range(PROFILED + 1):
        bound(call % len(given))
    path = Path(bound.runs.end_profiling())
    events = json.loads(path.read_text())
    path.unlink()
    path.parent.rmdir()
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return {name: figure(us / 1e3 / (PROFILED + 1)) for name, us in spent.most_common()}


def run(settings: Settings) -> Outcome:
    shape = Shape(8, 2, 64, 8, torch.float32) if settings.quick else Shape(dtype=torch.float32)
    contexts = settings.contexts or ((128, 512) if settings.quick else CONTEXTS)
    probes = bandwidth.probes(settings.cache)
    with tempfile.TemporaryDirectory() as folder:
        scouts = {name: exported(name, shape, Path(folder), settings) for name in SCOUTS}
        rows = [at_context(shape, tokens, scouts, settings, probes) for tokens in contexts]
    return Outcome(
        rows,
        COLUMNS,
        bars(rows),
        {
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "dim": shape.dim,
            "page_size": shape.page_size,
            "dtype": "float32",
            "scouts": {name: scout.options for name, scout in scouts.items()},
            "onnxruntime": _version(),
        },
    )


def _version() -> str:
    import onnxruntime

    version: str = onnxruntime.__version__
    return version


def at_context(
    shape: Shape,
    tokens: int,
    scouts: Mapping[str, Exported],
    settings: Settings,
    probes: list[Contender],
) -> dict[str, Any]:
    """Every scout and every dense form at one context, over the same caches."""
    floors = {}
    for name, scout in scouts.items():
        memory = preset("scout", **scout.options).memory(0, 0)
        floors[name] = floor_bytes(memory, shape.layout(memory), tokens - 1)
    dense = shape.cache_bytes(tokens)
    states = max(states_for(floor, settings.cache) for floor in floors.values())
    held = caches(shape, tokens, states)
    given = {
        name: scout_inputs(scout, held, tokens, shape.page_size) for name, scout in scouts.items()
    }
    contenders = [
        Contender(name, bound_scout(scouts[name], given[name]), states, floors[name])
        for name in scouts
    ]
    few = states_for(dense, settings.cache)
    contenders += [
        Contender(name, bound_dense(name, shape, held[:few], tokens), few, dense) for name in FORMS
    ]
    timings = measure([*contenders, *probes], settings.rounds)
    speed = max(
        bandwidth.bandwidths(timings, {probe.name: probe.floor for probe in probes}).values()
    )
    best = min(FORMS, key=lambda form: timings[form].median)
    row: dict[str, Any] = {
        "context": tokens,
        "states": states,
        "bandwidth": figure(speed / 1e9),
        "baseline": best,
        "baseline_ms": 1e3 * timings[best].median,
        "dense": {
            form: timings[form].to_json()
            | {"times_floor": timings[form].median * speed / dense, "floor_bytes": dense}
            for form in FORMS
        },
        "scouts": {},
    }
    for name, scout in scouts.items():
        median = timings[name].median
        row["scouts"][name] = timings[name].to_json() | {
            "floor_bytes": floors[name],
            "times_floor": median * speed / floors[name],
            "times_baseline": timings[best].median / median,
            "ms_by_operator": time_by_operator(scout, given[name]),
        }
    return row


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """What is asked of ONNX, on what was measured."""
    at = {row["context"]: row["scouts"] for row in rows}

    def value(tokens: int, name: str) -> float | None:
        return at[tokens][name]["times_baseline"] if tokens in at else None

    return [
        Bar(f"{BARRED} × the fastest dense form at {tokens}", value(tokens, BARRED), bound)
        for tokens, bound in ((8192, 5.0), (131072, 20.0))
    ]


def _scout(name: str, key: str, form: str) -> Any:
    return lambda row: form.format(row["scouts"][name][key])


def _dense(form: str) -> Any:
    return lambda row: f"{row['dense'][form]['ms']:.2f}"


def _spent(row: dict[str, Any]) -> str:
    parts = row["scouts"]["scout"]["ms_by_operator"].items()
    return " · ".join(f"{name} {ms:.2f}" for name, ms in [*parts][:4])


COLUMNS = (
    Column("context", lambda row: f"{row['context']}"),
    Column("GB/s", lambda row: f"{row['bandwidth']:.0f}"),
    *(Column(f"{form} ms", _dense(form)) for form in FORMS),
    *(
        Column(head, _scout(name, key, text))
        for name in SCOUTS
        for head, key, text in (
            (f"{name} ms", "ms", "{:.3f}"),
            ("×", "times_baseline", "{:.1f}"),
            ("× floor", "times_floor", "{:.1f}"),
        )
    ),
    Column("scout's operators, ms", _spent),
)
