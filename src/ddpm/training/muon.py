"""Muon, an optimiser for the weight matrices inside a network: momentum whose update is orthogonalised."""

import operator
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a quintic that is steep at zero: singular values end up between 0.7 and 1.2
NS_STEPS = 5


def orthogonalised(matrices: list[Tensor]) -> list[Tensor]:
    """Approximately the nearest semi-orthogonal matrices, by Newton-Schulz iteration (Jordan et al. 2024).

    Takes matrices [R, C] with R ≤ C; all must have the same R, but may differ in C. Each iteration multiplies a matrix x by a
    polynomial of its Gram matrix x xᵀ [R, R]. So the iterations run on the Gram matrices alone, in one batch, and their product
    is applied to x once, at the end: for 96 × 864 this takes two fifths of the operations. It needs full float32 instead of
    TF32, because an iteration multiplies the rounding error of the Gram matrix by up to 12.
    """
    with full_float32():
        gram = torch.stack([x @ x.mT for x in matrices])
        norm = gram.diagonal(dim1=1, dim2=2).sum(1).sqrt()[:, None, None] + 1e-7
        gram /= norm**2  # the Gram matrix of x / norm, whose singular values are at most 1
        product = factor = polynomial(gram)
        for _ in range(NS_STEPS - 1):
            gram = factor @ gram @ factor
            factor = polynomial(gram)
            product = factor @ product
        return [p @ x for p, x in zip(product / norm, matrices, strict=True)]


@contextmanager
def full_float32() -> Iterator[None]:
    """Within the block, multiply float32 matrices without TF32 or bfloat16, whatever the global setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def polynomial(gram: Tensor) -> Tensor:
    """a I + b G + c G² for each G of `gram` [N, R, R]: the factor that one iteration multiplies by."""
    a, b, c = NS_COEFFICIENTS
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


def directions(gradients: list[Tensor], averages: list[Tensor], momentum: float) -> list[Tensor]:
    """The direction of each weight's update: Nesterov momentum, orthogonalised. Updates `averages` in place.

    The weight of a convolution [out, in, h, w] is taken as the matrix [out, h·w·in], which is its layout in channels_last.
    """
    torch._foreach_lerp_(averages, gradients, 1 - momentum)
    ahead = list(torch._foreach_lerp(gradients, averages, momentum))
    by_side = defaultdict(list)
    for i, x in enumerate(ahead):
        matrix = x.movedim(1, -1).flatten(1)
        wide = matrix if len(matrix) <= matrix.shape[1] else matrix.mT
        by_side[len(wide)].append((i, wide))
    for side, items in by_side.items():
        for (i, _), update in zip(items, orthogonalised([wide for _, wide in items]), strict=True):
            update = update if len(ahead[i]) == side else update.mT
            ahead[i] = update.reshape(ahead[i].movedim(1, -1).shape).movedim(-1, 1)
    return ahead


class Replay:
    """`directions` as a CUDA graph: it has hundreds of kernels, which take longer to launch than to run."""

    def __init__(self, gradients: list[Tensor], averages: list[Tensor], momentum: float):
        self.gradients, self.averages, self.momentum = [torch.empty_like(x) for x in gradients], averages, momentum
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # another thread pins memory at the same time
            self.directions = directions(self.gradients, averages, momentum)

    def is_of(self, averages: list[Tensor], momentum: float) -> bool:
        """Whether the graph was captured with exactly these tensors, whose addresses it has recorded."""
        return momentum == self.momentum and all(map(operator.is_, averages, self.averages))

    def __call__(self, gradients: list[Tensor]) -> list[Tensor]:
        torch._foreach_copy_(self.gradients, gradients)
        self.graph.replay()
        return self.directions


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with decoupled weight decay and updates as large as AdamW's (Liu et al. 2025, sec. 2.2).

    torch.optim.Muon supports only 2-D parameters, and works on one matrix at a time in bfloat16, which is slow on processors
    without hardware support for it.
    """

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.__setstate__({})

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.replays: dict[int, Replay] = {}
        self.warm = False  # cuBLAS needs one ordinary step before a capture

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # there is no need to call the model again
        for i, group in enumerate(self.param_groups):
            lr, momentum, parameters = group["lr"], group["momentum"], group["params"]
            gradients = [p.grad for p in parameters]
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            averages = [self.state[p]["momentum"] for p in parameters]
            if gradients[0].is_cuda and self.warm:
                if i not in self.replays or not self.replays[i].is_of(averages, momentum):
                    self.replays[i] = Replay(gradients, averages, momentum)
                updates = self.replays[i](gradients)
            else:
                updates = directions(gradients, averages, momentum)

            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
            by_size = defaultdict(list)
            for p, update in zip(parameters, updates, strict=True):
                by_size[max(len(p), p[0].numel())].append((p, update))
            for size, items in by_size.items():
                rms = 0.2 * size**0.5  # the root mean square of AdamW's updates is about 0.2
                torch._foreach_add_(*map(list, zip(*items, strict=True)), alpha=-lr * rms)
        self.warm = True
