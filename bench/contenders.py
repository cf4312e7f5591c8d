"""This project and its peers behind one interface: each trains on batches that it is given and draws samples of given classes.

A peer's blocks, loss, noise schedule, sampler and form of guidance are its package's own. What its examples leave to the user
is our choice: widths that suit 28 × 28 (its examples' where they are for such images). Everyone has the best of the learning
rates that rates.py tried, and it stays constant. Equal for all: batch size, data in memory, warm-up over 100 steps, clipping
at norm 1, a tenth of the labels dropped where there are classes, samples from an average of the weights, and guidance by a
scale of 1.75, which was chosen for this project, and whose two passes a step count as two evaluations.
"""

import copy
import sys
from abc import ABC, abstractmethod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from ddpm.data.fashion_mnist import CLASSES  # noqa: E402
from ddpm.data.pixels import to_uint8  # noqa: E402
from ddpm.diffusion.process import Diffusion  # noqa: E402
from ddpm.diffusion.rng import ImageNoise  # noqa: E402
from ddpm.diffusion.samplers import iter_samples  # noqa: E402
from ddpm.diffusion.unet import UNet  # noqa: E402
from ddpm.params import TrainParams  # noqa: E402
from ddpm.params_file import load_params  # noqa: E402
from ddpm.training.batches import draw  # noqa: E402
from ddpm.training.optim import make_optimizers  # noqa: E402
from ddpm.training.step import batch_loss  # noqa: E402

NULL_CLASS = len(CLASSES)
LABEL_DROPOUT, GUIDANCE = 0.1, 1.75
WARMUP = 100
SAMPLE_SEED = 1
SHAPE = (1, 28, 28)


class Contender(ABC):
    """A model in training. `images` are float [B, 1, 28, 28] in -1 … 1, `labels` int64 [B]."""

    name: str
    conditional = True
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    learning_rate: float

    def start(self, device: torch.device, bfloat16: bool = False) -> None:
        """Put the model on `device` and set up the average of its weights."""
        self.device, self.steps = device, 0
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
        self.model.to(device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)

    @abstractmethod
    def loss(self, images: Tensor, labels: Tensor) -> Tensor: ...

    @abstractmethod
    def sample(self, labels: Tensor, evaluations: int) -> Tensor:
        """Images [N, 1, 28, 28] in -1 … 1 of the averaged model, with that many network evaluations an image."""

    def step(self, images: Tensor, labels: Tensor) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * min(1, (self.steps + 1) / WARMUP)
        self.model.zero_grad()
        with self.autocast:
            loss = self.loss(images, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            decay = min(0.999, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.steps += 1

    @torch.no_grad()
    def draw(self, count: int, evaluations: int, batch: int = 125) -> Tensor:
        """uint8 [count, 28, 28] of all classes in turn, checked by `guard`."""
        labels = torch.arange(count, device=self.device) % len(CLASSES)
        with torch.random.fork_rng():  # what training draws next doesn't depend on this
            torch.manual_seed(SAMPLE_SEED)
            return torch.cat([guard(self.name, self.sample(y, evaluations)) for y in labels.split(batch)])


def guard(name: str, images: Tensor) -> Tensor:
    """uint8 of images in -1 … 1. Raises where they aren't numbers, or blank, so that no figure stands on garbage."""
    if not torch.isfinite(images).all():
        raise SystemExit(f"{name}: its samples are not finite")
    blank = (images.flatten(1).clamp(-1, 1).std(1) < 0.02).float().mean().item()
    if blank > 0.05:
        raise SystemExit(f"{name}: {blank:.0%} of its samples are blank")
    return to_uint8(images).cpu()


class Ours(Contender):
    """The default model, or the one of `p`; labels are dropped as in its own training."""

    name = "this project"
    learning_rate = 1e-3  # the pipeline's is higher, and falls

    def __init__(self, p: TrainParams | None = None, conditional: bool = True):
        self.p = (p or load_params(ROOT / "params.yaml").train).model_copy(
            update={"label_dropout": LABEL_DROPOUT if conditional else 1.0}
        )
        self.conditional = conditional
        if not conditional:
            self.name += ", without classes"
        torch.manual_seed(self.p.seed)
        self.model = UNet(**self.p.model.model_dump()).to(memory_format=torch.channels_last)
        self.optimizers = make_optimizers(self.p, self.model)
        self.diffusion = Diffusion(**self.p.diffusion.model_dump())

    def start(self, device: torch.device, bfloat16: bool = False) -> None:
        super().start(device, bfloat16)
        self.diffusion.to(device)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        p = self.p.model_copy(update={"batch_size": len(images)})
        _, t, eps, dropped, _ = (x.to(self.device) for x in draw(p, self.steps, 1, SHAPE, self.diffusion))
        return batch_loss(self.model, self.diffusion, images, labels.masked_fill(dropped, NULL_CLASS), t, eps)

    def sample(self, labels: Tensor, evaluations: int) -> Tensor:
        guidance, steps = (GUIDANCE, evaluations // 2) if self.conditional else (1.0, evaluations)
        labels = labels if self.conditional else torch.full_like(labels, NULL_CLASS)
        noise = ImageNoise(torch.randint(2**31, ()).item(), 0, len(labels), SHAPE, self.device)
        *_, (x, _) = iter_samples(
            self.ema, self.diffusion, labels, NULL_CLASS, noise, "dpmpp_2m", steps, "tapered", guidance_scale=guidance
        )
        return x


class Diffusers(Contender):
    """UNet2DModel with class embeddings, DDPMScheduler as in its training example, DPMSolverMultistepScheduler's samples."""

    name = "diffusers"
    learning_rate = 3e-3

    def __init__(self):
        from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

        self.model = unet2d()
        self.noise = DDPMScheduler(num_train_timesteps=1000)  # linear betas, eps
        self.solver = DPMSolverMultistepScheduler.from_config(
            self.noise.config,
            timestep_spacing="trailing",
            thresholding=True,  # as it advises for images in pixel space
        )
        self.optimizers = [torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate)]

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        t = torch.randint(1000, (len(images),), device=self.device)
        eps = torch.randn_like(images)
        dropped = torch.rand(len(images), device=self.device) < LABEL_DROPOUT
        output = self.model(self.noise.add_noise(images, eps, t), t, labels.masked_fill(dropped, NULL_CLASS)).sample
        return F.mse_loss(output, eps)

    def sample(self, labels: Tensor, evaluations: int) -> Tensor:
        self.solver.set_timesteps(evaluations // 2, device=self.device)
        x = torch.randn(len(labels), *SHAPE, device=self.device)
        both = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
        for t in self.solver.timesteps:
            conditional, unconditional = self.ema(torch.cat([x, x]), t, both).sample.chunk(2)
            x = self.solver.step(unconditional + GUIDANCE * (conditional - unconditional), t, x).prev_sample
        return x


def unet2d() -> nn.Module:
    """diffusers' UNet2DModel at three levels of 28×28, otherwise its defaults: attention at all levels but the first.

    Its default of 32 groups suits its default of 224 channels. At 32 channels every channel would be normalised alone, which
    undoes what a block adds to say the timestep and the class.
    """
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=NULL_CLASS + 1,
    )


class Lucidrains(Contender):
    """denoising-diffusion-pytorch: its Unet with classes and guidance, its cosine schedule, DDIM."""

    name = "denoising-diffusion-pytorch"
    learning_rate = 1e-3

    def __init__(self):
        from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet

        unet = Unet(dim=32, num_classes=len(CLASSES), cond_drop_prob=LABEL_DROPOUT, dim_mults=(1, 2, 4), channels=1)
        self.model = GaussianDiffusion(unet, image_size=28, timesteps=1000, sampling_timesteps=10, ddim_sampling_eta=0.0)
        self.optimizers = [torch.optim.Adam(self.model.parameters(), lr=self.learning_rate, betas=(0.9, 0.99))]

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.model((images + 1) / 2, classes=labels)

    def sample(self, labels: Tensor, evaluations: int) -> Tensor:
        self.ema.sampling_timesteps = evaluations // 2
        return self.ema.sample(labels, cond_scale=GUIDANCE) * 2 - 1


class SmallDiffusion(Contender):
    """smalldiffusion: the DiT, schedule and accelerated sampler of its Fashion-MNIST example, with classes."""

    name = "smalldiffusion"
    learning_rate = 3e-3

    def __init__(self):
        from smalldiffusion import CondEmbedderLabel, DiT, ScheduleDDPM

        self.model = DiT(
            in_dim=28, channels=1, patch_size=2, depth=6, head_dim=32, num_heads=6,
            cond_embed=CondEmbedderLabel(6 * 32, len(CLASSES), LABEL_DROPOUT),
        )  # fmt: skip
        self.schedule = ScheduleDDPM(beta_start=0.0001, beta_end=0.02, N=1000)
        trained = [w for w in self.model.parameters() if w.requires_grad]  # the positions are fixed
        self.optimizers = [torch.optim.AdamW(trained, lr=self.learning_rate)]

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        from smalldiffusion.diffusion import generate_train_sample

        x0, sigma, eps, labels = generate_train_sample((images, labels), self.schedule, conditional=True)
        return self.model.get_loss(x0, sigma, eps, cond=labels)

    def sample(self, labels: Tensor, evaluations: int) -> Tensor:
        from smalldiffusion import samples

        sigmas = self.schedule.sample_sigmas(evaluations // 2)
        noise = torch.randn(len(labels), *SHAPE, device=self.device) * sigmas[0]
        *_, x = samples(self.ema, sigmas, gam=1.6, cfg_scale=GUIDANCE - 1, xt=noise, cond=labels, accelerator=None)
        return x


PEERS = (Diffusers, Lucidrains, SmallDiffusion)
