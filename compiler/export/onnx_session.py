"""Generates from an exported ONNX model under onnxruntime, its state bound in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...runtime.admit import Bounds
from ...runtime.engine import CHUNK_TOKENS
from ..archive import one_line
from ..manifest import MANIFEST, artefacts, check_artefact, read_manifest
from .contract import Contract, read_contract
from .driver import Driver

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# In the order in which they are taken.
FORMATS = ("onnx-ort", "onnx")
MODEL, PREFILL = "model.onnx", "prefill.onnx"
CUDA = "CUDAExecutionProvider"
# TensorProto.DataType, which onnxruntime takes for element types that numpy has no word for.
_ELEMENTS = {
    torch.float32: 1,
    torch.int32: 6,
    torch.int64: 7,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
}


def open_session(folder: Path) -> OnnxSession:
    """The ONNX engine in a folder that memcompile wrote, empty.

    Raises:
        FileNotFoundError: the folder holds no ONNX engine, or a file of it is missing.
        ValueError: a file was changed, or onnxruntime cannot load it.
        ImportError: onnxruntime is not installed.
    """
    manifest = read_manifest(folder)
    there = {artefact.format: artefact for artefact in artefacts(manifest, folder / MANIFEST)}
    found = next((there[name] for name in FORMATS if name in there), None)
    if found is None:
        held = ", ".join(there) or "no engine in any format"
        raise FileNotFoundError(
            f"{folder}: no ONNX engine for the CPU in it (it holds {held}); compile the model "
            f"again with --emit {FORMATS[0]} or --emit {FORMATS[1]}"
        )
    check_artefact(folder, manifest, found)
    return session_of(folder / found.folder)


def session_of(place: Path) -> OnnxSession:
    """The ONNX engine in its own folder, empty; its files are taken as they are.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `open_session`.
    """
    contract = read_contract(place)
    model = _Bound(place / MODEL, contract)
    prefill = _Bound(place / PREFILL, contract) if (place / PREFILL).is_file() else None
    return OnnxSession(contract, model, prefill)


class OnnxSession:
    """An exported ONNX engine with its memory; a `runtime.generate.Runner`.

    Args:
        model: reads through the policy.
        prefill: reads densely; None where `model` does for both.
    """

    def __init__(self, contract: Contract, model: _Bound, prefill: _Bound | None) -> None:
        self._contract, self._model, self._prefill = contract, model, prefill
        self._driver: Driver | None = None
        self._bounds = Bounds(
            contract.vocabulary,
            contract.lengths is not None,
            contract.context,
            "what the model has positions for",
        )

    @property
    def vocabulary(self) -> int:
        return self._bounds.vocabulary

    @property
    def ragged(self) -> bool:
        return self._bounds.ragged

    @property
    def limit(self) -> int | None:
        return self._bounds.limit

    @property
    def reads_densely(self) -> bool:
        """Whether there is a model of its own for dense reads."""
        return self._prefill is not None

    @property
    def position(self) -> list[int]:
        """Tokens each row holds; empty before the first call."""
        return self._driver.position if self._driver is not None else []

    def admit(self, tokens: Tensor, lengths: Sequence[int] | Tensor | None) -> list[int]:
        """As `Engine.admit`."""
        return self._bounds.admit(tokens, lengths, self.position)

    def prefill(self, tokens: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """As `Engine.prefill`: ``[B, 1, V]``."""
        counts = self.admit(tokens, lengths)
        last: Tensor | None = None
        for logits, left in self._in_chunks(self._prefill or self._model, tokens, counts):
            ends = torch.tensor(left)
            tail = logits[torch.arange(len(left)), (ends - 1).clamp(min=0)].unsqueeze(1)
            last = tail if last is None else torch.where((ends > 0)[:, None, None], tail, last)
        assert last is not None
        return last

    def __call__(self, tokens: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """As calling an `Engine`: ``[B, n, V]``."""
        counts = self.admit(tokens, lengths)
        every = [logits for logits, _ in self._in_chunks(self._model, tokens, counts)]
        return every[0] if len(every) == 1 else torch.cat(every, 1)

    def _in_chunks(
        self, model: _Bound, tokens: Tensor, counts: list[int]
    ) -> list[tuple[Tensor, list[int]]]:
        """Logits of each chunk, and each row's valid tokens among them."""
        if self._driver is None:
            # Little room, which doubles when it is full: contexts are mostly far from the limit.
            room = max(counts) if self._contract.capacity is not None else None
            self._driver = Driver(self._contract, model, len(counts), room)
        driver, most = self._driver, self._contract.longest_call or CHUNK_TOKENS
        driver.call = model
        made = []
        for start in range(0, tokens.shape[1], most):
            piece = tokens[:, start : start + most]
            left = [min(max(c - start, 0), piece.shape[1]) for c in counts]
            made.append((driver(piece, left), left))
        return made


class _Bound:
    """One ONNX model, called on tensors where they lie.

    State that grows is written in place: its outputs are bound to its inputs' memory. What does not
    grow is small, and is written beside, into the memory that held the call before's: nothing says
    that all reads of it come before the write.

    Raises:
        ValueError: onnxruntime cannot load it, or it does not keep to the contract.
        ImportError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, contract: Contract) -> None:
        self.session = load_model(path)
        self.contract = contract
        given = {value.name for value in self.session.get_inputs()}
        made = {value.name: value for value in self.session.get_outputs()}
        for kind, names, expected in (
            ("inputs", given, contract.inputs),
            ("outputs", set(made), contract.outputs),
        ):
            if names != set(expected):
                odd = ", ".join(sorted(names ^ set(expected))[:3])
                raise ValueError(f"{path}: its {kind} are not those of state.json: {odd}")
        logits = made[contract.logits]
        self.width, self.dtype = logits.shape[-1], _TYPES.get(logits.type)
        if not isinstance(self.width, int) or self.dtype is None:
            raise ValueError(f"{path}: its logits are {logits.type} {logits.shape}")
        self.binding = self.session.io_binding()
        self.bound: dict[tuple[str, bool], tuple[int, tuple[int, ...]]] = {}
        self.spare: dict[str, Tensor] = {}

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs by name -> outputs by name."""
        contract = self.contract
        new = [t for t in (contract.tokens, contract.position, contract.lengths) if t is not None]
        kept = {name: given[name].contiguous() for name in new}
        for name, tensor in kept.items():
            self._bind(name, tensor)
        batch, n = kept[contract.tokens].shape
        made = {contract.logits: torch.empty(batch, n, self.width, dtype=self.dtype)}
        for state in contract.state:
            held = given[state.input]
            self._bind(state.input, held)
            made[state.output] = (
                held if state.grows is not None else self._beside(state.input, held)
            )
        for name, tensor in made.items():
            self._bind(name, tensor, output=True)
        self.session.run_with_iobinding(self.binding)
        for state in contract.state:
            if state.grows is None:
                self.spare[state.input] = given[state.input]
        return made

    def _beside(self, name: str, held: Tensor) -> Tensor:
        spare = self.spare.get(name)
        fits = spare is not None and spare.shape == held.shape and spare is not held
        return spare if fits and spare is not None else torch.empty_like(held)

    def _bind(self, name: str, tensor: Tensor, output: bool = False) -> None:
        where = (tensor.data_ptr(), tuple(tensor.shape))
        if self.bound.get((name, output)) == where:
            return
        bind: Any = self.binding.bind_output if output else self.binding.bind_input
        bind(name, "cpu", 0, _ELEMENTS[tensor.dtype], [*tensor.shape], tensor.data_ptr())
        self.bound[name, output] = where


def has_cuda() -> bool:
    """Whether onnxruntime's CUDA provider runs here: the wheel has it, and there is a GPU.

    Without one, a session falls back to the CPU, which only its own list of providers says.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return False
    if CUDA not in onnxruntime.get_available_providers():
        return False
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> a (float[1] x) => (float[1] y) {y = Neg(x)}'
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=[CUDA, "CPUExecutionProvider"]
        )
    except Exception:  # onnxruntime raises many types; each means that it does not run
        return False
    return CUDA in session.get_providers()


def load_model(path: Path, cuda: bool = False) -> InferenceSession:
    """An ONNX model under onnxruntime's CPU provider, with as many threads as torch has.

    Args:
        cuda: under its CUDA provider, and the CPU's where that has no kernel.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: it cannot be loaded.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(
            "an ONNX engine runs under onnxruntime, which is not installed: "
            "pip install 'memcompile[onnx]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=[*([CUDA] if cuda else []), "CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime raises many types; each means "not loadable"
        raise ValueError(
            f"{path}: onnxruntime {onnxruntime.__version__} cannot load it: {one_line(error)}"
        ) from error
