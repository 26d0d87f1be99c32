"""Attention of packed rows, and which attention kernels a policy may run with.

transformers asks a registry for its attention function, by the name in the model's configuration. Ours is under the
name of the stock one with "fitrl_" before it. It is handed a `PackedRow` where there is one, and then computes what the
row's histories would alone; everything else, padded batches and sampling with a cache, goes to the stock one.

| where                                                 | kernel                                      |
|-------------------------------------------------------|---------------------------------------------|
| CPU; float64; heads of fewer than 16 numbers          | a dense mask: the reference                 |
| CUDA, 16-bit, nothing shared, logits not soft-capped  | flash attention over lengths                |
| the same, one history of 8,192 tokens, on a Hopper    | cuDNN's attention                           |
| CUDA, 16-bit, shared, no window, no soft cap          | flash attention by parts, `tree_attention`  |
| CUDA otherwise                                        | FlexAttention, compiled once for all shapes |

All of it can be traced: a compiled decoder layer is one graph, its attention in the middle. So masks are made before
the layers run, by `prepare`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from fitrl.data.batch import ModelInputs
from fitrl.errors import UnsupportedError
from fitrl.policy.packed_row import BLOCK, PackedRow
from fitrl.policy.tree_attention import tree_attention

_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LONG = 8192  # positions from which on one history alone is worth cuDNN's attention
_LONG_BACKEND = SDPBackend.CUDNN_ATTENTION
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_STOCK = ("sdpa", "eager")
_PREFIX = "fitrl_"
# that there are fewer key heads than query heads; before torch 2.12 it is not
_FLASH_IS_TOLD_OF_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
# what some models add to the logits or to the softmax; none of the kernels here does
_UNKNOWN = ("s_aux", "position_bias", "head_mask")


def attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """Leave cuDNN's attention out: it compiles a plan for every new shape, and here every batch and token is one.

    On one H100 that took 1.7 ms of each layer's 1.9 ms while sampling with SmolLM2-135M.
    """
    return sdpa_kernel(_BACKENDS) if device.type == "cuda" else nullcontext()


def packed_row(inputs: ModelInputs) -> PackedRow:
    """A packed batch as its device's kernels want it.

    FlexAttention wants blocks. cuDNN compiles a plan for each new length, which has to be paid back by later batches;
    so a long history has one of sixteen lengths between two powers of two.
    """
    if inputs.input_ids.device.type != "cuda":
        return PackedRow(inputs)
    assert inputs.boundaries is not None  # a packed batch's
    one = is_one_long_history(inputs)
    multiple = 1 << (inputs.longest.bit_length() - 5) if one else BLOCK
    return PackedRow(inputs, multiple_of=multiple, is_one_long_history=one)


def is_one_long_history(inputs: ModelInputs) -> bool:
    """Whether a batch, padded or packed, is a single history that cuDNN's attention is worth taking for."""
    rows, length = inputs.input_ids.shape
    one = rows == 1 and (inputs.boundaries is None or len(inputs.boundaries) == 2)
    if not (one and length >= LONG and inputs.input_ids.device.type == "cuda"):
        return False
    return torch.cuda.get_device_capability(inputs.input_ids.device) >= (9, 0)


def skips_hidden_keys(device: torch.device) -> bool:
    """Whether attention over a packed row costs only what is in sight, instead of everything before a token."""
    return device.type == "cuda"


def keep_soft_caps(network: Any) -> None:
    """Leave SDPA to models that do not cap attention logits: it cannot, and transformers 5.17 lets it drop the cap."""
    capped = getattr(network.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and network.config._attn_implementation == "sdpa":
        network.set_attn_implementation("eager")


def read_packed_rows(network: Any) -> bool:
    """Make a transformers model hand packed rows to our attention; whether it lets us."""
    stock = network.config._attn_implementation.removeprefix(_PREFIX)
    if stock not in _STOCK:
        return False
    network.set_attn_implementation(_register(stock))
    return bool(network.config._attn_implementation == _PREFIX + stock)


def read_no_packed_rows(network: Any) -> None:
    """Give a transformers model its stock attention back."""
    network.set_attn_implementation(network.config._attn_implementation.removeprefix(_PREFIX))


@functools.cache
def _register(stock: str) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        row = options.pop("packed_row", None)
        if row is None:
            return _stock_attention(stock, module)(module, query, key, value, mask, **options)
        return _attend_as_asked(module, query, key, value, row, options), None

    masks: Any = AttentionMaskInterface
    AttentionInterface.register(_PREFIX + stock, attention)
    masks.register(_PREFIX + stock, masks()[stock])
    return _PREFIX + stock


def _stock_attention(stock: str, module: Any) -> Callable[..., Any]:
    from transformers import AttentionInterface

    functions: Any = AttentionInterface
    # every model's default is the function of this name beside it
    default = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Any] = functions().get_interface(stock, default)
    return found


def _attend_as_asked(
    module: Any, query: Tensor, key: Tensor, value: Tensor, row: PackedRow, options: dict[str, Any]
) -> Tensor:
    """Read what transformers' models ask of an attention function; returns [1, L, heads, D]."""
    asked = [name for name in _UNKNOWN if options.get(name) is not None]
    if asked or options.get("dropout") or options.get("is_causal") is False or key.shape[2] != row.length:
        raise UnsupportedError(
            f"{type(module).__name__} asks for attention that packed rows do not have ({asked or 'no causal mask'}): "
            "use pack(..., layout='padded')"
        )
    scale = options.get("scaling")
    return attend(
        query,
        key,
        value,
        row,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        softcap=options.get("softcap"),
        window=options.get("sliding_window"),
    ).contiguous()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention within a packed row, by the fastest kernel that computes what is asked for.

    Args:
        query: [1, heads, L, D], or `row.queries` of them.
        key: [1, key heads, L, D]; each serves as many query heads as there are more of them.
        value: [1, key heads, L, D].
        row: who sees whom.
        scale: of the logits.
        softcap: c of c tanh(logits / c), or None.
        window: how many positions a token sees, itself included; None: all of its history.

    Returns:
        [1, L, heads, D], as many as queries.
    """
    if torch.is_autocast_enabled(query.device.type):  # as it does for the stock attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if window is not None and window >= row.longest:
        window = None  # it hides nothing
    kernel = choose_kernel(query, value, row, softcap=softcap, window=window)
    if kernel == "dense":
        return dense_attention(query, key, value, row, scale=scale, softcap=softcap, window=window)
    if kernel == "causal":
        return causal_attention(query, key, value, scale=scale)
    if kernel == "tree":
        return shared_attention(query, key, value, row, scale=scale)
    if kernel == "lengths":
        return length_attention(query, key, value, row, scale=scale, window=window)
    return flex_attention(query, key, value, row, scale=scale, softcap=softcap, window=window)


def choose_kernel(
    query: Tensor, value: Tensor, row: PackedRow, *, softcap: float | None, window: int | None
) -> Literal["dense", "causal", "tree", "lengths", "flex"]:
    """Which kernel `attend` takes; see the module's table."""
    size = query.shape[-1]
    if query.device.type != "cuda" or query.dtype == torch.float64 or min(size, value.shape[-1]) < 16:
        return "dense"
    if query.dtype not in _FLASH_DTYPES or size != value.shape[-1] or size > 256 or size % 8 or softcap is not None:
        return "flex"
    if row.is_one_long_history and window is None and size <= 128:
        return "causal"
    if row.crossings is None:
        return "lengths"
    return "tree" if window is None else "flex"


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """`attend` with a dense mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mask = row.dense(window)
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)
    logits = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights = logits.masked_fill(~mask, -torch.inf).softmax(dim=-1, dtype=exact).to(value.dtype)
    return (weights @ value).transpose(1, 2)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """`attend` of a row with one history, without a window or a soft cap."""
    groups = query.shape[1] != key.shape[1]
    with sdpa_kernel(_LONG_BACKEND):
        attended = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=groups)
    return attended.transpose(1, 2)


def shared_attention(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, *, scale: float) -> Tensor:
    """`attend` with shared prefixes, without a window or a soft cap, by `tree_attention`."""
    query, key, value = (heads[0].transpose(0, 1) for heads in (query, *_with_a_part(key, value, row)))
    lengths = (row.query_bounds, row.key_bounds, row.crossings, row.longest, *row.longest_crossing)
    attended: Tensor = tree_attention(query, key, value, *lengths, scale)[0]
    return attended[None]


def length_attention(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, *, scale: float, window: int | None = None
) -> Tensor:
    """`attend` with flash attention over segments that are given by their lengths."""
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if _FLASH_IS_TOLD_OF_GROUPS:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    query, key, value = (heads[0].transpose(0, 1) for heads in (query, *_with_a_part(key, value, row)))
    # of fewer queries than keys the kernel takes the last to be in one line
    bounds = row.query_bounds, row.key_bounds
    attended: Any = varlen_attn(query, key, value, *bounds, row.longest, row.longest, **options)
    return attended[None]  # type: ignore[no-any-return]


def _with_a_part(key: Tensor, value: Tensor, row: PackedRow) -> tuple[Tensor, Tensor]:
    """Without what lies behind a stretch: its gradient is zero, which flash attention would not write."""
    return (key[:, :, : row.behind], value[:, :, : row.behind]) if row.is_stretch else (key, value)


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """`attend` with FlexAttention; the row's length is a multiple of 128."""
    from torch.nn.attention.flex_attention import flex_attention as plain

    # a default and not a captured number: torch 2.11 makes a captured one a symbol, which its FlexAttention refuses
    def cap(
        score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor, limit: float = softcap or torch.inf
    ) -> Tensor:
        return limit * torch.tanh(score / limit)

    any_plain: Any = plain
    kernel = any_plain if torch.compiler.is_compiling() else _compiled_flex_attention()
    attended: Tensor = kernel(
        query,
        key,
        value,
        score_mod=None if softcap is None else cap,
        block_mask=row.blocks(window),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention as plain

    allow_many_graphs()
    return torch.compile(plain, dynamic=True)


def allow_many_graphs() -> None:
    """Let one function have a graph each for layouts, precisions, windows, soft caps, with and without gradients.

    Past the limit, by default 8, it would run uncompiled; FlexAttention then computes every pair of tokens.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)


def prepare(row: PackedRow, network: Any) -> None:
    """Make the masks that the layers of a transformers model will ask for, so that compiled ones find them made."""
    config = network.config.get_text_config()
    device = row.ends.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else network.dtype
    flash = dtype in _FLASH_DTYPES and getattr(config, "attn_logit_softcapping", None) is None
    windows = {getattr(owner, "sliding_window", None) for owner in (config, *network.modules())}
    for width in windows:
        if width is not None and type(width) is not int:
            continue
        window = None if width is not None and width >= row.longest else width
        if device != "cuda":
            row.dense(window)
        elif not flash or (row.crossings is not None and window is not None):
            row.blocks(window)
