"""What the exams have in common; they are in chapter1.py to chapter8.py, a class for each exercise, with

    see(m, r)      in the student's process: {name: tensors} from m.schedule, m.dwt, ... on random inputs from r
    spec(m, r)     in the judge's: the same from a slow loop or a closed form, on the same random inputs
    laws(seen)     yields (holds, message): what must be true of what was seen, in words, before equality is looked at
    picture(seen, axis)    what a student sees once it is right
    tolerance      of equality, relative and absolute

The specification is there to be read: it is the definition without cleverness. Where it needs layers it takes those of
m, which for the judge are the project's own.
"""
import torch

EXAMS = {}


class Inputs:
    """Random inputs, the same for student and judge: they are asked for in the same order, from one seed."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed + 7919)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def integer(self, low, high):
        return int(torch.randint(low, high, (), generator=self.generator))

    def fill(self, module):
        """Weights of a module, all of them random, so that no layer hides behind a zero. In evaluation mode."""
        with torch.no_grad():
            for _, p in sorted(module.named_parameters()):
                p.copy_(self.normal(*p.shape) * (0.5 if p.ndim < 2 else p[0].numel() ** -0.5))
        return module.eval()


def exam(number, tolerance=1e-4):
    """Class decorator: its functions become the exam of exercise `number`."""
    def enter(described):
        described.tolerance = tolerance
        EXAMS[number] = described
        return described
    return enter


def refused(function, *args):
    """Does function(*args) raise ValueError? Any other error is the student's."""
    try:
        function(*args)
    except ValueError:
        return 1.0
    return 0.0


def unbiased(many, module, n=3000):
    """Of a module with dropout, many(n) = its results of one example n times over: 1 if in training these differ, and
    their mean is what evaluation gives."""
    with torch.no_grad():
        module.eval()
        rested = many(1).double()
        module.train()
        drawn = many(n).double()
    deviation = drawn.std(0, keepdim=True)
    away = ((drawn.mean(0, keepdim=True) - rested) / (deviation / n ** 0.5 + 1e-6)).abs()
    return float(bool(deviation.max() > 1e-3) and bool(away.max() < 6))


NO_GRADIENT = "no gradient comes back, so nothing could be learnt: .item(), .detach() or no_grad?"


def learns(function, *inputs):
    """1 if gradients of function(*inputs), a tensor or a nest of them, reach all the inputs; 0 if not."""
    inputs = [one.detach().clone().requires_grad_() for one in inputs]

    def total(out):
        if isinstance(out, (list, tuple)):
            return sum(total(part) for part in out)
        return out.square().sum() if isinstance(out, torch.Tensor) else 0.0
    with torch.enable_grad():
        value = total(function(*(one * 1.0 for one in inputs)))           # no leaves: one may write into them
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return 0.0
    return float(all(g is not None and bool(g.any()) for g in torch.autograd.grad(value, inputs, allow_unused=True)))


def curves(axis, x, lines, xlabel, ylabel):
    for name, y in lines.items():
        axis.plot(x, y, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize=8)


def image(axis, x):
    """x (C, H, W) or (H, W), from its least to its largest value."""
    x = x if x.ndim == 2 else x[:3].permute(1, 2, 0)
    x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-6)
    axis.imshow(x, cmap="gray", interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def row_of(images):
    """Images (C, H, W) side by side, one white pixel between."""
    parts = [part for x in images for part in (x, torch.ones_like(x[..., :1]))]
    return torch.cat(parts[:-1], -1)


def letter(size=32):
    """A picture to look at: a white ring with a bar on a slope. (1, 3, size, size) in [-1, 1]."""
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="ij")
    radius = (x ** 2 + y ** 2).sqrt()
    shape = ((radius > 0.5) & (radius < 0.72)) | ((x - y).abs() < 0.16) & (radius < 0.9)
    ground = torch.stack([0.6 * x, 0.3 * y, -0.5 * x])
    return torch.where(shape, torch.tensor(0.95), ground)[None]


TIMES = torch.linspace(0, 1, 101)


def alpha_and_sigma(logsnr):
    """In float64, from the definition: alpha^2 / sigma^2 = e^logsnr and alpha^2 + sigma^2 = 1; shaped (B, 1, 1, 1)."""
    e = torch.exp(-torch.as_tensor(logsnr).double().reshape(-1, 1, 1, 1))
    return (1 / (1 + e)).sqrt(), (e / (1 + e)).sqrt()


def slow_norm(x, groups, weight, bias=None):
    """Group norm of a map (B, C, H, W), or layer norm of tokens (..., C) if groups is None. In float64."""
    x, shape = x.double(), x.shape
    flat = x.reshape(*shape[:-1], 1, -1) if groups is None else x.reshape(shape[0], groups, -1)
    flat = (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    axes = (1, -1) + (1,) * (len(shape) - 2) if groups else (-1,)
    y = flat.reshape(shape) * weight.double().reshape(axes)
    return y if bias is None else y + bias.double().reshape(axes)


def swish(x):
    return x / (1 + torch.exp(-x))
