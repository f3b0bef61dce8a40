"""Attention transfer: a state learns, layer by layer, to give what the frozen attention gives.

The first stage of LoLCATs (2410.10254): each layer that becomes a state sees the queries, keys and
values of the unchanged model, and its weights are moved until its output is the attention's. Layers
do not see each other's states, so one run of the frozen model serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .. import codegen
from ..codegen.spec import NotCovered, specialise
from ..models.memory.spec import Memory
from ..models.memory.state import Reads, joined, reads, state_weights
from ..models.ops import operator
from ..passes.result import Site

WARMUP = 0.02  # of the steps
CLIP = 1.0  # largest norm of a layer's gradient
SPREAD = 2.0  # how far a window's log-sum-exp, tempered, stands from its mean
_SHARES = (0.0, 0.02, 0.05, *(i / 10 for i in range(1, 10)), 0.95, 0.98, 1.0)
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Activations:
    """What one attention of the frozen model takes and gives, float32.

    Attributes:
        query: [B, H, n, Dk]; key, value: [B, Hkv, n, Dk], [B, Hkv, n, Dv]; out: [B, H, n, Dv].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


class Frozen:
    """The model up to its last attention that becomes a state.

    Args:
        module: the normal form; its attentions are those of `sites`.
        wanted: names of the sites whose activations are asked for.
    """

    def __init__(self, module: fx.GraphModule, sites: Iterable[Site], wanted: Sequence[str]):
        by_node = {site.node: site for site in sites}
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        ends: dict[str, tuple[fx.Node, ...]] = {}
        for node in module.graph.nodes:
            if node.op == "output":
                break
            site = by_node.get(node.name)
            if site is None:
                copied[node] = graph.node_copy(node, lambda n: copied[n])
                continue
            query, key, value = (copied[n] for n in node.args[:3])
            if site.rule.kind == "causal" and not site.softcap:
                # The rule was proved to be what the mask says; without the mask torch has a kernel.
                arguments = (query, key, value, site.scale, site.group)
                copied[node] = graph.call_function(_causal, arguments)
            else:
                copied[node] = graph.node_copy(node, lambda n: copied[n])
            ends[site.name] = (query, key, value, copied[node])
        graph.output(tuple(ends[name] for name in wanted))
        graph.eliminate_dead_code()
        graph.lint()
        self._graph = fx.GraphModule(module, graph, "Frozen")
        self._wanted = tuple(wanted)
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._takes_positions = len(inputs) > 1

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> dict[str, Activations]:
        """The activations of tokens [B, n], by site name."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        inputs = (tokens, positions.contiguous()) if self._takes_positions else (tokens,)
        found = self._graph(*inputs)
        return {
            name: Activations(*(tensor.float() for tensor in four))
            for name, four in zip(self._wanted, found, strict=True)
        }


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, group: int) -> Tensor:
    # Repeated, because torch's fast kernels for the CPU do not know groups.
    keys, values = (x.repeat_interleave(group, 1) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, is_causal=True, scale=scale
    )


class StateOps:
    """The chunked recurrence and its gradients: generated kernels, or the references.

    Args:
        kernels: as for `build`.

    Attributes:
        references: why a reference runs, by operation.
    """

    def __init__(self, kernels: str) -> None:
        self._kernels = kernels
        self.references: dict[str, str] = {}

    def forward(self, *args: Any) -> Any:
        """`state_chunk`."""
        return self._run("state_chunk", args)

    def backward(self, *args: Any) -> Any:
        """`state_chunk.backward`."""
        return self._run("state_chunk.backward", args)

    def _run(self, name: str, args: tuple[Any, ...]) -> Any:
        if self._kernels == "off":
            self.references[name] = "kernels=off"
        if name not in self.references:
            try:
                spec, given = specialise(name, args)
                return codegen.load([spec], args[0].device.type)[spec](*given)
            except (RuntimeError, ImportError, OSError, NotCovered) as reason:
                if self._kernels == "required":
                    raise RuntimeError(f"kernels='required', but {reason}") from reason
                self.references[name] = " ".join(str(reason).split())
        return operator(name)(*args)


class Transfer:
    """The weights of a model's states while they are fitted, each layer's by itself.

    Args:
        sites: those that become states; `memories` by their names.
        rate: the highest learning rate; it rises over the first steps and falls to 0 as a cosine.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        memories: Mapping[str, Memory],
        *,
        steps: int,
        rate: float,
        device: torch.device,
        ops: StateOps,
    ) -> None:
        self._sites, self._memories = sites, memories
        self._steps, self._rate, self._ops = steps, rate, ops
        self.step = 0
        self._weights = {
            site.name: {
                key: tensor.to(device).requires_grad_()
                for key, tensor in state_weights(
                    memories[site.name], site.heads, site.kv_heads, site.key_dim
                ).items()
            }
            for site in sites
        }
        self._optimizer = torch.optim.Adam([t for _, t in self._flat()], lr=rate)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The weights as they are, by site and key."""
        return {
            site: {key: tensor.detach().clone().cpu() for key, tensor in tensors.items()}
            for site, tensors in self._weights.items()
        }

    @torch.no_grad()
    def calibrate(self, activations: Mapping[str, Activations]) -> None:
        """Sets how state and window share a row, head by head, to the best that one measurement
        finds: where a state starts with no share of any row, it has no gradient to learn from."""
        for site in self._sites:
            given, weights = activations[site.name], self._weights[site.name]
            both = self._reads(site, given)
            window = self._memories[site.name].own_window
            name, candidates = "mix", torch.logit(torch.tensor(_SHARES), eps=1e-3)[:, None]
            if "mass" in weights:
                # The first rows have nothing in their state.
                old, state_lse = both.lse[..., window:], both.state_lse[..., window:]
                spread = old.std((0, 2)).clamp(min=1e-6)
                weights["temper"].copy_((SPREAD / spread).clamp(max=1))
                gaps = weights["temper"][:, None] * old - state_lse  # [B, H, rows]
                gaps = gaps.transpose(0, 1).flatten(1).nan_to_num(0, 0, 0).sort(-1).values
                at = [round(share * (gaps.shape[1] - 1)) for share in _SHARES]
                name, candidates = "mass", gaps[:, at].T
            found = []
            for candidate in candidates.to(both.lse):
                weights[name].copy_(candidate.expand_as(weights[name]))
                found.append((joined(weights, *both) - given.out).square().sum((0, 2, 3)))
            best = torch.stack(found).argmin(0, keepdim=True)  # [1, H]
            candidates = candidates.to(both.lse).expand(-1, site.heads)
            weights[name].copy_(candidates.gather(0, best)[0])

    def learn(self, activations: Mapping[str, Activations]) -> dict[str, float]:
        """One step on these activations; the relative squared error of each layer before it.

        Raises:
            ValueError: an error is not finite.
        """
        found = {}
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * self._schedule()
        self._optimizer.zero_grad(set_to_none=True)
        for site in self._sites:
            given = activations[site.name]
            missed = self._missed(site, given)
            loss = missed / given.out.square().sum().clamp(min=1e-30)
            loss.backward()
            found[site.name] = float(loss.detach())
            if not math.isfinite(found[site.name]):
                raise ValueError(
                    f"step {self.step + 1}: the error of {site.name!r} is {found[site.name]}; give "
                    f"a lower rate than {self._rate:g}"
                )
            torch.nn.utils.clip_grad_norm_([*self._weights[site.name].values()], CLIP)
        self._optimizer.step()
        self.step += 1
        return found

    @torch.no_grad()
    def errors(self, batches: Iterable[Mapping[str, Activations]]) -> dict[str, float]:
        """Each layer's squared error over all batches, relative to the square of what it should
        give."""
        missed = {site.name: 0.0 for site in self._sites}
        energy = dict(missed)
        for batch in batches:
            for site in self._sites:
                missed[site.name] += float(self._missed(site, batch[site.name]))
                energy[site.name] += float(batch[site.name].out.square().sum())
        return {name: missed[name] / max(energy[name], 1e-30) for name in missed}

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, apart from `step`."""
        held = {}
        for name, tensor in self._flat():
            held[f"weight/{name}"] = tensor.detach()
            for moment in _MOMENTS if self.step else ():
                held[f"{moment}/{name}"] = self._optimizer.state[tensor][moment]
        return held

    def load(self, step: int, held: Mapping[str, Tensor]) -> None:
        """Goes on from a `state` of `step`.

        Raises:
            ValueError: it has other tensors than this transfer.
        """
        own = self.state()
        moments = [f"{moment}/{name}" for name, _ in self._flat() for moment in _MOMENTS]
        expected = {name: tensor.shape for name, tensor in own.items()}
        expected |= {name: own[f"weight/{name.partition('/')[2]}"].shape for name in moments}
        if {name: tensor.shape for name, tensor in held.items()} != expected:
            raise ValueError("its tensors are not those of this policy and model")
        state = {}
        for i, (name, tensor) in enumerate(self._flat()):
            with torch.no_grad():
                tensor.copy_(held[f"weight/{name}"])
            state[i] = {moment: held[f"{moment}/{name}"].to(tensor.device) for moment in _MOMENTS}
            state[i]["step"] = torch.tensor(float(step))
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = step

    def _missed(self, site: Site, given: Activations) -> Tensor:
        out = joined(self._weights[site.name], *self._reads(site, given))
        return (out - given.out).square().sum()

    def _reads(self, site: Site, given: Activations) -> Reads:
        return reads(
            *(given.query, given.key, given.value),
            self._memories[site.name],
            self._weights[site.name],
            site.scale,
            site.softcap,
            ops=(self._ops.forward, self._ops.backward),
        )

    def _schedule(self) -> float:
        done = self.step / self._steps
        rising = (self.step + 1) / max(1, round(WARMUP * self._steps))
        return min(1.0, rising) * 0.5 * (1 + math.cos(math.pi * done))

    def _flat(self) -> list[tuple[str, Tensor]]:
        return [
            (f"{site}/{key}", tensor)
            for site, tensors in self._weights.items()
            for key, tensor in tensors.items()
        ]
