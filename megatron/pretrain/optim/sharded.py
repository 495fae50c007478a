"""The optimizer's state in one form for every layout, and whichever of the engine's optimizers holds it.

A checkpoint holds, for each weight W, `optimizer.state.exp_avg.W`, `optimizer.state.exp_avg_sq.W` and, in
bf16 runs, `optimizer.state.fp32_param.W`: whole tensors of the weight's shape, cut as the weight is. A plain
optimizer's state loads into a distributed one and back. Everything else an optimizer keeps follows from the
configuration and from how many updates it made.

Two defects of megatron-core 0.16.1 on torch's AdamW are mended here. Loading a distributed optimizer fails
with a KeyError, since it copies into every entry of AdamW's state, `step` among them, which the checkpoint
keeps elsewhere. And after a load all parameters share one `step` tensor, so one update counts as many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from megatron.pretrain.optim.wholes import gather, scatter, wholes

Cut = ShardedTensor | ShardedTensorFactory

# What a checkpoint says of itself. The second entry keeps the names of a plain optimizer plain.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_tensors(optimizer: MegatronOptimizer, model_content: dict[str, Any], *,
                    is_loading: bool) -> dict[str, Any]:
    """The state as sharded tensors: what to save, or with `is_loading` the places to load into.

    `model_content` is the model's sharded state dict, from which the tensors take names and cuts. Of a distributed
    optimizer a rank has the tensors that it owns (`wholes`), and nothing where there are fewer than ranks.
    """
    part = _only_part(optimizer)
    _prime(part)
    if isinstance(part, DistributedOptimizer):
        owned = _owned_tensors(part, model_content, is_loading=is_loading)
        return {"param_state": owned} if owned else {}
    state = optimizer.sharded_state_dict(model_content, is_loading=is_loading, metadata=SHARDING)
    inner = state["optimizer"] if isinstance(part, Float16OptimizerWithFloat16Params) else state
    moments = {number: {name: tensors[name] for name in ("exp_avg", "exp_avg_sq")}
               for number, tensors in inner["state"].items() if isinstance(number, int)}
    masters = state.get("fp32_from_fp16_params")
    return {"moments": moments} if masters is None else {"moments": moments, "masters": masters}


def load_tensors(optimizer: MegatronOptimizer, loaded: dict[str, Any], updates: int) -> None:
    """Take over loaded `sharded_tensors`, after `updates` steps of the optimizer that saved them."""
    part = _only_part(optimizer)
    state = part.state_dict()
    if isinstance(part, DistributedOptimizer):
        _set_step(part, state["optimizer"]["param_groups"], updates)
        part.load_state_dict(state)
        _hand_out(part, loaded.get("param_state", {}))
    else:
        is_mixed = isinstance(part, Float16OptimizerWithFloat16Params)
        inner = state["optimizer"] if is_mixed else state
        for number, moments in loaded["moments"].items():
            inner["state"][number] = {**inner["state"][number], **moments}
        if _counts_by_parameter(part):
            inner["state"]["common_step"] = torch.tensor(float(updates))
        _set_step(part, inner["param_groups"], updates)
        if is_mixed:
            state["fp32_from_fp16_params"] = loaded["masters"]
        part.load_state_dict(state)
    _unshare_steps(part)


def mend_loading(optimizer: MegatronOptimizer) -> None:
    """Let a distributed optimizer load a state that lacks entries: those keep the value they have."""
    for part in parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            part._set_main_param_and_optimizer_states = MethodType(_set_with_defaults, part)


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that the engine has chained together."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _only_part(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """Dense models have one optimizer; the engine chains more only for experts."""
    (part,) = parts(optimizer)
    return part


@torch.no_grad()
def _set_with_defaults(self: DistributedOptimizer, model_param: torch.nn.Parameter,
                       tensors: dict[str, torch.Tensor]) -> None:
    group, order = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group]["params"][order]
    current = {"param": main_param, **self.optimizer.state[main_param]}
    kept = {name: value.clone() for name, value in current.items() if name not in tensors}
    DistributedOptimizer._set_main_param_and_optimizer_states(self, model_param, {**kept, **tensors})


def _owned_tensors(part: DistributedOptimizer, model_content: dict[str, Any], *, is_loading: bool) -> dict[int, Cut]:
    """By their numbers, the tensors that this rank owns, cut as their weights are."""
    cuts, _ = extract_sharded_tensors_and_factories(model_content)
    by_weight = {cut.data: cut for cut in nested_values(cuts)}
    names = _names(part)
    owned: dict[int, Cut] = {}
    for number, whole in enumerate(wholes(part, list(names))):
        is_owner = whole.owner == part.data_parallel_group.rank()
        values = gather(part, whole) if not is_loading else torch.zeros(whole.weight.numel()) if is_owner else None
        if values is not None:
            cut = by_weight[whole.weight]
            owned[number] = _cut_alike(cut, f"optimizer.state.{names[whole.name]}.{cut.key}",
                                       values.view(whole.weight.shape))
    return owned


def _cut_alike(cut: Cut, key: str, values: Tensor) -> Cut:
    """These values under this key, with a weight's place in the whole model; of its data-parallel copies the first."""
    changes = {"key": key, "data": values, "replica_id": (*cut.replica_id[:-1], 0)}
    return replace(cut, **changes, **({"dtype": values.dtype} if isinstance(cut, ShardedTensor) else {}))


def _hand_out(part: DistributedOptimizer, owned: dict[int, Tensor]) -> None:
    """Every rank's pieces, from what the owners have loaded."""
    rank, names, pieces = part.data_parallel_group.rank(), list(_names(part)), {}
    for number, whole in enumerate(wholes(part, names)):
        piece = scatter(part, whole, owned[number] if whole.owner == rank else None)
        if piece is not None:
            pieces[whole.name] = piece
        if len(pieces) == len(names):    # a weight's tensors follow each other, and its pieces are cut alike
            part._set_main_param_and_optimizer_states(whole.weight, pieces)
            pieces = {}


def _names(part: DistributedOptimizer) -> dict[str, str]:
    """What the optimizer calls a weight's tensors, and a checkpoint; in fp32 the weight is its own master."""
    moments = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    return {**moments, "param": "fp32_param"} if part.config.bf16 else moments


def _set_step(part: MegatronOptimizer, param_groups: list[dict[str, Any]], updates: int) -> None:
    """Where updates are counted by parameter group, set the count.

    Adam of Transformer Engine and of apex counts so, and has no count before its first update: a resumed run would
    begin at 1, whose bias correction would make its next updates up to 2.2 times as long.
    """
    for group in param_groups:
        if "step" in group or not _counts_by_parameter(part):
            group["step"] = type(group.get("step", 0))(updates)


def _counts_by_parameter(part: MegatronOptimizer) -> bool:
    return isinstance(part.optimizer, torch.optim.AdamW)


def _prime(part: MegatronOptimizer) -> None:
    """Give torch's AdamW the moments that it has before its first update: what is saved then, and what the
    engine's loading copies into but does not create."""
    for parameter, state in _torch_states(part):
        if not state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(parameter),
                         exp_avg_sq=torch.zeros_like(parameter))


def _unshare_steps(part: MegatronOptimizer) -> None:
    for _, state in _torch_states(part):
        state["step"] = state["step"].clone()


def _torch_states(part: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Each parameter that torch's AdamW updates, with its state; nothing where the optimizer is another's."""
    if _counts_by_parameter(part):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, part.optimizer.state[parameter]
