"""A compiled model as a transformers model: its `generate` is transformers' own, on an engine."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .engine import Engine
from .transformers_cache import EngineCache, memory_cache

# Options of generate that ask for what a step graph does not compute, and why.
_NOT_COMPUTED = {
    "output_attentions": "the kernels never hold attention weights",
    "output_hidden_states": "the step graph returns logits alone",
    "assistant_early_exit": "the step graph runs all layers",
    "use_mtp": "the step graph returns logits alone",
    "cache_implementation": "the memory is the policy's",
}
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation")


@dataclass(frozen=True)
class Origin:
    """What is left of a transformers model once it has been compiled; no weights.

    Attributes:
        kind: its class.
        config, generation_config: the model's own objects, not copies.
        dtype: of its weights.
    """

    kind: Any
    config: Any
    generation_config: Any
    dtype: torch.dtype


def origin_of(model: object) -> Origin | None:
    """The origin of a transformers model that can generate; None for any other module."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    if not model.can_generate() or getattr(model, "generation_config", None) is None:
        return None
    return Origin(type(model), model.config, model.generation_config, model.dtype)


class EngineModel:
    """What a compiled model overrides of the transformers class that it was.

    The prompt is read densely, what is generated through the policy. So is whatever is appended to
    a memory by calling the model itself.
    """

    config: Any
    _engine: Engine
    _dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def new_cache(self, engine: Engine | None = None) -> EngineCache:
        """A cache, to be given as ``past_key_values``.

        Args:
            engine: it goes on from a fork of what this engine remembers; None: from nothing.
        """
        engine = engine or self._engine
        if not engine.like(self._engine):
            raise ValueError("new_cache: the engine is of another compilation than this model")
        return memory_cache()(engine.fork())

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EngineCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        memory_read: str | None = None,
        **options: Any,
    ) -> Any:
        """Append ``input_ids[B, n]`` to the cache; logits of the last `logits_to_keep`, 0: of all.

        Args:
            attention_mask: ``[B, held + n]``, 0 in columns before a row's first token, else 1.
            position_ids: have to be those that the engine counts; checked where they are on a CPU.
            memory_read: "dense" or "policy"; "prompt": dense, apart from the last
                ``logits_to_keep - 1`` tokens, which are an assistant's guesses at what follows
                the prompt; None: dense into an empty cache, else the policy.

        Returns:
            transformers' ``CausalLMOutputWithPast``. Logits of padding are 0.

        Raises:
            ValueError: what a step graph cannot do, masks with holes, other positions, caches of
                another kind.
        """
        if inputs_embeds is not None:
            raise ValueError("inputs_embeds: a compiled model reads token ids; give input_ids")
        if input_ids is None:
            raise ValueError("input_ids is missing; give int64 [B, n]")
        if use_cache is False:
            raise ValueError(
                "use_cache=False: a compiled model is nothing without its memory; leave it out, or "
                "call the model that was compiled"
            )
        for name, value in options.items():
            if value is not None and value is not False:
                why = _NOT_COMPUTED.get(name, "the step graph does not take it")
                raise ValueError(f"{name}={value!r:.60}: {why}; leave it out")
        cache = self.new_cache() if past_key_values is None else past_key_values
        self._check_cache(cache)
        logits = _Call(cache, input_ids, attention_mask, position_ids).run(
            memory_read, logits_to_keep
        )
        if return_dict is False:
            return logits, cache
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _check_cache(self, cache: object) -> None:
        if not isinstance(cache, EngineCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; give a cache that this model "
                "returned or that its new_cache() made, or none"
            )
        if not cache.engine.like(self._engine):
            raise ValueError("past_key_values was made by a model of another compilation")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            f"a compiled {type(self).__name__} has no weights: save the model that was compiled, or let the "
            "command `memcompile MODEL` write a folder"
        )

    # --- where transformers' generate asks its model ---

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        # The general one: the overrides of model classes serve their own caches.
        from transformers import GenerationMixin

        inputs: dict[str, Any] = GenerationMixin.prepare_inputs_for_generation(
            self, input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        for name in ("tokenizer", "assistant_tokenizer"):  # meant for the stopping criteria
            inputs.pop(name, None)
        if is_first_iteration:
            inputs["memory_read"] = "prompt"
        return inputs

    def _validate_generation_mode(self, mode: Any, config: Any, options: Any) -> None:
        for name, why in _NOT_COMPUTED.items():
            value = getattr(config, name, None)
            if value:
                raise ValueError(f"{name}={value!r}: {why}; leave it out")
        if getattr(config, "speculation_type", None) == "dflash":
            raise ValueError("speculation_type='dflash': the step graph returns logits alone")
        super()._validate_generation_mode(mode, config, options)  # type: ignore[misc]

    def _get_deprecated_gen_repo(self, mode: Any, *args: Any, **kwargs: Any) -> Any:
        if mode.value not in _MODES:
            raise ValueError(
                f"generation mode {mode.value}: needs a cache of keys and values; a compiled model "
                f"has: {', '.join(_MODES)}"
            )
        return super()._get_deprecated_gen_repo(mode, *args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.use_cache is False:
            raise ValueError(
                "use_cache=False: a compiled model is nothing without its memory; leave it out, or "
                "call generate of the model that was compiled"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            self._check_cache(given)
            return
        model_kwargs["past_key_values"] = self.new_cache()
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "continuous batching keeps a paged cache of its own; call generate with a batch"
        )

    init_continuous_batching = generate_batch


class _Call:
    """One call of the model: columns of a padded batch here, tokens of rows in the engine."""

    def __init__(
        self,
        cache: EngineCache,
        tokens: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> None:
        self.cache, self.engine, self.tokens = cache, cache.engine, tokens
        self.first = not cache.padding
        n = tokens.shape[1]
        self.padding = _padding(cache, tokens, mask)
        held = cache.get_seq_length()
        # Columns of this call that stand before a row's first token.
        self.skipped = [max(0, p - held) for p in self.padding]
        self.lengths = [n - skipped for skipped in self.skipped]
        if positions is not None and positions.device.type == "cpu":
            self._check_positions(positions)

    def _check_positions(self, positions: Tensor) -> None:
        batch, n = self.tokens.shape
        held = self.engine.position or [0] * batch
        expected = (
            torch.tensor(held)[:, None] + torch.arange(n) - torch.tensor(self.skipped)[:, None]
        )
        read = torch.arange(n) >= torch.tensor(self.skipped)[:, None]
        if positions.shape[-1] != n or bool((read & (positions != expected)).any()):
            raise ValueError(
                f"position_ids are {positions.tolist()!r:.80}; the tokens of a row stand behind "
                f"each other, here from {held} on: leave position_ids out"
            )

    def run(self, read: str | None, keep: int | Tensor) -> Tensor:
        self.engine.admit(self.tokens, self.lengths)  # before anything is read: all or nothing
        n = self.tokens.shape[1]
        tokens = self.tokens
        if any(self.skipped):  # the engine pads on the right
            at = torch.arange(n, device=tokens.device) + self._shift(tokens.device)
            tokens = tokens.gather(1, at.clamp(max=n - 1))
        some = isinstance(keep, int) and 0 < keep <= n
        only = int(keep) if some else n
        rows, lengths = None, self.lengths
        if self.first:
            rows, tokens, lengths = _distinct(tokens, lengths)
        engine = self.engine
        if read == "policy" or (read is None and not self.first):
            logits = engine(tokens, lengths)
        elif only == 1:
            logits = engine.prefill(tokens, lengths)
        elif some and not any(self.skipped):
            last = engine.prefill(tokens[:, : n - only + 1])
            rest = tokens[:, n - only + 1 :]
            behind = engine(rest) if read == "prompt" else engine.prefill(rest, all_logits=True)
            logits = torch.cat([last, behind], 1)
        else:
            logits = engine.prefill(tokens, lengths, all_logits=True)
        if rows is not None:
            self.engine.select(rows)
            logits = logits[torch.tensor(rows, device=logits.device)]
        self.cache.padding = self.padding
        if logits.shape[1] == n and any(self.skipped):
            logits = self._back(logits)
        return logits[:, keep] if isinstance(keep, Tensor) else logits[:, -only:]

    def _shift(self, device: torch.device) -> Tensor:
        return torch.tensor(self.skipped, device=device)[:, None]

    def _back(self, logits: Tensor) -> Tensor:
        """Logits of each row's tokens under the columns that these were given in."""
        at = torch.arange(logits.shape[1], device=logits.device) - self._shift(logits.device)
        moved = logits.gather(1, at.clamp(min=0)[..., None].expand_as(logits))
        return torch.where(at[..., None] >= 0, moved, 0)


def _padding(cache: EngineCache, tokens: Tensor, mask: Tensor | None) -> list[int]:
    """Columns before each row's first token, by the mask; no row may have a hole."""
    batch, n = tokens.shape
    before = cache.padding or [0] * batch
    if mask is None:
        return list(before)
    total = cache.get_seq_length() + n
    if mask.shape != (batch, total):
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}; expected {(batch, total)}: a column for each "
            "token held and given"
        )
    valid = mask != 0
    padding: list[int] = (total - valid.sum(1)).tolist()
    if not bool((valid[:, 1:] >= valid[:, :-1]).all()) or max(padding) == total:
        raise ValueError(
            "attention_mask has a hole, padding on the right, or a row without a token: pad on "
            "the left (tokenizer.padding_side = 'left'), and give generate the mask, which it "
            "otherwise makes from every pad token in input_ids"
        )
    if cache.padding and padding != before:
        raise ValueError(
            f"attention_mask pads the rows by {padding}, but they were read with {before}"
        )
    return padding


def _distinct(tokens: Tensor, lengths: list[int]) -> tuple[list[int] | None, Tensor, list[int]]:
    """The rows without repetitions, and which of them each row is: a prompt that is to go on in
    several ways is read once. None: every row is another."""
    if len(lengths) == 1:
        return None, tokens, lengths
    rows = tokens.cpu().numpy()
    keys = [row[:n].tobytes() for row, n in zip(rows, lengths, strict=True)]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    if len(number) == len(keys):
        return None, tokens, lengths
    first = [keys.index(key) for key in number]
    chosen = tokens[torch.tensor(first, device=tokens.device)]
    return [number[key] for key in keys], chosen, [lengths[i] for i in first]


@functools.cache
def _kind(origin: Any) -> Any:
    # Its name is the class's own: transformers' pipelines look models up by it.
    return type(origin.__name__, (EngineModel, origin), {"__module__": __name__})


def bridge(engine: Engine, origin: Origin | None) -> Any:
    """A transformers model that runs on engines like `engine`; see `Engine.transformers`."""
    if origin is None:
        raise ValueError(
            "this engine was not made from a transformers model that generates: compile one, or "
            "the folder of one; engine.generate takes any"
        )
    kind = _kind(origin.kind)
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.config, model.generation_config = origin.config, origin.generation_config
    model._engine, model._dtype = engine, origin.dtype
    return model.eval()
