"""A small byte-level Llama in plain PyTorch, with transformers' parameter names."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256


@dataclass(frozen=True)
class BytesLlamaConfig:
    """Sizes of the network, under the names of transformers' `LlamaConfig`."""

    hidden_size: int = 192
    intermediate_size: int = 448
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 1024

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; choose a divisor of the former."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions need an even one.")


class RMSNorm(nn.Module):
    """Root-mean-square norm [..., hidden] -> [..., hidden], computed in at least float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (the halves of a head are rotated)."""

    def __init__(self, config: BytesLlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, block: int = 0) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, H, T, D], [B, Hkv, T, D], [B, Hkv, T, D]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if block:
            out = blockwise_attention(q, k, v, block)
        else:
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        flat: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return flat


class MLP(nn.Module):
    """Gated feed-forward network [..., hidden] -> [..., hidden]."""

    def __init__(self, config: BytesLlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer: attention and feed-forward network, each behind a norm and a residual."""

    def __init__(self, config: BytesLlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, block: int = 0) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, block)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    """Embedding, layers and last norm; the name space `model.` of a transformers checkpoint."""

    def __init__(self, config: BytesLlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class BytesLlama(nn.Module):
    """Byte-level language model: bytes [B, T] int64 -> logits [B, T, 256], embeddings tied."""

    def __init__(self, config: BytesLlamaConfig | None = None) -> None:
        super().__init__()
        self.config = config or BytesLlamaConfig()
        self.model = Body(self.config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights; both projections into the residual stream start at zero."""
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif name == "model.embed_tokens.weight":
                nn.init.normal_(parameter, std=0.05)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, block: int = 0) -> Tensor:
        """Logits [B, T, 256] of the byte after each of input_ids [B, T].

        Args:
            input_ids: bytes, int64.
            positions: place of each byte, [B, T] int64, rising; None counts from 0.
            block: queries that `blockwise_attention` takes at a time; 0 leaves attention to torch.
        """
        x = self.model.embed_tokens(input_ids)
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=x.device)[None]
        cos, sin = rotary_table(self.config, positions, x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin, block)
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight)


def rotary_table(
    config: BytesLlamaConfig, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, head_dim / 2] of positions [B, T], in at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=wide)
    angles = positions[:, None, :, None].to(wide) * config.rope_theta ** -(half / config.head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x [B, H, T, D] with tables [B, 1, T, D / 2]."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """Causal attention, q [B, H, T, D] over k, v [B, Hkv, T, D], `block` queries at a time.

    On a CPU without tile instructions the two matrix products are two to five times as fast as
    torch's fused kernel in bfloat16, and a block reads no key behind its last query. Probabilities
    are kept for the gradient: that is B * H * T^2 / 2 numbers a layer.
    """
    heads, length, width = q.shape[1:]
    groups = k.shape[1]
    q = (q * width**-0.5).unflatten(1, (groups, heads // groups))
    blocks = []
    for start in range(0, length, block):
        end = min(start + block, length)
        rows = q[:, :, :, start:end].flatten(2, 3)  # [B, Hkv, G * n, D]
        scores = (rows @ k[:, :, :end].mT).unflatten(2, (-1, end - start))  # [B, Hkv, G, n, end]
        future = torch.full((end - start, end), -torch.inf, dtype=q.dtype, device=q.device)
        shares = (scores + future.triu(start + 1)).softmax(-1, dtype=q.dtype)
        mixed = shares.flatten(2, 3) @ v[:, :, :end]  # [B, Hkv, G * n, D]
        blocks.append(mixed.unflatten(2, (-1, end - start)).flatten(1, 2))
    return torch.cat(blocks, dim=2)


def transformers_config(config: BytesLlamaConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """The content of `config.json` for this network, as transformers reads it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        **asdict(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def byte_alphabet() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte value, in order.

    Printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on
    (the convention of GPT-2's tokenizer, which `tokenizers.pre_tokenizers.ByteLevel` applies).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer_files(longest: int) -> dict[str, Any]:
    """`tokenizer.json` and `tokenizer_config.json`: a token's id is its byte value.

    `longest` is the number of tokens that the model was made for.
    """
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(byte_alphabet())},
            "merges": [],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def save(network: BytesLlama, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM` and `AutoTokenizer` load."""
    folder.mkdir(parents=True, exist_ok=True)
    name = str(dtype).removeprefix("torch.")
    files = {
        "config.json": transformers_config(network.config, name),
        **tokenizer_files(network.config.max_position_embeddings),
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    tensors = {key: value.to(dtype).contiguous() for key, value in network.state_dict().items()}
    # Weights of an earlier run stay whole until the new ones are.
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> BytesLlama:
    """Read a folder written by `save`; raises FileNotFoundError or ValueError for a foreign one."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a folder written by `save`.")
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored.get("model_type") != "llama" or stored.get("vocab_size") != VOCABULARY:
        raise ValueError(
            f"{path} describes model_type={stored.get('model_type')!r} with "
            f"vocab_size={stored.get('vocab_size')!r}; expected a 'llama' over {VOCABULARY} bytes."
        )
    fields = BytesLlamaConfig.__dataclass_fields__
    network = BytesLlama(BytesLlamaConfig(**{key: stored[key] for key in fields}))
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network.to(dtype).eval()
