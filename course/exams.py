"""What the exams share. chapter1.py to chapter8.py hold one class for each exercise, with

    see(m, r)      run the student's function on random inputs from r, in the witness's process: m.schedule, m.dwt, ...
                   are the modules. Returns {name: tensors}
    spec(m, r)     compute the same with a slow loop or a closed form on the same inputs, in the judge's process
    laws(seen)     yield (holds, message): what must be true of the student's numbers. Judged before equality
    picture(seen, axis)    draw what was made: the student's numbers, and beside wrong ones those of `spec`
    band(key, i, place)    name the band that holds this place of the i-th tensor of a key. Only a wavelet has bands
    tolerance      of equality, relative and absolute
    taught         True: gradients must reach inputs and weights, see conduct.py

Read the specification: it is the definition without tricks. Where it needs layers it takes them from m, which for the
judge is the project itself.
"""
import torch

EXAMS = {}


class Inputs:
    """Random inputs from one seed. Witness and judge draw them in the same order, so they get the same."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed + 7919)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def integer(self, low, high):
        return int(torch.randint(low, high, (), generator=self.generator))

    def fill(self, module):
        """Give a module random weights, so that no layer hides behind a zero, and switch it to evaluation mode."""
        with torch.no_grad():
            for _, p in sorted(module.named_parameters()):
                p.copy_(self.normal(*p.shape) * (0.5 if p.ndim < 2 else p[0].numel() ** -0.5))
        return module.eval()


def exam(number, tolerance=1e-4):
    """Return a decorator that makes a class the exam of exercise `number`."""
    def enter(cls):
        cls.tolerance = tolerance
        cls.band = getattr(cls, "band", None)
        EXAMS[number] = cls
        return cls
    return enter


def refused(function, *args):
    """Return 1 if function(*args) raises ValueError, else 0. Any other error goes on to the student."""
    try:
        function(*args)
    except ValueError:
        return 1.0
    return 0.0


def unbiased(many, module, n=3000):
    """Return 1 if a module with dropout varies in training and its mean is the result of evaluation mode, else 0.

    many(n) returns the module's results for one example, n times.
    """
    with torch.no_grad():
        module.eval()
        expected = many(1).double()
        module.train()
        drawn = many(n).double()
    deviation = drawn.std(0, keepdim=True)
    error = ((drawn.mean(0, keepdim=True) - expected) / (deviation / n ** 0.5 + 1e-6)).abs()
    return float(bool(deviation.max() > 1e-3) and bool(error.max() < 6))


def drops_singly(module, last, *inputs):
    """Return 1 if dropout zeroes single numbers right before the layer `last`, 0 if whole channels or places."""
    with torch.no_grad():
        width = min(last.weight.shape[:2])
        last.bias.zero_(), last.weight.zero_()
        for i in range(width):                                            # the first channels pass `last` unchanged
            last.weight[i, i][(1,) * (last.weight.ndim - 2)] = 1.0
        inputs = [one.repeat_interleave(16, 0) for one in inputs]
        zero = (module.train()(*inputs) - inputs[0]).abs() < 1e-9         # tokens (16, N, C) or maps (16, C, H, W)
    zero = zero.flatten(2)
    return float(max(zero.all(axis).double().mean() for axis in (1, 2)) < 0.2)


NO_GRADIENT = "no gradient comes back, so nothing can be learnt: did you use .item(), .detach() or no_grad?"


def learns(function, *inputs):
    """Return 1 if gradients of function(*inputs), a tensor or nested lists of them, reach all inputs, else 0."""
    inputs = [one.detach().clone().requires_grad_() for one in inputs]

    def total(out):
        if isinstance(out, (list, tuple)):
            return sum(total(part) for part in out)
        return out.square().sum() if isinstance(out, torch.Tensor) else 0.0
    with torch.enable_grad():
        value = total(function(*(one * 1.0 for one in inputs)))           # not leaves: the student may write into them
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return 0.0
    return float(all(g is not None and bool(g.any()) for g in torch.autograd.grad(value, inputs, allow_unused=True)))


def influence(call, x, r):
    """Return (N, N): how much token i of call(x) changes, on average, when token j of x (1, N, C) changes."""
    columns = []
    for j in range(x.shape[1]):
        other = x.clone()
        other[:, j] = r.normal(x.shape[2])
        columns.append((call(other) - call(x)).abs().mean((0, 2)))
    return torch.stack(columns, 1)


def table(axis, values):
    """Draw a square table of numbers, larger ones darker."""
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1.5 * float(values.max()) + 1e-9)
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8)


def curves(axis, x, lines, xlabel, ylabel):
    """Draw {name: y} as lines over x."""
    for name, y in lines.items():
        axis.plot(x, y, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize=8)


def image(axis, x):
    """Draw x, (C, H, W) or (H, W), scaled from its smallest to its largest value."""
    x = x if x.ndim == 2 else x[:3].permute(1, 2, 0)
    x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-6)
    axis.imshow(x, cmap="gray", interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def row_of(images):
    """Join images (C, H, W) side by side, with one white pixel between them."""
    parts = [part for x in images for part in (x, torch.ones_like(x[..., :1]))]
    return torch.cat(parts[:-1], -1)


def letter(size=32):
    """Return a picture (1, 3, size, size) in [-1, 1]: a white ring with a bar on a coloured gradient."""
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="ij")
    radius = (x ** 2 + y ** 2).sqrt()
    shape = ((radius > 0.5) & (radius < 0.72)) | ((x - y).abs() < 0.16) & (radius < 0.9)
    ground = torch.stack([0.6 * x, 0.3 * y, -0.5 * x])
    return torch.where(shape, torch.tensor(0.95), ground)[None]


TIMES = torch.linspace(0, 1, 101)


def alpha_and_sigma(logsnr):
    """Return alpha and sigma (B, 1, 1, 1) in float64: alpha^2 / sigma^2 = e^logsnr and alpha^2 + sigma^2 = 1."""
    e = torch.exp(-torch.as_tensor(logsnr).double().reshape(-1, 1, 1, 1))
    return (1 / (1 + e)).sqrt(), (e / (1 + e)).sqrt()


def slow_norm(x, groups, weight, bias=None):
    """Apply group norm to a map (B, C, H, W), or layer norm to tokens (..., C) if groups is None. In float64."""
    x, shape = x.double(), x.shape
    flat = x.reshape(*shape[:-1], 1, -1) if groups is None else x.reshape(shape[0], groups, -1)
    flat = (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    axes = (1, -1) + (1,) * (len(shape) - 2) if groups else (-1,)
    y = flat.reshape(shape) * weight.double().reshape(axes)
    return y if bias is None else y + bias.double().reshape(axes)


def swish(x):
    return x / (1 + torch.exp(-x))
