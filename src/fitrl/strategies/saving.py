"""Checkpoints of several ranks: each writes a share of the weights and its own pieces of the moments.

Enters: weights and an optimizer's state, whole or in pieces, on every rank. Leaves: one checkpoint folder that
transformers loads as it is and any number of ranks resumes from; no rank holds more of what was in pieces than its
share.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from fitrl.data import ranks
from fitrl.errors import CheckpointError, RankError
from fitrl.policy import checkpoints, pieces
from fitrl.policy.checkpoints import Manifest
from fitrl.policy.loading import save_share, save_weights, share_file, tied_names
from fitrl.policy.policy import Policy


def write(
    folder: Path,
    manifest: Manifest,
    policy: Policy,
    *,
    weights: Iterator[tuple[str, Tensor]] | None,
    state: dict[str, Any] | None,
    moments: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint; a collective.

    Args:
        folder: where, on a file system of all ranks if anything is in pieces.
        manifest: what it holds.
        policy: whose weights.
        weights: each whole on every rank when its turn comes; None: they are whole in the policy.
        state: the resumable state, written by the first rank; None for weights only.
        moments: what of it lies in pieces, `DTensor`s.

    Raises:
        CheckpointError: it could not be written; nothing that was there before is lost.
    """
    shares = weights is not None and not policy.is_adapter and ranks.world_size() > 1  # adapters are small
    begun = Path(ranks.first(lambda: str(checkpoints.begin(folder)))) if moments or shares else None
    mine: dict[str, Tensor] | None = None
    held: list[dict[str, int]] = []
    sums: dict[str, tuple[int, str]] = {}
    try:
        if moments and begun is not None:
            sums |= _write_moments(begun, moments)
        if weights is not None:
            mine, held = _take_share(weights, tied_names(policy), ranks.world_size() if shares else 1)
        if mine is not None and shares and begun is not None:
            sums |= _write_share(begun, mine)
    except Exception as error:
        if begun is not None:
            checkpoints.discard(begun)
        if isinstance(error, RankError):
            raise CheckpointError(f"cannot write the checkpoint {folder}: {error}") from error
        raise
    ranks.first(
        lambda: checkpoints.write(
            folder,
            manifest,
            lambda to: save_weights(policy, to, mine, shares=held if shares else ()),
            state,
            begun=begun,
            sums=sums,
        )
    )


def pieces_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """What lies in pieces of an optimizer's state, by the parameter's number and its own name."""
    return {
        f"{number}.{name}": value
        for number, moments in state["state"].items()
        for name, value in moments.items()
        if isinstance(value, DTensor)
    }


def without_pieces(state: dict[str, Any]) -> dict[str, Any]:
    """The rest of it."""
    kept = {
        number: {name: value for name, value in moments.items() if not isinstance(value, DTensor)}
        for number, moments in state["state"].items()
    }
    return state | {"state": kept}


def moment_of(name: str, state: Mapping[int, Any]) -> tuple[int, str]:
    """The parameter's number and the moment's own name that a tensor in pieces was saved by.

    Raises:
        CheckpointError: it is of no parameter of the optimizer's state.
    """
    number, _, key = name.partition(".")
    if not number.isdecimal() or int(number) not in state:
        raise CheckpointError(f"the checkpoint holds the moment {name!r}, which is of no parameter that is trained")
    return int(number), key


def _write_moments(begun: Path, moments: Mapping[str, Tensor]) -> dict[str, tuple[int, str]]:
    """Write the moments, each rank its pieces; checksums of all."""
    into = begun / checkpoints.MOMENTS
    ranks.first(into.mkdir)
    pieces.write(into, moments)
    written = [path.relative_to(begun).as_posix() for path in sorted(into.iterdir())]
    mine = written[ranks.rank() :: ranks.world_size()]
    return _of_all(lambda: checkpoints.checksums(begun, mine))


def _take_share(
    weights: Iterator[tuple[str, Tensor]], left_out: set[str], count: int
) -> tuple[dict[str, Tensor], list[dict[str, int]]]:
    """This rank's share of the weights, on the host, and names and bytes of each of the shares."""
    mine: dict[str, Tensor] = {}
    shares: list[dict[str, int]] = [{} for _ in range(count)]
    sizes = [0] * count
    for name, tensor in weights:
        if name in left_out:
            continue
        smallest = sizes.index(min(sizes))
        shares[smallest][name] = tensor.nbytes
        sizes[smallest] += tensor.nbytes
        if smallest == ranks.rank():
            mine[name] = tensor.cpu().contiguous()
    return mine, shares


def _write_share(begun: Path, weights: dict[str, Tensor]) -> dict[str, tuple[int, str]]:
    """Write this rank's share of the weights; `save_weights` writes the first one's. Checksums of the others."""

    def written() -> dict[str, tuple[int, str]]:
        rank = ranks.rank()
        if rank == 0:
            return {}
        try:
            path = save_share(begun, rank, weights)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write the checkpoint {begun}: {error}") from error
        return {share_file(rank, ranks.world_size()): checkpoints.checksums(begun, [path.name])[path.name]}

    return _of_all(written)


def _of_all(work: Callable[[], dict[str, tuple[int, str]]]) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of the files that each rank wrote, of all ranks; all raise where one fails."""
    said = ranks.collect(ranks.together(lambda: json.dumps(work())))
    return {name: (size, checksum) for one in said for name, (size, checksum) in json.loads(one).items()}
