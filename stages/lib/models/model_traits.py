"""What of an architecture must be known, or changed, before a model of it is trained."""

from torch import nn

CAN_BE_PACKED = "can_be_packed"  # key of config.json; prepare_base writes it where the answer is no


def switch_off_dropout(model: nn.Module) -> None:
    """Set every probability of dropout, and noise of routers, to 0: a pass then depends on weights and ids alone.

    Architectures keep them under names of their own, such as `dropout`, `attn_dropout` and `router_jitter_noise`.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            is_number = isinstance(value, float | int) and not isinstance(value, bool)
            if is_number and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)
