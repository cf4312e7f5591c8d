"""Muon: momentum whose update is orthogonalised, for the weight matrices inside a network."""

import operator
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a quintic that is steep at zero: singular values end between 0.7 and 1.2
NS_STEPS = 5


def orthogonalised(matrices: list[Tensor]) -> list[Tensor]:
    """The nearest semi-orthogonal matrices, roughly, by Newton-Schulz iteration (Jordan et al. 2024).

    Takes matrices [R, C], R ≤ C, of any C but one R. Each iteration multiplies a matrix x by a polynomial of its Gram matrix
    x xᵀ [R, R]. So all of them are worked out on the Gram matrices, in one batch, and applied to x once, at the end: for
    96 × 864, two fifths of the operations. TF32 would not do for that: an iteration multiplies the Gram matrix's rounding error
    by up to 12.
    """
    with full_float32():
        gram = torch.stack([x @ x.mT for x in matrices])
        norm = gram.diagonal(dim1=1, dim2=2).sum(1).sqrt()[:, None, None] + 1e-7
        gram /= norm**2  # as of matrices x / norm, whose singular values are at most 1
        product = factor = polynomial(gram)
        for _ in range(NS_STEPS - 1):
            gram = factor @ gram @ factor
            factor = polynomial(gram)
            product = factor @ product
        return [p @ x for p, x in zip(product / norm, matrices, strict=True)]


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices without TF32 or bfloat16, whatever the device is set to."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def polynomial(gram: Tensor) -> Tensor:
    """a I + b G + c G² of each G in [N, R, R]: what one iteration multiplies by."""
    a, b, c = NS_COEFFICIENTS
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


def directions(gradients: list[Tensor], averages: list[Tensor], momentum: float) -> list[Tensor]:
    """Which way the weights go: Nesterov's momentum, orthogonalised. `averages` take in the gradients.

    A convolution's weight [out, in, h, w] counts as the matrix [out, h·w·in], which is how channels_last holds it.
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
    """`directions` as a CUDA graph: hundreds of kernels, whose launching takes a host longer than their work a GPU."""

    def __init__(self, gradients: list[Tensor], averages: list[Tensor], momentum: float):
        self.gradients, self.averages, self.momentum = [torch.empty_like(x) for x in gradients], averages, momentum
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may pin memory meanwhile
            self.directions = directions(self.gradients, averages, momentum)

    def is_of(self, averages: list[Tensor], momentum: float) -> bool:
        """Whether it works on these very tensors, whose addresses it has."""
        return momentum == self.momentum and all(map(operator.is_, averages, self.averages))

    def __call__(self, gradients: list[Tensor]) -> list[Tensor]:
        torch._foreach_copy_(self.gradients, gradients)
        self.graph.replay()
        return self.directions


class Muon(torch.optim.Optimizer):
    """Jordan et al. 2024, with AdamW's size of update and decoupled weight decay (Liu et al. 2025, sec. 2.2).

    torch.optim.Muon takes no more than two dimensions, and works one matrix at a time in bfloat16, which is slow on
    processors that don't have it.
    """

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.__setstate__({})

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.replays: dict[int, Replay] = {}
        self.warm = False  # cuBLAS wants a first step before it is captured

    @torch.no_grad()
    def step(self) -> None:
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
                rms = 0.2 * size**0.5  # AdamW's updates have a root mean square of 0.2 or so
                torch._foreach_add_(*map(list, zip(*items, strict=True)), alpha=-lr * rms)
        self.warm = True
