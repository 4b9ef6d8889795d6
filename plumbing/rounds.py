"""The plumbing of distill.py: its command line and checks, and the rounds that it asks for, new or begun before."""
import dataclasses
import math
import os

from plumbing import UserError
from plumbing.features import tensor_bytes
from plumbing.files import fingerprint, writable_folder
from plumbing.runs import (choose_device, choose_precision, ema_model, has_checkpoint, read_checkpoint, results_folder,
                           run_of)
from plumbing.settings import Parser, check_range, override
from plumbing.sources import add_accept_flag, check_unchanged, located, open_run, same_data
from plumbing.start import check_room, newest_whole
from plumbing.t5 import Encoder

WEIGHTS = ("constant", "snr", "truncated_snr", "snr+1")


def ladder(first, last):
    """Return the steps of the students, [first / 2, ..., last]. Raises UserError unless both are powers of two."""
    for name, steps in (("from", first), ("to", last)):
        if steps < 1 or steps & (steps - 1):
            raise UserError(f"--{name} {steps}: want a power of two, as steps are halved")
    if last >= first:
        raise UserError(f"--to {last}: want fewer than the teacher's {first} (--from)")
    return [first >> k for k in range(1, int(math.log2(first // last)) + 1)]


def parse(argv):
    parser = Parser(prog="distill.py", usage="distill.py [RUN] [any flag below]",
                    description="Distil a run into one of few steps. Without arguments: explain it.")
    parser.add_argument("run", type=run_of, metavar="RUN", help="folder of the teacher")
    parser.add_argument("--to", type=int, default=4, help="steps of the last student, a power of two (default 4)")
    parser.add_argument("--from", type=int, dest="first", help="steps of the teacher (default 256, or those of a "
                        "distilled run)")
    parser.add_argument("--guided", action="store_true", help="first distil guidance: one call instead of two")
    parser.add_argument("--w-max", type=float, default=5.0, help="largest guidance that the student learns (default 5)")
    parser.add_argument("--steps", type=int, default=300, help="updates of each round (default 300; papers 50,000)")
    parser.add_argument("--guided-steps", type=int, default=1000, help="updates of the guided round (default 1000)")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate as each round starts (default 3e-4)")
    parser.add_argument("--accumulate", type=int, help="micro-batches of a batch (default: the run's)")
    parser.add_argument("--weight", choices=WEIGHTS, default="truncated_snr", help="of the error (truncated_snr)")
    parser.add_argument("--data", help="where the run's training data are now, if they moved")
    add_accept_flag(parser)
    parser.add_argument("--out", help="folder for the rounds (default RUN-distilled, RUN-guided-distilled)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    args = parser.parse_args(argv)
    for flag, setting, value in (("--steps", "steps", args.steps), ("--guided-steps", "steps", args.guided_steps),
                                 ("--from", "sample_steps", args.first), ("--to", "sample_steps", args.to),
                                 ("--w-max", "guidance_max", args.w_max), ("--lr", "lr", args.lr)):
        if value is not None:
            check_range(setting, value, flag)
    if args.w_max <= 1:
        raise UserError(f"--w-max {args.w_max:g}: want more than 1, which is no guidance")
    return args


def check_teacher(args, config):
    """Check that this run can be distilled as asked. Raises UserError."""
    if config.distilled_steps and (args.first or config.distilled_steps) != config.distilled_steps:
        raise UserError(f"--from {args.first}: {args.run} was itself distilled to {config.distilled_steps} steps")
    if args.guided and not config.guidable:
        raise UserError(f"--guided: {args.run} has no condition to drop, so there is no guidance to distil")
    if args.guided and (config.guidance_max or config.distilled_steps):
        raise UserError(f"--guided: {args.run} was distilled already; guidance comes first, then the steps")
    accumulate = config.accumulate if args.accumulate is None else args.accumulate
    if accumulate < 1 or config.batch % accumulate:
        raise UserError(f"--accumulate {accumulate}: want a number of parts that divides the batch, {config.batch}")


def prepare(args):
    """Open what the rounds need -> (device, teacher, source, encoder or None, rounds of `plan`, a headline)."""
    run = os.path.normpath(args.run)
    device, why = choose_device(args.device)
    state = read_checkpoint(run)
    config, teacher = located(state["config"], args, run), ema_model(state, run, device)
    source = open_run(config)
    config = same_data(config, source, None if args.accept_changed_data else state.get("examples"))
    check_room(config, device, world=1)
    weights = fingerprint(*tensor_bytes(teacher.parameters()))
    rounds = plan(args, config, f"{run}, step {state['step']}, weights {weights}", device)
    encoder = Encoder(config, device, cached=True) if config.text_encoder else None
    names = " -> ".join(str(steps or "guided") for *_, steps in rounds)
    headline = f"{run} -> {names}, on {device} ({why}); rounds in {os.path.dirname(rounds[0][0])}"
    return device, teacher, source, encoder, rounds, headline


def plan(args, config, teacher, device):
    """Return [(folder, config, N), ...] of the rounds; N = 0 is the guided round. `teacher`: its name, as a record."""
    first = args.first or config.distilled_steps or 256
    rounds = ladder(first, args.to)
    check_teacher(args, config)
    if not args.guided and config.evaluations == 2:
        print(f"guidance {config.guidance:g} is left out, as the students have none; --guided distils it too")
        config = dataclasses.replace(config, guidance=1.0)
    run = os.path.normpath(args.run)
    if os.path.basename(run) in (".", ".."):                              # no name to add to
        run = os.path.abspath(run)
    out = os.path.normpath(args.out or results_folder(run) + ("-guided" if args.guided else "") + "-distilled")
    common = dict(lr=args.lr, distill_weight=args.weight, sampler="ddim", log_every=min(20, args.steps), save_every=100,
                  keep_every=0, sample_every=0, held_out="", held_out_every=0, weight_decay=0.0, compile="off",
                  shard=False, accumulate=config.accumulate if args.accumulate is None else args.accumulate,
                  precision=choose_precision(config.precision, device))
    todo, above = [], teacher
    for steps in [0] * args.guided + rounds:
        folder, own = os.path.join(out, str(steps or "guided")), dict(steps=args.steps, distilled_steps=steps)
        if not steps:
            own.update(steps=args.guided_steps, guidance_max=args.w_max, guidance=min(config.guidance, args.w_max))
        config = override(config, **common, **own, sample_steps=steps or first, distilled_from=above)
        begun = read_round(folder, config)                                # another distillation: found before any work
        if begun and not args.accept_changed_data:
            check_unchanged(begun["config"], config.data_id)
        todo.append((folder, config, steps))
        above = f"{folder}, step {config.steps}"
    writable_folder(out, "--out")
    return todo


def read_round(folder, config):
    """Return the checkpoint of this round, None if it has not begun. Raises UserError for another distillation's."""
    if not has_checkpoint(folder):
        return None
    state = newest_whole(folder)
    free = ("precision", "accumulate", "recompute", "held_out", "held_out_every", "shard", "data", "data_id",
            "distilled_from")                                             # may differ
    same = {name: getattr(config, name) for name in free}
    # The teacher's folder may be written in many ways; its step and its weights say whether it is the same.
    began, now = (c.distilled_from.rpartition(", step ")[2] + "," for c in (state["config"], config))
    if dataclasses.replace(state["config"], **same) != config or not now.startswith(began):
        raise UserError(f"{folder}: holds a round of another distillation; continue it with its own settings, or "
                        "choose another --out")
    return state
