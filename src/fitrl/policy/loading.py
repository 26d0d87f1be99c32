"""From a base model's name to a policy in memory: weights, tokenizer, adapters, and what its head allows.

Enters: a hub id, a local folder, a GGUF file or "tiny". Leaves: a `Policy`. Weights are float32, because an
RL-sized update is lost in bfloat16 weights; Lightning's `precision` decides what is computed in what.
"""

from __future__ import annotations

import importlib.resources
import json
import logging
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fitrl.errors import (
    CheckpointError,
    InvalidArgumentError,
    MissingDependencyError,
    ModelNotFoundError,
)
from fitrl.policy.policy import Policy
from fitrl.policy.probing import probe
from fitrl.policy.sharding import like

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)  # no slots: the command line reads defaults with vars()
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021) on the base model's frozen weights.

    Attributes:
        rank: rank of each adapter.
        alpha: adapters are scaled by alpha / rank.
        target_modules: names of the layers to adapt; "all-linear" is every linear layer but the output head.
        seed: of the adapters' random half; the other half is 0, so that the policy starts as the base model.
    """

    rank: int = 8
    alpha: int = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InvalidArgumentError(f"LoraSettings.rank must be at least 1, got {self.rank}")
        if self.alpha < 1:
            raise InvalidArgumentError(f"LoraSettings.alpha must be at least 1, got {self.alpha}")


def load_tokenizer(base_model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model.

    Raises:
        ModelNotFoundError: nothing by that name.
    """
    from transformers import AutoTokenizer

    folder, options = resolve_base_model(base_model)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, struct.error) as error:
        raise _not_found(base_model, error) from error
    if len(tokenizer) < 2:  # transformers makes an empty tokenizer of a folder without one
        raise ModelNotFoundError(f"base_model {base_model!r} has no tokenizer: save one beside the weights")
    return tokenizer


def load_policy(
    base_model: str,
    lora: LoraSettings | None = None,
    *,
    weights: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Policy:
    """Load a policy in float32, dropout off: to the CPU, or to what is torch's default device around the call.

    Wherever that is, its numbers are the same: a GPU would round rotary frequencies in another way, and draw others for
    the random half of adapters.

    Args:
        base_model: hub id, local folder, GGUF file or "tiny".
        lora: adapters to train; None trains all weights.
        weights: a checkpoint folder to take the weights from (all of them, or the adapters').
        tokenizer: one that is loaded already.

    Raises:
        ModelNotFoundError: nothing by that name.
        CheckpointError: the folder of weights holds none that can be loaded.
    """
    from transformers import AutoModelForCausalLM

    is_adapter_folder = weights is not None and (weights / "adapter_config.json").is_file()
    folder, options = resolve_base_model(base_model) if weights is None or is_adapter_folder else (str(weights), {})
    device = torch.empty(0).device
    to = {} if device.type == "cpu" else {"device_map": device}
    try:
        with _no_progress_bars(), torch.device("cpu"):
            network: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, **to, **options, **(_dequantized() if "gguf_file" in options else {})
            )
    except (OSError, ValueError, SafetensorError, struct.error) as error:
        if weights is not None and not is_adapter_folder:
            raise CheckpointError(f"{weights} holds no weights that can be loaded: {_first_line(error)}") from error
        raise _not_found(base_model, error) from error
    if "gguf_file" in options and getattr(network, "hf_quantizer", None) is not None:
        # the weights are plain float32 by now; transformers would refuse to save them all the same
        network.hf_quantizer.remove_quantization_config(network)
    if is_adapter_folder:
        from peft import PeftModel

        try:
            network = PeftModel.from_pretrained(network, str(weights), is_trainable=lora is not None)
        except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{weights} holds no adapters that fit: {_first_line(error)}") from error
    elif lora is not None:
        network = _with_adapters(network, lora)
    _disable_dropout(network)
    policy = Policy(network=network, tokenizer=tokenizer or load_tokenizer(base_model))
    text_config = policy.causal_lm.config.get_text_config()
    policy.softcap = getattr(text_config, "final_logit_softcapping", None)
    probe(policy)
    return policy


def load_weights(policy: Policy, folder: Path) -> None:
    """Read a checkpoint folder's weights into a live policy, exactly."""
    held = trained_state(policy)
    state = read_weights(policy, folder, {name: tensor.shape for name, tensor in held.items()})
    if policy.is_adapter:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(policy.network, {name: like(state[name], held[name]) for name in state})
    else:
        policy.network.load_state_dict({name: like(state[name], held[name]) for name in state}, strict=False)


def read_weights(policy: Policy, folder: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Read a checkpoint folder's weights, whole, for a live policy; one of two tied names may be missing.

    Args:
        policy: that they are for.
        folder: where they lie.
        shapes: of the whole tensors that `trained_state` names.

    Raises:
        CheckpointError: they cannot be read.
        InvalidArgumentError: they are those of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    try:
        for file in sorted(folder.glob("adapter_model.safetensors" if policy.is_adapter else "model*.safetensors")):
            state |= load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the weights in {folder} cannot be read: {error}") from error
    missing = sorted(shapes.keys() - state.keys() - tied_names(policy))
    unexpected = sorted(state.keys() - shapes.keys())
    reshaped = [name for name in shapes.keys() & state.keys() if shapes[name] != state[name].shape]
    if missing or unexpected or reshaped:  # before anything is changed
        raise InvalidArgumentError(
            f"{folder} holds other weights than the open model: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"of another shape {sorted(reshaped)[:3]}"
        )
    return state


def trained_state(policy: Policy, *, keep_parameters: bool = False) -> Mapping[str, Tensor]:
    """The trained weights under the names of a saved checkpoint: all of them, or the adapters'.

    Args:
        policy: whose.
        keep_parameters: give the parameters themselves, not tensors that share their memory.
    """
    held: Mapping[str, Tensor] = policy.network.state_dict(keep_vars=keep_parameters)
    if not policy.is_adapter:
        return held
    from peft import get_peft_model_state_dict

    # "auto" would ask the model hub whether the vocabulary was resized
    state: Mapping[str, Tensor] = get_peft_model_state_dict(policy.network, held, save_embedding_layers=False)
    return state


def save_weights(
    policy: Policy,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
    *,
    shares: Sequence[Mapping[str, int]] = (),
) -> None:
    """Write weights, configuration and tokenizer so that transformers and PEFT load the folder as it is.

    Args:
        policy: what to write.
        folder: where.
        weights: what `trained_state` names, whole; None: they are whole in the policy.
        shares: what every rank has of them, names and bytes, where the others wrote theirs by `save_share`; `weights`
            are the first's.
    """
    network: Any = policy.network if policy.is_adapter else policy.causal_lm
    options: dict[str, Any] = {}
    if policy.is_adapter:
        options["save_embedding_layers"] = False  # "auto" would ask the model hub whether the vocabulary was resized
    if weights is not None:
        options["state_dict"] = weights
    if shares:
        options["max_shard_size"] = sum(sum(share.values()) for share in shares) + 1  # one file
    with _no_progress_bars():
        network.save_pretrained(folder, **options)
    policy.tokenizer.save_pretrained(folder)
    if not shares:
        return
    files = [share_file(number, len(shares)) for number in range(len(shares))]
    (folder / "model.safetensors").rename(folder / files[0])
    for number, file in enumerate(files[1:], start=1):
        (folder / _unfinished(number)).rename(folder / file)
    index = {
        "metadata": {"total_size": sum(sum(share.values()) for share in shares)},
        "weight_map": {name: file for file, share in zip(files, shares, strict=True) for name in share},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_share(folder: Path, number: int, weights: dict[str, Tensor]) -> Path:
    """Write a rank's share of the weights, under a name that transformers leaves alone; see `save_weights`."""
    path = folder / _unfinished(number)
    save_file(weights, str(path), metadata={"format": "pt"})
    return path


def share_file(number: int, count: int) -> str:
    """Name of the file with a rank's share of the weights, as transformers numbers them."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _unfinished(number: int) -> str:
    return f"share-{number:05d}"  # transformers deletes numbered files that it did not write itself


def tied_names(policy: Policy) -> set[str]:
    """Second names of weights that have two; a folder holds the first."""
    return set() if policy.is_adapter else set(getattr(policy.causal_lm, "all_tied_weights_keys", {}) or {})


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for every file of every checkpoint."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def resolve_base_model(base_model: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for a base model: a hub id or a folder, and options.

    Raises:
        ModelNotFoundError: a file or folder that is not there.
        MissingDependencyError: a GGUF file, and no package that reads them.
    """
    if base_model == "tiny":
        return str(importlib.resources.files("fitrl.assets") / "tiny"), {}
    path = Path(base_model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(f"base_model {base_model!r}: no such GGUF file")
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError("reading a GGUF file needs pip install 'fitrl[gguf]'") from error
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return str(path), {}
    if path.is_absolute() or base_model.startswith((".", "~")):
        raise ModelNotFoundError(f"base_model {base_model!r}: no such folder")
    return base_model, {}


def _dequantized() -> dict[str, Any]:
    """Options that make transformers read a GGUF file's blocks into plain weights; older versions always do."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _not_found(base_model: str, error: Exception) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"base_model {base_model!r} cannot be loaded: it is neither 'tiny', nor a folder or GGUF file here, nor a hub "
        f"id that can be reached ({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _with_adapters(network: PreTrainedModel, lora: LoraSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=()), torch.device("cpu"):
        torch.default_generator.manual_seed(lora.seed)
        try:
            return get_peft_model(network, config)
        except ValueError as error:
            raise InvalidArgumentError(f"LoraSettings.target_modules={lora.target_modules!r}: {error}") from error


def _disable_dropout(network: nn.Module) -> None:
    """Set every dropout to 0: the sampler has none, and a ratio between the two would be noise."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
