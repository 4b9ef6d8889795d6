"""Watch a student's function at work, in the witness's process: what holds for every exercise alike.

It leaves its inputs as they are, does not touch the global random generator, and returns lists, not iterators.
In exams with `taught = True`, gradients reach the images and features that it is given and the weights of its layers,
and they are the slope of what it returns. For this each call gets copies of its inputs that record gradients. An exam
names in `untaught` which inputs and weights do not count, and has `recorded = True` if another call would spoil its
numbers.
"""
import collections.abc
import contextlib
import functools
import inspect

import torch

NOT_TAUGHT = "t", "logsnr", "logsnr_t", "logsnr_s", "s", "alpha", "sigma", "draws"      # times, levels: not learnt


def tensors(value, name):
    """Yield (name, tensor) for a tensor, or for all in nested lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield name, value
    if isinstance(value, (list, tuple, dict)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(part, f"{name}[{key}]")


def replaced(value, new):
    """Return value with each tensor in it replaced by new[id], if it has one."""
    if isinstance(value, (list, tuple)):
        return type(value)(replaced(part, new) for part in value)
    if isinstance(value, dict):
        return {key: replaced(part, new) for key, part in value.items()}
    return new.get(id(value), value)


class Conduct:
    """Watch the calls of one function. acts: what it must not do. reached: {input or weight: had it a gradient?}."""

    def __init__(self, exam):
        self.exam, self.taught, self.busy = exam, getattr(exam, "taught", False), False
        self.acts, self.reached, self.bent = [], {}, False

    def watch(self, module, name):
        """Put a watched function in the place of module.name, or of module.Class.name."""
        *outer, last = name.split(".")
        owner = functools.reduce(getattr, outer, module)
        function = getattr(owner, last)
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args, **options):
            if self.busy:                                                 # it calls itself
                return function(*args, **options)
            self.busy = True
            try:
                return self.call(function, {**dict(zip(names, args)), **options}, args, options)
            finally:
                self.busy = False
        setattr(owner, last, call)

    def call(self, function, given, args, options):
        inputs = [pair for name, value in given.items() for pair in tensors(value, name)]
        layers = [value for value in given.values() if isinstance(value, torch.nn.Module)]
        before, state, leaves = [one.detach().clone() for _, one in inputs], torch.get_rng_state(), {}
        probing = self.taught and not any(one.requires_grad for _, one in inputs)
        untaught = getattr(self.exam, "untaught", ())
        if probing:
            leaves = {name: one.detach().clone().requires_grad_() for name, one in inputs if one.is_floating_point()
                      and one.ndim > 1 and name.partition("[")[0] not in (*NOT_TAUGHT, *untaught)}

        def run():
            handed = {id(one): leaves[name].clone() for name, one in inputs if name in leaves}
            return handed, function(*replaced(args, handed), **replaced(options, handed))
        with torch.enable_grad() if probing else contextlib.nullcontext():
            handed, out = run()
        for (name, one), old in zip(inputs, before):
            now = handed.get(id(one), one).detach()
            if now.shape != old.shape or not bool(((now == old) | (now != now) & (old != old)).all()):
                self.acts.append(f"it changes its input {name} in place, which the caller still needs")
        training = any(layer.training for layer in layers)
        draws = "noise" in inspect.signature(function).parameters and given.get("noise") is None
        if not (training or draws) and not torch.equal(state, torch.get_rng_state()):
            self.acts.append("it uses the global random generator: nothing in it is to be drawn or seeded there")
        if isinstance(out, collections.abc.Iterator):
            self.acts.append("it returns an iterator, which is used up after one pass: return a list")
        if probing:
            weights = {name: p for layer in layers for name, p in layer.named_parameters() if p.is_leaf
                       and not any(word in name for word in untaught)}
            self.follow(out, {**leaves, **weights}, None if training or getattr(self.exam, "recorded", False) else run)
        return out

    @torch.enable_grad()
    def follow(self, out, wanted, run):
        """Note which of the wanted inputs and weights a gradient of `out` reaches, and whether it is the slope along a
        random direction. run() calls the function again."""
        generator = torch.Generator().manual_seed(0)
        drawn = lambda like: torch.randn(like.shape, generator=generator)
        ends = [one for _, one in tensors(out, "") if one.is_floating_point()]
        sides, ways = [drawn(one) for one in ends], {name: drawn(one) * one.detach().abs().mean()
                                                    for name, one in wanted.items()}
        total = sum((one * side).sum() for one, side in zip(ends, sides))
        gradients = [None] * len(wanted)
        if ends and total.requires_grad:
            gradients = torch.autograd.grad(total, wanted.values(), retain_graph=True, allow_unused=True)
        for name, gradient in zip(wanted, gradients):
            self.reached[name] = self.reached.get(name, False) or gradient is not None
        if run:
            said = sum(float((g * way).sum()) for g, way in zip(gradients, ways.values()) if g is not None)
            self.bent = self.bent or not is_slope(said, run, wanted, ways, sides)

    def report(self):
        """Return {"acts": text, "untaught": text}, each text as a tensor of bytes: a witness returns only numbers."""
        missed = [name for name, reached in self.reached.items() if not reached]
        text = f"no gradient reaches {', '.join(missed[:2])}" + (f" and {len(missed) - 2} more" if missed[2:] else "")
        if self.bent and not missed:
            text = "its gradient is not the slope of what it returns: is a part detached?"
        texts = {"acts": self.acts[0] if self.acts else "", "untaught": text if missed or self.bent else ""}
        return {key: torch.tensor(list(text.encode()), dtype=torch.uint8) for key, text in texts.items()}


@torch.no_grad()
def is_slope(said, run, wanted, ways, sides, step=2e-3):
    """Return whether `said` is the slope of the weighted sum of what run() returns, if all wanted go along `ways`."""
    ends, at = [], {name: one.data for name, one in wanted.items()}
    for sign in (1, -1):
        for name, one in wanted.items():
            one.data = at[name] + sign * step * ways[name]                # not in place: a graph may hold these numbers
        ends.append([end for _, end in tensors(run()[1], "") if end.is_floating_point()])
    for name, one in wanted.items():
        one.data = at[name]
    moves = [(high - low).double() / (2 * step) for high, low in zip(*ends)]
    measured = sum(float((move * side).sum()) for move, side in zip(moves, sides))
    return abs(measured - said) <= 0.02 * sum(float(move.square().sum()) for move in moves) ** 0.5 + 1e-4


def text_of_bytes(tensors):
    """Return the text of a report, whatever a witness wrote there."""
    whole = len(tensors) == 1 and tensors[0].dtype == torch.uint8 and tensors[0].ndim == 1
    return bytes(tensors[0][:300].tolist()).decode("utf-8", "replace") if whole else "its conduct cannot be read"
