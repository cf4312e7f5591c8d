"""A classifier two-sample test: can a small network tell samples from real images? (Lopez-Paz and Oquab 2017)

It looks at pixels, so it sees what the evaluator's features were trained to ignore: grain, ghosts, blurred edges. One network
learns from one half of the images and is tested on the other half, and a second one the other way round, so every image is judged
by a network that never saw it. The recipe is fixed and must stay so: another network, other steps or another number of images
would give other figures for the same samples.

The two lowest of the eight bits of a pixel are dropped first. No eye sees them, but a network does: in Fashion-MNIST half of all
pixels are exactly 0, where good samples often have 1 or 2.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ddpm.data.pixels import channels_first
from ddpm.evaluation.classifier import averaged_down

IMAGES = 2000  # of each kind at most: with more, the network would learn more and tell them apart more easily
WIDTHS = (32, 64, 64, 64)  # of the convolutions
PASSES, BATCH, LEARNING_RATE, WEIGHT_DECAY = 8, 50, 0.003, 0.01
STEP = 4  # grey levels that count as one


class TwoSample(NamedTuple):
    """0.5 if samples can't be told from real images, 1 if they always can."""

    auc: float  # area under the ROC curve: how often a sample looks less real than a real image, of a random pair
    accuracy: float  # share of the images that are assigned to the right set


class Critic(nn.Module):
    """A small CNN, 0.09 M parameters for grey images. uint8 images [N, H, W] or [N, H, W, 3] → logits [N], positive for samples.

    Batch normalisation makes it much sharper: without, it tells a mixture of Gaussians with an AUC of 0.91 instead of 0.99.
    """

    def __init__(self, channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        for i, width in enumerate(WIDTHS):
            convolution = nn.Conv2d(channels, width, 3, stride=2 if i else 1, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = channels_first(images // STEP * STEP).float() / 127.5 - 1
        return self.layers(averaged_down(x)).squeeze(1)


def c2st(samples: Tensor, real: Tensor, device: torch.device, seed: int = 0, what: str = "samples") -> TwoSample:
    """How well a network tells `samples` from `real`, both uint8 [N, …], of which it takes as many as both have, up to IMAGES.

    The figures are means over both halves. They differ by about 0.01 from seed to seed. With fewer images than IMAGES they are
    lower, because the network learns less. `what` names the samples on the progress bar. Raises ValueError if there are fewer
    than two of each.
    """
    from torchmetrics.functional.classification import binary_accuracy, binary_auroc  # slow to import

    n = min(len(samples), len(real), IMAGES)
    if n < 2:
        raise ValueError(f"a two-sample test needs at least two images of each kind, not {n}")
    generator = torch.Generator().manual_seed(seed)
    halves = []
    for indices in torch.randperm(n, generator=generator).tensor_split(2):
        images = torch.cat([samples[indices], real[indices]])
        halves.append((images, torch.arange(len(images)) < len(indices)))
    scores = []
    steps = sum(PASSES * -(-len(images) // BATCH) for images, _ in halves)
    with tqdm(total=steps, unit="step", desc=f"tell {what} from test images", dynamic_ncols=True) as bar:
        for half, (images, is_sample) in enumerate(halves):
            critic = trained(images, is_sample, device, generator, bar)
            tested, truth = halves[1 - half]
            answers = probabilities(critic, tested, device)
            scores.append((binary_auroc(answers, truth.long()), binary_accuracy(answers, truth.long())))
    auc, accuracy = (torch.stack(values).mean().item() for values in zip(*scores, strict=True))
    return TwoSample(auc, accuracy)


def trained(images: Tensor, is_sample: Tensor, device: torch.device, generator: torch.Generator, bar: tqdm) -> Critic:
    """A network that has learned which of the images, uint8 [N, …], are samples: `is_sample`, bool [N]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        critic = Critic(1 if images.ndim == 3 else 3)
    critic = critic.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(critic.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = PASSES * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(PASSES):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            x = images[batch]
            is_mirrored = torch.rand(len(x), generator=generator) < 0.5
            x[is_mirrored] = mirrored(x[is_mirrored])
            logits = critic(x.to(device))
            loss = F.binary_cross_entropy_with_logits(logits, is_sample[batch].float().to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    return critic.eval()


@torch.inference_mode()
def probabilities(critic: Critic, images: Tensor, device: torch.device) -> Tensor:
    """How probable the network finds it that each of the images is a sample, float [N]: of the image and its mirror image."""
    batches = (batch.to(device) for batch in images.split(250))
    return torch.cat([(critic(x) + critic(mirrored(x))).div(2).sigmoid().cpu() for x in batches])


def mirrored(images: Tensor) -> Tensor:
    """Each of the images [N, H, W] or [N, H, W, 3] with left and right exchanged."""
    return images.flip(2)
