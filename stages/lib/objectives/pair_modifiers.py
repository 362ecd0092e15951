"""What changes the weight of a pair (WPO) or the log-probs of its replies (LD-DPO), whatever the loss."""

import torch


def wpo_weights(
    chosen_logps: torch.Tensor,
    chosen_log_collisions: torch.Tensor,
    rejected_logps: torch.Tensor,
    rejected_log_collisions: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
) -> torch.Tensor:
    """min(1, w(y_c) w(y_r)), w(y) = exp(1/|y| Σ_t [log π(y_t) − log Σ_v π(v)²]). Shape: (n,), without gradient.

    WPO (arXiv 2406.11827, Eq. 2, with weights aligned by sampled tokens): pairs that the policy itself might have
    sampled count most. A token's factor is above 1 where it is likelier than one drawn at random; the product is not.

    Args:
        chosen_logps, rejected_logps: log π(y_t|x, y_<t) of each token, 0 beyond a reply's end. Shapes: (n, t).
        chosen_log_collisions, rejected_log_collisions: log Σ_v π(v|x, y_<t)² likewise.
        chosen_lengths, rejected_lengths: tokens of a reply. Shapes: (n,).
    """
    chosen = (chosen_logps - chosen_log_collisions).detach().sum(dim=-1) / chosen_lengths
    rejected = (rejected_logps - rejected_log_collisions).detach().sum(dim=-1) / rejected_lengths
    return (chosen + rejected).clamp(max=0).exp()


def discounted_sums(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    alpha: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_{t ≤ m} log π(y_t) + α Σ_{t > m} log π(y_t), m = min(|y_c|, |y_r|), of both replies of each pair. Shapes: (n,).

    LD-DPO (arXiv 2409.06411); α = 1 gives the sums, α = 0 cuts the longer reply to the length of the shorter one.

    Args:
        chosen_logps, rejected_logps: of each token, 0 beyond a reply's end. Shapes: (n, t), of any t.
        chosen_lengths, rejected_lengths: tokens of a reply. Shapes: (n,).
    """
    shorter = torch.minimum(chosen_lengths, rejected_lengths)[:, None]

    def total(logps: torch.Tensor) -> torch.Tensor:
        beyond = torch.arange(logps.shape[1], device=logps.device) >= shorter
        return torch.where(beyond, alpha * logps, logps).sum(dim=-1)

    return total(chosen_logps), total(rejected_logps)
