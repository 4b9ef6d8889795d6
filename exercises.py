"""The course: exercises made from these very files, and their grader. Standard library only.

    python exercises.py list                        chapters, exercises, points, minutes
    python exercises.py make my_work                a copy in which the bodies of the exercises' functions are gone
    python exercises.py make my_work --chapter 3    of one chapter only: all else as it is
    python exercises.py grade my_work               points, a line an exercise, and a picture for each that is right
    python exercises.py grade my_work --chapter 3 --seed 4711 --json points.json         other random inputs
    python exercises.py check                       the lecturer's own test of all this

How it works. An exercise is a function of the project, named in the table below. `make` finds it by the syntax tree,
keeps signature and docstring and puts `raise NotImplementedError("exercise 1.3: ...")` in the place of the rest; so the
files themselves carry no marks, and an exercise is added by a row here and an exam in course/chapterN.py.

`grade` takes each exercise by itself: of the student's file everything is kept, but the functions of all OTHER
exercises are put back. So a mistake costs its own points only, whatever it breaks elsewhere. The student's code runs in
a process of its own with a limit of time and memory, and only returns numbers; they are judged where it cannot reach
(course/judge.py): shapes first, then the laws, then equality with a slow specification on random inputs. If the numbers
are those of a well-known mistake (course/mutants.py), its name is the message.

It is no sandbox: what a student's file does to the machine, it does. Grade strangers' work in a container.
"""
import argparse
import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import textwrap

HERE = os.path.dirname(os.path.abspath(__file__))
COURSE = os.path.join(HERE, "course")
CHAPTERS = {1: "Noise schedules", 2: "Parameterisations and losses", 3: "The wavelet", 4: "The U-Net", 5: "The U-ViT",
            6: "Sampling", 7: "Matryoshka", 8: "Cascade and distillation"}
# What students do not get: the answers, the usual mistakes (each shows what stands beside it), the test of both, and
# how the plots of course/reading_a_run.md, which they do get, were made.
KEPT_BACK = ("course/answers.md", "course/mutants.py", "tests/test_exercises.py", "course/reading_a_run.py")


class Fault(Exception):
    """What the user got wrong, in one line."""


@dataclasses.dataclass(frozen=True)
class Exercise:
    """task: what to do; lines: length of ours; minutes: on paper and at the keyboard; question: answered in writing."""
    number: str
    title: str
    target: str                                                           # file.function or file.Class.method
    points: int
    lines: int
    minutes: int
    paper: str
    task: str
    hint: str
    question: str

    @property
    def chapter(self):
        return int(self.number.split(".")[0])

    @property
    def file(self):
        return self.target.split(".")[0] + ".py"

    @property
    def name(self):
        return self.target.split(".", 1)[1]


EXERCISES = [
    # ---------------------------------------------------------------------------------- 1 noise schedules
    Exercise("1.1", "The cosine schedule in log-SNR", "schedule.logsnr_cosine", 3, 4, 15,
             "simple diffusion, appendix A",
             "t of any shape -> logsnr of that shape: -2 log tan of an angle that goes linearly from t_min to t_max, "
             "which are such that logsnr is logsnr_max at t = 0 and logsnr_min at t = 1.",
             "Solve logsnr_max = -2 log tan(t_min) for t_min.",
             "Why is the schedule cut off at both ends, and what would happen at t = 1 without it?"),
    Exercise("1.2", "alpha and sigma", "schedule.alpha_sigma", 2, 2, 10, "simple diffusion, section 2",
             "logsnr of any shape -> (alpha, sigma), both of that shape, of the variance preserving process.",
             "alpha^2 is a sigmoid; so is sigma^2.",
             "In float32, what is sqrt(1 - alpha^2) at logsnr = 20, and what is sigma really?"),
    Exercise("1.3", "The shift", "schedule.logsnr_shifted", 3, 1, 15, "simple diffusion, eq. 4 and 5",
             "t of any shape -> logsnr of that shape, for an image of side image_d whose averages to noise_d x "
             "noise_d are to have the plain cosine schedule.",
             "Averaging s x s pixels divides the variance of the noise by s^2; all of it moves, the end points too.",
             "Which schedule do 256 x 256 images averaged to 64 x 64 follow, if the plain cosine is used at 256?"),
    Exercise("1.4", "Interpolation of two shifts", "schedule.logsnr_interpolated", 2, 3, 15,
             "simple diffusion, appendix A",
             "t of any shape -> logsnr of that shape: from the shift of noise_d_high at t = 0 linearly to that of "
             "noise_d_low at t = 1.",
             "At t = 1 sampling begins: there the low one holds. Eq. 6 has it the other way round.",
             "With the weights of eq. 6, for which ratio of high to low does the curve stop falling, and why is that "
             "bad?"),
    # ---------------------------------------------------------------------------------- 2 parameterisations and losses
    Exercise("2.1", "Diffuse", "schedule.diffuse", 2, 2, 10, "simple diffusion, eq. 1",
             "x, eps (B, C, H, W), logsnr (B,) or scalar -> z_t like x, each example at its own level.",
             "alpha_sigma_for(x, logsnr) gives both with axes to broadcast.",
             "x has variance 1 and so has eps: what is the variance of z_t, at every t?"),
    Exercise("2.2", "The velocity", "schedule.v_from_x_eps", 2, 2, 10,
             "simple diffusion, section 2; Salimans & Ho 2022",
             "x, eps like images, logsnr (B,) or scalar -> v.",
             "Turn (x, eps) by the angle whose tangent is sigma / alpha: z comes first, v is the other axis.",
             "What does a network that predicts v have to predict at t = 0, and at t = 1?"),
    Exercise("2.3", "Noise out of the velocity", "schedule.eps_from_v", 2, 2, 10, "simple diffusion, section 2",
             "z, v like images, logsnr (B,) or scalar -> eps.",
             "Turn back. Nothing is divided.",
             "By how much does an error of 0.01 in v move eps at logsnr = -15, and by how much x?"),
    Exercise("2.4", "The image out of the noise", "schedule.x_from_eps", 2, 2, 10, "simple diffusion, section 2",
             "z, eps like images, logsnr (B,) or scalar -> x.",
             "Solve eq. 1 for x.",
             "An error of 0.01 in eps at logsnr = -15: what becomes of it in x? Why is v predicted?"),
    Exercise("2.5", "The loss on eps and on v", "train.prediction_loss", 3, 2, 20, "simple diffusion, appendix A",
             "The network's v (B, 3, H, W) and what it was made from -> scalar: the mean squared error of v "
             "(loss='v_mse') or of the eps that v implies ('eps_mse'); with multiscale > 0 through multiscale_mse.",
             "Take the difference first, then decide how to average it.",
             "Show that the squared error of eps is SNR / (1 + SNR) times that of v. Which times of the process does "
             "it neglect?"),
    Exercise("2.6", "The multiscale loss", "train.multiscale_mse", 4, 7, 30, "simple diffusion, section 3.2",
             "error (B, C, H, W) -> scalar: the sum over s = d, d/2, ... down to base, while both sides divide, of "
             "(1/s) times the mean square of the error averaged to s x s. ValueError unless 0 < base <= d.",
             "F.avg_pool2d(error, k) averages windows of k; s = d / k. Start at k = 1.",
             "White noise of variance 1: what does the term of s contribute? And an error that is constant over the "
             "image?"),
    # ---------------------------------------------------------------------------------- 3 the wavelet
    Exercise("3.1", "One level of the 5/3 wavelet", "dwt._split", 4, 6, 30, "simple diffusion, section 3.3; JPEG 2000",
             "x (..., N), N even -> low, high (..., N/2) each, by lifting: high = odd minus the mean of its even "
             "neighbours, then low = even plus a quarter of the sum of its high neighbours; mirrored at both ends.",
             "x[..., 0::2] and x[..., 1::2]; past the end x[N] = x[N - 2], before the start d[-1] = d[0].",
             "What is `high` of a straight line x[n] = a + b n, and why is that what one wants of an image?"),
    Exercise("3.2", "And back", "dwt._merge", 3, 5, 20, "simple diffusion, section 3.3",
             "low, high (..., N/2) -> x (..., N): the inverse of exercise 3.1.",
             "The same two lines, from the last to the first, with the signs changed; then interleave.",
             "Would it still be an inverse if the quarter were a third? Which property makes the answer so easy?"),
    Exercise("3.3", "Bands into channels", "dwt.dwt", 4, 8, 30, "simple diffusion, section 3.3, figure 6",
             "x (B, C, H, W) -> (B, C 4^levels, H / 2^levels, W / 2^levels): the low band of the last level, then the "
             "details (LH, HL, HH) from the coarsest level to the finest, finer ones brought down by space-to-depth. "
             "ValueError if a side does not divide.",
             "_analyse(x) gives LL, LH, HL, HH of one level; F.pixel_unshuffle(band, factor) only moves numbers.",
             "A 512 x 512 x 3 image in two levels: which shape comes out, and by how much does the first feature map "
             "of 128 channels shrink?"),
    Exercise("3.4", "The adjoint", "dwt.adjoint", 3, 3, 25, "linear algebra; section 3.3 does without it",
             "y like the result of dwt -> W^T y, (B, C, H, W), where W is the matrix of dwt: the sum of dwt(x) y is "
             "the sum of x adjoint(y), whatever x and y.",
             "The gradient of x -> sum(dwt(x) y) is W^T y: let autograd do it.",
             "Is adjoint(dwt(x)) = x? What would the transform have to be, and what would that mean for white noise?"),
    # ---------------------------------------------------------------------------------- 4 the U-Net
    Exercise("4.1", "Where is the noise level?", "unet.Embedding.of_logsnr", 3, 3, 20,
             "simple diffusion, appendix A and B.2 ('linear' log-SNR input)",
             "logsnr (B,) or scalar -> emb (B, E): sinusoid of its place between the END POINTS OF THE SCHEDULE IN "
             "USE (self.logsnr_min, self.logsnr_max), 0 at the lower, 1 at the upper, through self.time.",
             "A scalar is expanded to the batch; sinusoid(place, self.width) wants (B,).",
             "A model is trained at 512 px, shifted to 64, with the embedding's ends left at -15 and 15. Which "
             "log-SNRs come, and what does the embedding make of them?"),
    Exercise("4.2", "The ResBlock: scale, shift and skip", "unet.ResBlock.forward", 5, 8, 40,
             "simple diffusion, B.2.1 (printed resnet_block)",
             "x (B, C, H, W), emb (B, E)[, skip like x] -> x + h. h: norm1(x); with a skip plus norm_skip(skip), over "
             "sqrt(2); swish, conv1; norm2, times (1 + scale), plus shift; swish, dropout, conv2.",
             "self.film(emb) holds scale, then shift, C numbers each, without the axes of the map.",
             "Why sqrt(2)? And what would go wrong if skips were added without normalising them?"),
    Exercise("4.3", "Where dropout acts", "unet.at_or_below", 2, 1, 10, "simple diffusion, section 3.4, table 3",
             "height and width of a map, resolution -> is it that resolution's map or a smaller one? 0: never. Maps "
             "that are not square count as the square of equal area, to the nearest factor of two.",
             "log2 of sqrt(H W) / resolution, and half a step of tolerance.",
             "What does table 3 say about dropout everywhere, nowhere, and from 16 x 16 down? What is the reason "
             "given?"),
    Exercise("4.4", "The way up", "unet.UNet.ascend", 4, 6, 30, "simple diffusion, B.1 ('k + (k+1) blocks')",
             "h, the coarsest map, the list of skips as `descend` left it, emb[, text] -> the finest map. Each level "
             "of self.up has pairs (block, attention), coarsest level first; after each level but the last "
             "self.upsample.",
             "Skips are taken from the end of the list: what was put down last is picked up first.",
             "Why has each level one block more on the way up than on the way down?"),
    # ---------------------------------------------------------------------------------- 5 the U-ViT
    Exercise("5.1", "Attention with normalised q and k", "unet.Attention.forward", 5, 7, 45,
             "simple diffusion, B.2.1 (printed self_attention)",
             "x (B, N, C)[, mask (B, N) of tokens that may be looked at] -> x + attention(norm(x)). qkv gives q, then "
             "k, then v, each of num_heads heads of C / num_heads channels; q and k are normalised per head.",
             "F.scaled_dot_product_attention wants (B, heads, N, d) and scales by d^-1/2 itself.",
             "How large can a logit before the softmax become with normalised q and k, and without? Why does that "
             "matter in a large model?"),
    Exercise("5.2", "The MLP block", "uvit.MLPBlock.forward", 4, 7, 30, "simple diffusion, B.2.1 (printed mlp_block)",
             "x (B, N, C), emb (B, E)[, skip like x] -> x + h. h: norm, with a skip as in 4.2; expand to 4C, swish, "
             "times (1 + scale) plus shift, dropout, out.",
             "Scale and shift act on the 4C hidden features, after the swish.",
             "Where does the ResBlock put scale and shift, and how many numbers a block does each take from emb?"),
    Exercise("5.3", "Maps to tokens and back", "uvit.UViT.features", 6, 18, 60, "simple diffusion, 3.5, B.2, figure 7",
             "z (B, C, H, W), emb (B, E)[, text, f] -> the last feature map. Down: the blocks of a level (each leaves "
             "a skip), then downsample. The map becomes tokens row by row and gets self.position; the transformer; "
             "back to a map; up: upsample, then blocks with skips. f, if given, is added to the first map. Wrong "
             "size: ValueError.",
             "check_input(z, self.size); h.flatten(2).transpose(1, 2) makes tokens of a map.",
             "Which pixel of a map H x W is token n? What would happen to a trained model if tokens were numbered "
             "column by column, in training and in sampling alike?"),
    # ---------------------------------------------------------------------------------- 6 sampling
    Exercise("6.1", "The deterministic step", "sample.ddim_step", 2, 1, 15,
             "Song et al. 2020; simple diffusion, section 2",
             "z_t, x_hat like images, logsnr_t, logsnr_s (B,) or scalar -> z_s: the eps that x_hat implies at t is "
             "kept.",
             "eps_from_x, then diffuse.",
             "With a perfect x_hat (data: one point), how many DDIM steps does it take from t = 1 to the image?"),
    Exercise("6.2", "The ancestral step", "sample.ddpm_step", 6, 10, 60, "simple diffusion, eq. 3 and appendix A",
             "z_t, x_hat like images, logsnr_t, logsnr_s (B,) or scalar, nu = noise_param, noise N(0, 1) (drawn if "
             "None) -> z_s: the mean of q(z_s | z_t, x_hat) plus noise whose log variance goes linearly from log(c "
             "sigma_s^2) at nu = 0 to log(c sigma_t^2) at nu = 1; c = 1 - exp(logsnr_t - logsnr_s).",
             "Mean: e^(l_t - l_s) (alpha_s / alpha_t) z_t + c alpha_s x_hat; expm1 keeps c exact for small steps.",
             "For which data is nu = 0 exact, and for which nu = 1?"),
    Exercise("6.3", "Guidance", "sample.guide", 2, 1, 10, "simple diffusion, eq. 7",
             "Predictions with and without the condition, scale w -> their mixture; w = 1 is off: v_cond, to the bit.",
             "w = 1 + eta. Start from v_cond.",
             "Eq. 7 is written for eps. Why may v, or x, be mixed by the same rule?"),
    Exercise("6.4", "Dynamic thresholding", "sample.clip_dynamic", 3, 3, 20,
             "Imagen (Saharia et al. 2022), section 2.3",
             "x (B, C, H, W) -> the same, in [-1, 1]: per image s = the percentile of |x|, at least 1; clip to [-s, "
             "s], divide by s.",
             "torch.quantile over the flattened image, a number an image.",
             "Which of an image's pixels does static clipping change, and which does dynamic thresholding change?"),
    # ---------------------------------------------------------------------------------- 7 matryoshka
    Exercise("7.1", "The pyramid", "nested_unet.pyramid", 3, 8, 20, "Matryoshka Diffusion, eq. 2",
             "x (B, C, H, W), sizes [(H, W), ...] highest first -> the levels, averages of each other, x itself "
             "first. ValueError if x is not of the first size, or a size does not divide the one before it by one "
             "factor for both sides.",
             "F.avg_pool2d of the level above, by the factor between them.",
             "Why averages, and not every second pixel? Think of the schedule of a level."),
    Exercise("7.2", "A schedule a level", "nested_unet.level_schedules", 3, 2, 20,
             "Matryoshka Diffusion 3.1; simple diffusion, eq. 5",
             "base: t -> logsnr of the LOWEST level, sizes highest first -> a list of functions, base minus power "
             "log(side of the level / side of the lowest); the side of H x W is sqrt(H W).",
             "A lambda in a loop sees the loop variable's last value; bind it.",
             "With power 2, what is the log-SNR of every level once it is averaged to the lowest? What does power 1 "
             "do?"),
    Exercise("7.3", "The joint loss", "nested_unet.nested_loss", 5, 8, 40,
             "Matryoshka Diffusion, eq. 3 and section 3.3",
             "Levels x, one t for all, a noise and a schedule for each level -> the weighted sum of the levels' "
             "losses (weights None: all 1); with rows only the first rows[r] examples of level r are run and counted.",
             "Diffuse every level with its own noise; cut z, x, eps, logsnr to its rows; call the model once.",
             "What would the inner level learn if its noise were the average of the outer level's noise?"),
    Exercise("7.4", "One network in another", "nested_unet.denoise", 6, 13, 60, "Matryoshka Diffusion 3.2, figure 3",
             "network, z, logsnr (lists, highest first), condition (B, E)[, text, f] -> ([v, ...] highest first, the "
             "last map of this level, before its output). Outer: descend; its coarsest map through in_adapter is f of "
             "the level below; that level's last map through out_adapter is added to the coarsest map; ascend, "
             "output. Each level embeds its own log-SNR and adds the condition. Mixed batch: the level below has more "
             "rows, the first ones are ours; the others get f = 0 and give nothing back.",
             "The innermost network is no NestedUNet and has features(z, emb, text, f) and output(h); .outer has "
             "descend(z, emb, f=f) and ascend(h, skips, emb), and is None if there is no level but the inner one.",
             "Both adapters start at zero. What does the nested model predict at its lowest level on the day it is "
             "grown, and which level's loss gives each adapter its first gradient?"),
    # ---------------------------------------------------------------------------------- 8 cascade and distillation
    Exercise("8.1", "Conditioning augmentation", "cascade.augment", 5, 6, 40, "Cascaded Diffusion 3.1 and 3.2",
             "low_res (B, 3, h, w), s (B,), noise, the low-res schedule, draws (3, B) ~ U(0, 1) -> (what the model "
             "sees, the log-SNR it is told). Blur where draws[1] < aug_blur, sigma linear in draws[2] from end to end "
             "of blur_range; then noise to level s where draws[0] < aug_noise; elsewhere none, and the level is +inf.",
             "blur_augment and gaussian_augment do the work; torch.where chooses example by example.",
             "Why is the noise added before up-sampling, and not after?"),
    Exercise("8.2", "What a stage hands the next", "cascade.hand_over", 3, 6, 25, "Cascaded Diffusion 3.2, 3.3",
             "low_res, handoff (truncated, renoised, clean), s, schedule, noise -> (low_res for the next stage, its "
             "log-SNR (B,)). truncated: low_res is z_s already; renoised: noise to level s; clean, or s = 0: as it "
             "is, level +inf. Another word: ValueError.",
             "The level that is told must be the level that is there.",
             "Truncated saves the last steps of the first stage. What does renoised save?"),
    Exercise("8.3", "The target of one step", "distill.step_target", 3, 4, 30, "Salimans & Ho 2022",
             "z_t, z_s like images, logsnr_t, logsnr_s (B,) -> the x with which ONE DDIM step goes from z_t to z_s.",
             "Write the DDIM step with that x, and solve: r = sigma_s / sigma_t.",
             "What is the target where sigma_s = 0? What if the teacher's two steps had the same x_hat?"),
    Exercise("8.4", "Two steps in one", "distill.two_step_target", 5, 8, 45, "Salimans & Ho 2022, algorithm 2",
             "predict(z, logsnr) -> [v, ...], the teacher; schedules, z lists of levels; t (B,) in {1..steps}/steps "
             "-> [v, ...] for the student: the teacher goes by DDIM from t over t - 1/(2 steps) to t - 1/steps.",
             "times = t, the middle, the end, never below 0; then step_target and v_from_x at t.",
             "Why is the teacher not clipped here, though the sampler is?"),
]


# ------------------------------------------------------------------------------------------ functions in a source file

def find(tree, name):
    """The nodes that define `name`, "function" or "Class.method"; the last one is what Python would use."""
    where = [tree]
    for part in name.split("."):
        where = [node for outer in where for node in ast.iter_child_nodes(outer)
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == part]
    return where


def lines_of(source):
    """Lines as Python counts them; str.splitlines would also cut at form feeds and at what PDFs have in their place."""
    lines = re.split(r"\r\n|\r|\n", source)
    return lines[:-1] if lines[-1] == "" else lines


def span(node):
    """First and last line of a definition, decorators included, counted from 1."""
    return min([node.lineno] + [d.lineno for d in node.decorator_list]), node.end_lineno


def text_of(source, name):
    """The lines of the last definition of `name`, or None."""
    nodes = find(ast.parse(source), name)
    if not nodes:
        return None
    first, last = span(nodes[-1])
    return "\n".join(lines_of(source)[first - 1:last])


def body(node, lines):
    """First and last line of a function's code, after its docstring, with the comments over it."""
    if ast.get_docstring(node) is not None:
        return node.body[0].end_lineno + 1, node.end_lineno
    start = node.body[0].lineno
    while not lines[start - 2].strip() or lines[start - 2].lstrip().startswith("#"):
        start -= 1
    return start, node.end_lineno


def strip(source, exercises):
    """The source with the bodies of these exercises' functions gone; signatures and docstrings stay."""
    lines, cuts = lines_of(source), []
    for exercise in exercises:
        nodes = find(ast.parse(source), exercise.name)
        if not nodes:
            raise Fault(f"{exercise.file} has no {exercise.name} (exercise {exercise.number})")
        cuts.append((*body(nodes[-1], lines), " " * nodes[-1].body[0].col_offset
                     + f'raise NotImplementedError("exercise {exercise.number}: {exercise.title}")'))
    for start, last, instead in sorted(cuts, reverse=True):
        lines[start - 1:last] = [instead]
    return "\n".join(lines) + "\n"


def put_back(source, canonical, exercises):
    """The source with the functions of these exercises as they are in `canonical`. What is missing is appended, to the
    file or to its class; the indent is the source's, be it tabs."""
    for exercise in exercises:
        right = textwrap.dedent(text_of(canonical, exercise.name))
        for node in reversed(find(ast.parse(source), exercise.name)):
            lines, (first, last) = lines_of(source), span(node)
            lines[first - 1:last] = lines_of(textwrap.indent(right, lines[first - 1][:node.col_offset]))
            source = "\n".join(lines) + "\n"
        if not find(ast.parse(source), exercise.name):
            lines, owner = lines_of(source), exercise.name.rpartition(".")[0]
            if within := find(ast.parse(source), owner):
                last = within[-1].body[-1]
                indent = re.match(r"[ \t]*", lines[last.lineno - 1])[0]
                lines[last.end_lineno:last.end_lineno] = ["", *lines_of(textwrap.indent(right, indent))]
            elif not owner:
                lines += ["", "", *lines_of(right)]
            source = "\n".join(lines) + "\n"
    return source


def read(path):
    """Text of a file. Raises Fault."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise Fault(f"{path}: no plain file")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Fault(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None


def to_grade(folder, exercise):
    """The student's file with all other exercises put back. Raises Fault: no file, or not Python."""
    path = os.path.join(folder, exercise.file)
    source, canonical = read(path), read(os.path.join(HERE, exercise.file))
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        raise Fault(f"{exercise.file}{line}: {getattr(error, 'msg', None) or 'not Python'}") from None
    if not find(ast.parse(source), exercise.name):
        raise Fault(f"{exercise.file} has no plain def of {exercise.name}")
    return put_back(source, canonical, [other for other in EXERCISES if other.file == exercise.file
                                        and other is not exercise])


def chosen(chapter, folder=None):
    """The exercises of a chapter; without one, those that the folder's EXERCISES.md names; without that, all."""
    named = None
    if chapter is None and folder and os.path.exists(os.path.join(folder, "EXERCISES.md")):
        text = read(os.path.join(folder, "EXERCISES.md"))
        named = {line.split()[1] for line in text.splitlines() if line.startswith("### ") and len(line.split()) > 1}
    return [e for e in EXERCISES if chapter in (None, e.chapter) and (not named or e.number in named)]


# ------------------------------------------------------------------------------------------ what the program does

def sheet(exercises):
    """The statements, as Markdown."""
    text = ["# Exercises", "", "Grade with `python exercises.py grade .` in this folder. What is right gets its points "
            "and a picture in `pictures/`. Some exercises call others: here, do these first."]
    for number, title in CHAPTERS.items():
        rows = [exercise for exercise in exercises if exercise.chapter == number]
        if rows:
            text += ["", f"## {number} {title}"]
        for e in rows:
            text += ["", f"### {e.number} {e.title}", "",
                     f"`{e.file}`, `{e.name}`; {e.paper}; {e.points} points, ours has {e.lines} "
                     f"line{'s' * (e.lines > 1)}, about {e.minutes} minutes.", "", e.task, "", f"*Hint.* {e.hint}", "",
                     f"*In writing.* {e.question}"]
    return "\n".join(text) + "\n"


def make(args):
    if not os.path.exists(os.path.join(HERE, KEPT_BACK[1])):
        raise Fault("this is a student's copy: make another from the project itself")
    if os.path.exists(args.folder) and (not os.path.isdir(args.folder) or os.listdir(args.folder)):
        raise Fault(f"{args.folder}: is there already; name a new folder")
    exercises = chosen(args.chapter)
    for part in ("", "course", "tests"):
        os.makedirs(os.path.join(args.folder, part), exist_ok=True)
        for name in sorted(os.listdir(os.path.join(HERE, part))):
            path = f"{part}/{name}".lstrip("/")
            if path in KEPT_BACK or (not name.endswith((".py", ".ini", ".txt", ".png"))
                                     and path not in ("LICENSE", "course/reading_a_run.md")):
                continue
            shutil.copyfile(os.path.join(HERE, path), os.path.join(args.folder, path))
    for file in {exercise.file for exercise in exercises}:
        source = strip(read(os.path.join(HERE, file)), [e for e in exercises if e.file == file])
        with open(os.path.join(args.folder, file), "w", encoding="utf-8") as out:
            out.write(source)
    with open(os.path.join(args.folder, "EXERCISES.md"), "w", encoding="utf-8") as out:
        out.write(sheet(exercises))
    print(f"{args.folder}: {len(exercises)} exercises, {sum(e.points for e in exercises)} points; begin with "
          f"{os.path.join(args.folder, 'EXERCISES.md')}")


def grade(args):
    if not os.path.isdir(args.folder):
        raise Fault(f"{args.folder}: no such folder")
    if not any(os.path.exists(os.path.join(args.folder, e.file)) for e in EXERCISES):
        raise Fault(f"{args.folder}: none of the exercises' files is there")
    return judge("grade", args.folder, *(["--chapter", args.chapter] if args.chapter else []), "--seed", args.seed,
                 "--limit", args.limit, *(["--json", args.json] if args.json else []),
                 *(["--no-pictures"] if args.no_pictures else []))


def check(args):
    if not os.path.exists(os.path.join(HERE, KEPT_BACK[1])):
        raise Fault("check needs course/mutants.py, which students' copies do not have")
    return judge("check", "--seed", args.seed)


def judge(*words):
    """The judge needs PyTorch, so it is another program; its status is ours."""
    return subprocess.run([sys.executable, os.path.join(COURSE, "judge.py"), *map(str, words)]).returncode


def listing(args):
    for number, title in CHAPTERS.items():
        rows = [e for e in EXERCISES if e.chapter == number]
        print(f"{number} {title}: {sum(e.points for e in rows)} points, {sum(e.minutes for e in rows)} minutes")
        for e in rows:
            print(f"   {e.number}  {e.points} points {e.minutes:3d} min  {e.title} ({e.target})")
    print(f"{len(EXERCISES)} exercises, {sum(e.points for e in EXERCISES)} points")


def whole(low, high):
    def number(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: want {low} to {high}")
        return value
    return number


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = parser.add_subparsers(dest="what", required=True, metavar="list | make | grade | check")
    programs.add_parser("list", help="the exercises").set_defaults(run=listing)
    for name, run, text in (("make", make, "a student's copy"), ("grade", grade, "grade a student's copy")):
        program = programs.add_parser(name, help=text)
        program.add_argument("folder", metavar="DIR")
        program.add_argument("--chapter", type=int, choices=CHAPTERS, help="this chapter only")
        program.set_defaults(run=run)
    program.add_argument("--json", metavar="FILE", help="write the points there, too")
    program.add_argument("--seed", type=whole(0, 2 ** 31 - 1), default=0, help="of the random inputs (default 0)")
    program.add_argument("--limit", type=whole(1, 3600), default=20, help="seconds an exercise may take (default 20)")
    program.add_argument("--no-pictures", action="store_true")
    program = programs.add_parser("check", help="the lecturer's own test: full marks, stubs, and every usual mistake")
    program.add_argument("--seed", type=whole(0, 2 ** 31 - 1), default=0)
    program.set_defaults(run=check)
    args = parser.parse_args()
    try:
        sys.exit(args.run(args))
    except (Fault, OSError) as error:
        print(f"exercises.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
