"""The DeepSpeed back of the engine: ZeRO 0 to 3, optimizer and parameters on the CPU if asked."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from stages.lib.command.errors import StageError
from stages.lib.compute.engine.base import Engine
from stages.lib.compute.engine.deepspeed_setup import deepspeed_config, initialize, require_whole_weights
from stages.lib.compute.engine.torch import gradients_of, sum_gradients
from stages.lib.settings.runtime import Runtime


class DeepSpeedEngine(Engine):
    """The same engine on `deepspeed.initialize`, with the same AdamW of torch inside ZeRO."""

    def _prepare(self) -> None:
        dtypes = {weight.dtype for weight in self.trained.values()}
        if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16}:
            raise StageError(f"DeepSpeed trains float32 or bfloat16 weights, one of them at a time, found {dtypes}")
        require_whole_weights(self.module, self.runtime.zero_stage)
        bf16 = dtypes == {torch.bfloat16}
        self.stage = self.runtime.zero_stage
        config = deepspeed_config(
            {
                "bf16": {"enabled": bf16},
                "data_types": {"grad_accum_dtype": "fp32"},
                "communication_data_type": "fp32",
                "gradient_clipping": self.settings.max_grad_norm,
                "zero_optimization": zero_section(self.runtime),
            },
            self.runtime,
            self.processes,
        )
        optimizer = self.new_optimizer(dict(self.trained))
        self.inner = initialize(self.module, config, self.processes, optimizer=optimizer)
        # In float32 without ZeRO, DeepSpeed steps the optimizer it was given and reports no norm: we sum by ourselves.
        self.unwrapped = self.stage == 0 and not bf16
        self.inner.enable_backward_allreduce = not self.unwrapped
        self.states_linked = False
        if not self.unwrapped and self.stage < 3:
            self._require_own_masters()

    def _require_own_masters(self) -> None:
        """Raise StageError where DeepSpeed takes parts of other weights for the float32 master of a weight.

        What is saved and what is put back rely on its word. With `round_robin_gradients` DeepSpeed 0.19.8 sorts the
        masters over several processes otherwise than it says; only training itself is right then.
        """

        def is_other(weight: nn.Parameter) -> bool:
            mapping = getattr(weight, "_hp_mapping")  # noqa: B009 (DeepSpeed's)
            if mapping is None:  # another process's
                return False
            where = mapping.lp_fragment_address
            part = weight.detach().flatten().narrow(0, where.start, where.numel)
            return not torch.equal(mapping.get_hp_fragment().to(part), part)

        if self.processes.any(any(map(is_other, self.trained.values()))):
            raise StageError(
                f"runtime.yaml: deepspeed: with {self.runtime.deepspeed} DeepSpeed mixes up the weights that are "
                "saved; leave round_robin_gradients out, or what else there sorts them"
            )

    def _forward(self, *inputs: Any, **options: Any) -> Any:
        return self.inner(*inputs, **options)

    def backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed averages over processes what is to be summed.
        self.inner.backward(loss if self.unwrapped else loss * self.processes.world_size)

    def _apply(self) -> float:
        for group in self.inner.optimizer.param_groups:
            group["lr"] = self.learning_rate
        if not self.unwrapped:
            self.inner.step()
            return float(self.inner.get_global_grad_norm())
        weights = list(self.trained.values())
        sum_gradients(weights, self.processes)
        norm = float(torch.nn.utils.get_total_norm(gradients_of(weights)))
        self.inner.step()
        return norm

    def full_state(self, name: str, key: str | None = None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weight = self.trained[name]
        if self.unwrapped:
            return weight.detach() if key is None else self.inner.optimizer.state[weight][key]
        if key is not None:
            self._link_states()
        shape = getattr(weight, "ds_shape", weight.shape)
        value = safe_get_full_fp32_param(weight) if key is None else safe_get_full_optimizer_state(weight, key)
        assert value is not None, "DeepSpeed holds a part of every weight that is trained"
        return value.reshape(shape).cpu()

    def full_weight(self, weight: torch.Tensor) -> torch.Tensor:
        if not hasattr(weight, "ds_id"):
            return weight.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().cpu().clone()

    def set_full_state(self, name: str, value: torch.Tensor, key: str | None = None) -> None:
        weight = self.trained[name]
        if self.unwrapped:
            with torch.no_grad():
                (weight if key is None else self.states_of(self.inner.optimizer, weight)[key]).copy_(value)
            return
        if key is not None:
            self._make_states()
        if self.stage == 3:
            _set_partition(weight, value, key)
        else:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            value = value.to(weight.device, torch.float32)
            if key is None:
                safe_set_full_fp32_param(weight, value)
            else:
                safe_set_full_optimizer_state(weight, value, key)

    def _make_states(self) -> None:
        """AdamW makes its states in its first step; a loaded state needs them before."""
        base, weights = self._optimized()
        for weight in weights:
            self.states_of(base, weight)
        self._link_states()

    def _optimized(self) -> tuple[torch.optim.Optimizer, Iterable[torch.Tensor]]:
        wrapper = self.inner.optimizer
        if self.unwrapped:
            return wrapper, self.trained.values()
        base = wrapper.optimizer
        if self.stage == 3:
            return base, wrapper.fp32_partitioned_groups_flat
        return base, [weight for group in base.param_groups for weight in group["params"]]

    def _link_states(self) -> None:
        """Let DeepSpeed find the states of a weight; by itself it looks for those of the first group alone."""
        if self.stage < 3 and not self.states_linked:
            self.inner.optimizer._hp_optimizer_states_linked = False
            self.inner.optimizer._lazy_init_hp_params_optimizer_state()
        self.states_linked = True

    def finish_loading(self) -> None:
        if self.unwrapped:
            return
        wrapper = self.inner.optimizer
        if self.stage < 3:
            wrapper.update_lp_params()
            return
        # As step() does. A pass without gradient leaves weights gathered, and what is gathered is not read again.
        wrapper._partition_all_parameters()
        for sub_group in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
        if wrapper.persistent_parameters:
            # Parameters too small to be worth sharding are gathered once and kept.
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)


def _set_partition(weight: nn.Parameter, value: torch.Tensor, key: str | None) -> None:
    """Copy this process's part of a full tensor into ZeRO 3's shard; the last one may be padded."""
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    shard = safe_get_local_fp32_param(weight) if key is None else safe_get_local_optimizer_state(weight, key)
    size = shard.numel()
    padded = torch.zeros(size * dist.get_world_size(), dtype=torch.float32, device=shard.device)
    padded[: value.numel()] = value.flatten()
    part = padded.narrow(0, size * dist.get_rank(), size)
    if key is None:
        safe_set_local_fp32_param(weight, part)
    else:
        safe_set_local_optimizer_state(weight, part, key)


def zero_section(runtime: Runtime) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": runtime.zero_stage}
    if runtime.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu"}
    if runtime.offload_parameters:
        section["offload_param"] = {"device": "cpu"}
    return section
