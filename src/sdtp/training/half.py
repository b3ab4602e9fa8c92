"""What float16 needs so that small gradients keep their digits."""

import torch

# Powers of two, so that multiplying and dividing again costs no digit.
_SCALES = (2.0**12, 2.0**6, 1.0)


def loss_scales(dtype: torch.dtype) -> tuple[float, ...]:
    """What to multiply a loss by, and to divide its gradients by again, in this order until nothing overflows.

    The mean over a response leaves gradients in float16 among its least numbers, where digits are lost and nothing is
    said.

    Args:
        dtype: of the model; other formats reach as far down as gradients do, and get (1.0,).
    """
    return _SCALES if dtype == torch.float16 else (1.0,)
