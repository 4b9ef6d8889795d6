"""The table of exercises: which function, how many points, what to do, a hint, and a question to answer in writing.

An exercise is a function of the project. To add one, add a row here, an exam in course/chapterN.py, at least three
mistakes in course/mutants.py and an answer in course/answers.md. Standard library only.
"""
import dataclasses
import os

from course.source import read

CHAPTERS = {1: "Noise schedules", 2: "Parameterisations and losses", 3: "The wavelet", 4: "The U-Net", 5: "The U-ViT",
            6: "Sampling", 7: "Matryoshka", 8: "Cascade and distillation"}


@dataclasses.dataclass(frozen=True)
class Exercise:
    """One function for the student to write. `lines` is the length of our solution."""
    number: str
    title: str
    target: str                                                           # file.function or file.Class.method
    points: int
    lines: int
    minutes: int                                                          # on paper and at the keyboard
    paper: str
    task: str
    hint: str
    question: str                                                         # answered in writing
    equation: str                                                         # what defines the function, as text
    latex: str                                                            # and in LaTeX
    level: int                                                            # 1, a formula in PyTorch, to 3

    @property
    def chapter(self):
        return int(self.number.split(".")[0])

    @property
    def file(self):
        return self.target.split(".")[0] + ".py"

    @property
    def name(self):
        return self.target.split(".", 1)[1]

    @property
    def needs(self):
        """The numbers of the other exercises whose functions its exam runs."""
        return NEEDS.get(self.number, ())


EXERCISES = [
    # ---------------------------------------------------------------------------------- 1 noise schedules
    Exercise("1.1", "The cosine schedule in log-SNR", "schedule.logsnr_cosine", 3, 4, 15,
             "simple diffusion, appendix A",
             "Take t of any shape and return logsnr of the same shape: -2 log tan of an angle that moves linearly "
             "from t_min to t_max. Choose t_min and t_max so that logsnr is logsnr_max at t = 0 and logsnr_min at t "
             "= 1.",
             "Solve logsnr_max = -2 log tan(t_min) for t_min.",
             "Why is the schedule cut off at both ends? What would happen at t = 1 without the cut?",
             equation="lambda(t) = -2 log tan(t_min + t (t_max - t_min)), lambda(0) = logsnr_max, lambda(1) = "
                      "logsnr_min",
             latex=r"\lambda(t) = -2 \log \tan\bigl(t_{\min} + t\,(t_{\max} - t_{\min})\bigr), \quad \lambda(0) = "
                   r"\lambda_{\max}, \quad \lambda(1) = \lambda_{\min}",
             level=1),
    Exercise("1.2", "alpha and sigma", "schedule.alpha_sigma", 2, 2, 10, "simple diffusion, section 2",
             "Take logsnr of any shape and return (alpha, sigma) of the variance preserving process, both of the "
             "same shape.",
             "alpha^2 is a sigmoid; so is sigma^2.",
             "In float32, what is sqrt(1 - alpha^2) at logsnr = 20? What is the true sigma?",
             equation="alpha^2 + sigma^2 = 1, lambda = log(alpha^2 / sigma^2)",
             latex=r"\alpha^2 + \sigma^2 = 1, \qquad \lambda = \log\frac{\alpha^2}{\sigma^2}",
             level=1),
    Exercise("1.3", "The shift", "schedule.logsnr_shifted", 3, 1, 15, "simple diffusion, eq. 4 and 5",
             "Take t of any shape and return logsnr of the same shape for an image of side image_d. The image "
             "averaged to noise_d x noise_d pixels must follow the plain cosine schedule.",
             "Averaging s x s pixels divides the variance of the noise by s^2. The whole curve moves, also its end "
             "points.",
             "Train on 256 x 256 images with the plain cosine schedule. Which schedule do their 64 x 64 averages "
             "follow?",
             equation="SNR(t) (image_d / noise_d)^2 = e^lambda_cosine(t), lambda(t) = log SNR(t)",
             latex=r"\mathrm{SNR}(t)\,\Bigl(\frac{d_\text{image}}{d_\text{noise}}\Bigr)^2 = "
                   r"e^{\lambda_\text{cosine}(t)}, \qquad \lambda(t) = \log \mathrm{SNR}(t)",
             level=2),
    Exercise("1.4", "Interpolation of two shifts", "schedule.logsnr_interpolated", 2, 3, 15,
             "simple diffusion, appendix A",
             "Take t of any shape and return logsnr of the same shape. It moves linearly in t from the shift of "
             "noise_d_high at t = 0 to the shift of noise_d_low at t = 1.",
             "Sampling begins at t = 1: there the low shift applies. Eq. 6 prints it the other way round.",
             "Use the weights of eq. 6 as printed. From which ratio of high to low on does the curve stop falling, "
             "and why is that bad?",
             equation="lambda(t) = t lambda_low(t) + (1 - t) lambda_high(t)",
             latex=r"\lambda(t) = t\,\lambda_\text{low}(t) + (1 - t)\,\lambda_\text{high}(t)",
             level=1),
    # ---------------------------------------------------------------------------------- 2 parameterisations and losses
    Exercise("2.1", "Diffuse", "schedule.diffuse", 2, 2, 10, "simple diffusion, eq. 1",
             "Take x and eps (B, C, H, W) and logsnr, (B,) or a scalar. Return z_t, shaped like x, with each example "
             "at its own noise level.",
             "alpha_sigma_for(x, logsnr) returns both with axes that broadcast.",
             "x has variance 1 and eps has variance 1. What is the variance of z_t at each t?",
             equation="z_t = alpha_t x + sigma_t eps",
             latex=r"z_t = \alpha_t x + \sigma_t \epsilon",
             level=1),
    Exercise("2.2", "The velocity", "schedule.v_from_x_eps", 2, 2, 10,
             "simple diffusion, section 2; Salimans & Ho 2022",
             "Take x and eps, shaped like images, and logsnr, (B,) or a scalar. Return v.",
             "Turn the axes of (x, eps) by the angle whose tangent is sigma / alpha. The first coordinate is then z, "
             "the second v.",
             "What must a network that predicts v predict at t = 0, and what at t = 1?",
             equation="(z, v) = R(phi) (x, eps): R turns the axes by phi, tan phi = sigma / alpha",
             latex=r"\begin{pmatrix} z \\ v \end{pmatrix} = \begin{pmatrix} \cos\varphi & \sin\varphi \\ -\sin\varphi "
                   r"& \cos\varphi \end{pmatrix} \begin{pmatrix} x \\ \epsilon \end{pmatrix}, \qquad \tan\varphi = "
                   r"\frac{\sigma}{\alpha}",
             level=2),
    Exercise("2.3", "Noise out of the velocity", "schedule.eps_from_v", 2, 2, 10, "simple diffusion, section 2",
             "Take z and v, shaped like images, and logsnr, (B,) or a scalar. Return eps.",
             "Rotate back. No division is needed.",
             "v has an error of 0.01 at logsnr = -15. By how much does eps change, and by how much x?",
             equation="(x, eps) = R(-phi) (z, v), tan phi = sigma / alpha",
             latex=r"\begin{pmatrix} x \\ \epsilon \end{pmatrix} = R(-\varphi) \begin{pmatrix} z \\ v \end{pmatrix}, "
                   r"\qquad \tan\varphi = \frac{\sigma}{\alpha}",
             level=2),
    Exercise("2.4", "The image out of the noise", "schedule.x_from_eps", 2, 2, 10, "simple diffusion, section 2",
             "Take z and eps, shaped like images, and logsnr, (B,) or a scalar. Return x.",
             "Solve eq. 1 for x.",
             "eps has an error of 0.01 at logsnr = -15. How large is the error of x? Why do we predict v?",
             equation="z_t = alpha_t x + sigma_t eps, solved for x",
             latex=r"z_t = \alpha_t x + \sigma_t \epsilon \quad\text{solved for } x",
             level=1),
    Exercise("2.5", "The loss on eps and on v", "train.prediction_loss", 3, 2, 20, "simple diffusion, appendix A",
             "Take the network's v (B, 3, H, W) and the z, x, eps and logsnr that belong to it. Return a scalar: the "
             "mean squared error of v (loss='v_mse'), or of the eps that v implies ('eps_mse'). If multiscale > 0, "
             "average the error with multiscale_mse instead.",
             "Compute the difference first, then choose how to average it.",
             "Show that the squared error of eps is SNR / (1 + SNR) times the squared error of v. Which times of the "
             "process does it neglect?",
             equation="L_v = mean (v_hat - v)^2, L_eps = mean (eps_hat - eps)^2",
             latex=r"L_v = \operatorname{mean}\,(\hat v - v)^2, \qquad L_\epsilon = "
                   r"\operatorname{mean}\,(\hat\epsilon - \epsilon)^2",
             level=2),
    Exercise("2.6", "The multiscale loss", "train.multiscale_mse", 4, 9, 30, "simple diffusion, section 3.2",
             "Take error (B, C, H, W) and return a scalar: the sum over s = d, d/2, d/4, ... of (1/s) times the mean "
             "square of the error averaged down by k = d / s, to H / k x W / k, each rounded up. d is the image's "
             "side; if H and W differ, d = sqrt(H W), which you do not round: 48 x 80 has d = 61.97. Where no s is "
             "base itself, the last s is the one with |log2(s / base)| < 1/2. Raise ValueError unless 0 < base <= d.",
             "Start at k = 1; s = d / k. F.adaptive_avg_pool2d(error, size) averages to any size.",
             "The error is white noise of variance 1: what does the term of s contribute? And if the error is "
             "constant over the image?",
             equation="L = sum over s = d, d/2, ..., base of (1/s) mean(D_s[error]^2)",
             latex=r"L = \sum_{s = d,\, d/2,\, \dots,\, \text{base}} \frac{1}{s} "
                   r"\operatorname{mean}\bigl(D_s[\text{error}]^2\bigr)",
             level=3),
    # ---------------------------------------------------------------------------------- 3 the wavelet
    Exercise("3.1", "One level of the 5/3 wavelet", "dwt._split", 4, 6, 30, "simple diffusion, section 3.3; JPEG 2000",
             "Take x (..., N) with N even, 2 or more, and return low and high, both (..., N/2), by lifting. First, "
             "high = odd samples minus the mean of their two even neighbours. Then, low = even samples plus a quarter "
             "of the sum of their two high neighbours. Mirror the signal at both ends.",
             "x[..., 0::2] and x[..., 1::2]; past the end x[N] = x[N - 2], before the start high[-1] = high[0]. "
             "For N = 2 both neighbours of x[1] are x[0], and both of low[0] are high[0].",
             "What is `high` for a straight line x[n] = a + b n? Why do we want that for images?",
             equation="high[n] = x[2n+1] - (x[2n] + x[2n+2]) / 2, low[n] = x[2n] + (high[n-1] + high[n]) / 4",
             latex=r"h_n = x_{2n+1} - \tfrac12 (x_{2n} + x_{2n+2}), \qquad l_n = x_{2n} + \tfrac14 (h_{n-1} + h_n)",
             level=2),
    Exercise("3.2", "And back", "dwt._merge", 3, 5, 20, "simple diffusion, section 3.3",
             "Take low and high, both (..., N/2), and return x (..., N): the inverse of exercise 3.1.",
             "Undo the two steps of 3.1, the last one first, with the signs changed. Then interleave.",
             "Would it still be an inverse if the quarter were a third? Which property makes the answer so easy?",
             equation="merge(split(x)) = x",
             latex=r"\mathrm{merge}(\mathrm{split}(x)) = x",
             level=1),
    Exercise("3.3", "Bands into channels", "dwt.dwt", 4, 8, 30, "simple diffusion, section 3.3, figure 6",
             "Take x (B, C, H, W) and return (B, C 4^levels, H / 2^levels, W / 2^levels). The low band of the last "
             "level comes first. The details (LH, HL, HH) follow, from the coarsest level to the finest; "
             "space-to-depth brings finer bands to the size of the coarsest. Raise ValueError if a side does not "
             "divide.",
             "_analyse(x) returns LL, LH, HL, HH of one level. F.pixel_unshuffle(band, factor) only moves numbers.",
             "A 512 x 512 x 3 image goes through two levels. Which shape comes out? By how much does the first "
             "feature map of 128 channels shrink?",
             equation="y = (LL_L, LH_L, HL_L, HH_L, ..., LH_1, HL_1, HH_1), where level j + 1 splits LL_j and LL_0 = x",
             latex=r"y = (LL_L, LH_L, HL_L, HH_L, \dots, LH_1, HL_1, HH_1), \qquad (LL_{j+1}, LH_{j+1}, HL_{j+1}, "
                   r"HH_{j+1}) = \mathrm{analyse}(LL_j), \quad LL_0 = x",
             level=3),
    Exercise("3.4", "The adjoint", "dwt.adjoint", 3, 3, 25, "linear algebra; section 3.3 does without it",
             "Let W be the matrix of dwt. Take y, shaped like the result of dwt, and return W^T y (B, C, H, W): the "
             "sum of dwt(x) y equals the sum of x adjoint(y) for every x and y.",
             "W^T y is the gradient of x -> sum(dwt(x) y). Let autograd compute it.",
             "Is adjoint(dwt(x)) = x? Which property must the transform have for that, and what would it do to white "
             "noise?",
             equation="sum((W x) y) = sum(x (W^T y)) for every x and y",
             latex=r"\langle W x, y \rangle = \langle x, W^\top y \rangle \quad\text{for every } x, y",
             level=2),
    Exercise("3.5", "What a linear guess leaves of v", "precondition.coefficients", 3, 2, 30,
             "beyond the papers; Karras et al. 2022 (EDM), section 5",
             "In one band x has the mean square s^2, eps has n^2, and they are uncorrelated. Take alpha, sigma, s and "
             "n. Return c, which makes the mean square of v - c z smallest, and d, the root of that mean square. Both "
             "have the shape of alpha.",
             "c = E[v z] / E[z^2]: write v and z with x and eps. Then d^2 = E[v^2] - c^2 E[z^2]; it becomes simple "
             "with alpha^2 + sigma^2 = 1.",
             "For which images are c = 0 and d = n at every log-SNR? What does v-prediction assume, and in which band "
             "of a photograph is that most wrong?",
             equation="c = argmin over c of E[(v - c z)^2], d^2 = E[(v - c z)^2], E[x^2] = s^2, E[eps^2] = n^2, E[x "
                      "eps] = 0",
             latex=r"c = \arg\min_c \mathbb{E}[(v - c z)^2], \quad d^2 = \mathbb{E}[(v - c z)^2], \quad "
                   r"\mathbb{E}[x^2] = s^2, \; \mathbb{E}[\epsilon^2] = n^2, \; \mathbb{E}[x \epsilon] = 0",
             level=3),
    # ---------------------------------------------------------------------------------- 4 the U-Net
    Exercise("4.1", "Where is the noise level?", "unet.Embedding.of_logsnr", 3, 3, 20,
             "simple diffusion, appendix A and B.2 ('linear' log-SNR input)",
             "Take logsnr, (B,) or a scalar, and return its embedding (B, E). Scale logsnr linearly: 0 at "
             "self.logsnr_min, 1 at self.logsnr_max, the END POINTS OF THE SCHEDULE IN USE. Send the sinusoid of "
             "that fraction through self.time.",
             "Expand a scalar to the batch: sinusoid(fraction, self.sinusoid_channels) wants (B,).",
             "A model for 512 px images uses the schedule shifted to 64, but its embedding keeps the ends -15 and "
             "15. Which log-SNRs occur, and what does the embedding make of them?",
             equation="emb = time(sinusoid(u)), u = (lambda - lambda_min) / (lambda_max - lambda_min)",
             latex=r"\mathrm{emb} = \mathrm{time}(\mathrm{sinusoid}(u)), \qquad u = \frac{\lambda - "
                   r"\lambda_{\min}}{\lambda_{\max} - \lambda_{\min}}",
             level=2),
    Exercise("4.2", "The ResBlock: scale, shift and skip", "unet.ResBlock.forward", 5, 8, 40,
             "simple diffusion, B.2.1 (printed resnet_block)",
             "Take x (B, C, H, W), emb (B, E) and, in some blocks, a skip like x. Return x + h. h begins as "
             "norm1(x); with a skip, add norm_skip(skip) and divide by sqrt(2). Then swish and conv1. Then norm2, "
             "times (1 + scale), plus shift. Then swish, dropout and conv2.",
             "self.film(emb) holds the C numbers of scale, then the C numbers of shift. Both still need the two axes "
             "of the map.",
             "Why sqrt(2)? What would go wrong if skips were added without a norm?",
             equation="a = (norm1(x) + norm_skip(skip)) / sqrt(2), b = norm2(conv1(swish(a))) (1 + scale) + shift, y "
                      "= x + conv2(dropout(swish(b)))",
             latex=r"a = \frac{\mathrm{norm}_1(x) + \mathrm{norm}_s(\mathrm{skip})}{\sqrt 2}, \quad b = "
                   r"\mathrm{norm}_2(\mathrm{conv}_1(\mathrm{swish}(a)))\,(1 + \mathrm{scale}) + \mathrm{shift}, "
                   r"\quad y = x + \mathrm{conv}_2(\mathrm{dropout}(\mathrm{swish}(b)))",
             level=3),
    Exercise("4.3", "Where dropout acts", "unet.at_or_below", 2, 1, 10, "simple diffusion, section 3.4, table 3",
             "Take height and width of a map, and a resolution. Return whether the map has that resolution or a "
             "smaller one. Resolution 0 means never. A map that is not square counts as the square of equal area, "
             "rounded to the nearest factor of two.",
             "log2 of sqrt(H W) / resolution, with half a step of tolerance.",
             "What does table 3 report for dropout everywhere, for no dropout, and for dropout from 16 x 16 down? "
             "Which reason does the paper give?",
             equation="log2(sqrt(H W) / resolution) < 1/2",
             latex=r"\log_2 \frac{\sqrt{H W}}{\text{resolution}} < \tfrac12",
             level=1),
    Exercise("4.4", "The way up", "unet.UNet.ascend", 4, 6, 30, "simple diffusion, 5.1 and table 4 ('2 + 3' blocks)",
             "Take h, the coarsest map, the list of skips that `descend` returned, emb and perhaps text. Return the "
             "finest map. Each level of self.up holds pairs (block, attention), the coarsest level first. After each "
             "level except the last comes self.upsample.",
             "Take skips from the end of the list: the last one stored is the first one used.",
             "Why does each level have one more block on the way up than on the way down?",
             equation="h <- attention(block(h, emb, skip)), k + 1 times a level; then h <- upsample(h)",
             latex=r"h \leftarrow \mathrm{attention}(\mathrm{block}(h, \mathrm{emb}, \mathrm{skip})) \;\; (k + 1 "
                   r"\text{ times a level}), \qquad h \leftarrow \mathrm{upsample}(h)",
             level=2),
    # ---------------------------------------------------------------------------------- 5 the U-ViT
    Exercise("5.1", "Attention with normalised q and k", "unet.Attention.forward", 5, 7, 45,
             "simple diffusion, B.2.1 (printed self_attention)",
             "Take x (B, N, C) and perhaps a mask (B, N) of the tokens that may be looked at. Return x + "
             "attention(norm(x)). qkv gives q, then k, then v, each of num_heads heads with C / num_heads channels. "
             "q and k are normalised per head.",
             "F.scaled_dot_product_attention wants (B, heads, N, d) and scales by d^-1/2 itself.",
             "How large can a logit before the softmax become with normalised q and k, and how large without? Why "
             "does that matter in a large model?",
             equation="attention = out(softmax(norm(q) norm(k)^T / sqrt(d)) v), d = C / num_heads",
             latex=r"\mathrm{attention} = "
                   r"\mathrm{out}\Bigl(\mathrm{softmax}\Bigl(\frac{\mathrm{norm}(q)\,\mathrm{norm}(k)^\top}{\sqrt "
                   r"d}\Bigr)\, v\Bigr), \qquad d = \frac{C}{\text{heads}}",
             level=3),
    Exercise("5.2", "The MLP block", "uvit.MLPBlock.forward", 4, 7, 30, "simple diffusion, B.2.1 (printed mlp_block)",
             "Take x (B, N, C), emb (B, E) and, in some blocks, a skip like x. Return x + h. h begins as norm(x); a "
             "skip enters as in 4.2. Then expand to 4C, swish, times (1 + scale), plus shift, dropout, out.",
             "Scale and shift act on the 4C hidden features, after the swish.",
             "Where does the ResBlock apply scale and shift? How many numbers does each kind of block take from emb?",
             equation="y = x + out(dropout(swish(expand(norm(x))) (1 + scale) + shift))",
             latex=r"y = x + \mathrm{out}\bigl(\mathrm{dropout}(\mathrm{swish}(\mathrm{expand}(\mathrm{norm}(x)))\,(1 "
                   r"+ \mathrm{scale}) + \mathrm{shift})\bigr)",
             level=2),
    Exercise("5.3", "Maps to tokens and back", "uvit.UViT.features", 6, 18, 60, "simple diffusion, 3.5, B.2, figure 7",
             "Take z (B, C, H, W), emb (B, E) and perhaps text and f. Return the last feature map. Way down: the "
             "blocks of a level, each of which stores a skip, then downsample. Middle: the map becomes tokens row by "
             "row, self.position is added, the transformer runs, the tokens become a map again. Way up: upsample, "
             "then blocks with skips. Each level of self.down and self.up holds pairs (block, empty): only the block "
             "acts. Add f, if given, to the first map. Raise ValueError for an image of another size.",
             "check_input(z, self.size) checks the size; h.flatten(2).transpose(1, 2) turns a map into tokens.",
             "Which pixel of an H x W map is token n? What would happen to a trained model if tokens were numbered "
             "column by column, both in training and in sampling?",
             equation="h = up(to_map(transformer(to_tokens(down(input(z) + f)) + position)))",
             latex=r"h = "
                   r"\mathrm{up}\bigl(\mathrm{map}(\mathrm{transformer}(\mathrm{tokens}("
                   r"\mathrm{down}(\mathrm{input}(z) "
                   r"+ f)) + \mathrm{position}))\bigr)",
             level=3),
    # ---------------------------------------------------------------------------------- 6 sampling
    Exercise("6.1", "The deterministic step", "sample.ddim_step", 2, 1, 15,
             "Song et al. 2020; simple diffusion, section 2",
             "Take z_t and x_hat, shaped like images, and logsnr_t and logsnr_s, (B,) or scalars. Return z_s. Keep "
             "the eps that x_hat implies at t.",
             "eps_from_x, then diffuse.",
             "With a perfect x_hat (the data are one point), how many DDIM steps lead from t = 1 to the image?",
             equation="(z_s - alpha_s x_hat) / sigma_s = (z_t - alpha_t x_hat) / sigma_t",
             latex=r"\frac{z_s - \alpha_s \hat x}{\sigma_s} = \frac{z_t - \alpha_t \hat x}{\sigma_t}",
             level=2),
    Exercise("6.2", "The ancestral step", "sample.ddpm_step", 6, 10, 60, "simple diffusion, eq. 3 and appendix A",
             "Take z_t and x_hat, shaped like images, logsnr_t and logsnr_s, (B,) or scalars, nu = noise_param, and "
             "noise N(0, 1), drawn here if None. Return z_s: the mean of q(z_s | z_t, x_hat) plus noise. The log "
             "variance of that noise moves linearly from log(c sigma_s^2) at nu = 0 to log(c sigma_t^2) at nu = 1, "
             "where c = 1 - exp(logsnr_t - logsnr_s).",
             "The mean is e^(l_t - l_s) (alpha_s / alpha_t) z_t + c alpha_s x_hat. expm1 keeps c exact for small "
             "steps.",
             "For which data is nu = 0 exact, and for which nu = 1?",
             equation="z_s = e^(l_t - l_s) (alpha_s / alpha_t) z_t + c alpha_s x_hat + std noise, c = 1 - e^(l_t - "
                      "l_s), log std^2 = (1 - nu) log(c sigma_s^2) + nu log(c sigma_t^2)",
             latex=r"z_s = e^{\lambda_t - \lambda_s} \frac{\alpha_s}{\alpha_t} z_t + c\,\alpha_s \hat x + "
                   r"\mathrm{std}\;\epsilon, \quad c = 1 - e^{\lambda_t - \lambda_s}, \quad \log \mathrm{std}^2 = (1 "
                   r"- \nu) \log(c\,\sigma_s^2) + \nu \log(c\,\sigma_t^2)",
             level=3),
    Exercise("6.3", "Guidance", "sample.guide", 2, 1, 10, "simple diffusion, eq. 7",
             "Take the predictions with and without the condition and a scale w, a number or a tensor that broadcasts "
             "against them (a w for each image). Return the guided prediction. w = 1 turns guidance off and returns "
             "v_cond, to the bit.",
             "w = 1 + eta. Start from v_cond.",
             "Eq. 7 is written for eps. Why does the same rule hold for v, and for x?",
             equation="eps_guided = (1 + eta) eps(z, condition) - eta eps(z)",
             latex=r"\tilde\epsilon = (1 + \eta)\,\epsilon(z, \text{condition}) - \eta\,\epsilon(z)",
             level=1),
    Exercise("6.4", "Dynamic thresholding", "sample.clip_dynamic", 3, 3, 20,
             "Imagen (Saharia et al. 2022), section 2.3",
             "Take x (B, C, H, W) and return it within [-1, 1]. For each image, s is the given percentile of |x|, "
             "but at least 1. Clip to [-s, s], then divide by s.",
             "torch.quantile of each flattened image: one number an image.",
             "Which pixels of an image does static clipping change, and which does dynamic thresholding change?",
             equation="x' = clip(x, -s, s) / s, s = max(1, percentile of |x|)",
             latex=r"x' = \frac{\mathrm{clip}(x, -s, s)}{s}, \qquad s = \max\bigl(1, \text{percentile of } |x|\bigr)",
             level=2),
    # ---------------------------------------------------------------------------------- 7 matryoshka
    Exercise("7.1", "The pyramid", "nested_unet.pyramid", 3, 8, 20, "Matryoshka Diffusion, eq. 2",
             "Take x (B, C, H, W) and sizes [(H, W), ...], highest first. Return the levels: x itself first, each "
             "lower level an average of the level above it. Raise ValueError if x does not have the first size, or "
             "if a size does not divide the one before it by the same factor in height and width.",
             "F.avg_pool2d of the level above, by the factor between the two.",
             "Why averages, and not every second pixel? Think of the schedule of a level.",
             equation="x_0 = x, x_(r+1) = average of k x k pixels of x_r",
             latex=r"x_0 = x, \qquad x_{r+1}[i, j] = \frac{1}{k^2} \sum_{a, b < k} x_r[k i + a, k j + b]",
             level=1),
    Exercise("7.2", "A schedule a level", "nested_unet.level_schedules", 3, 2, 20,
             "Matryoshka Diffusion 3.1; simple diffusion, eq. 5",
             "Take base, the schedule t -> logsnr of the LOWEST level, and sizes, highest first. Return a list of "
             "schedules, one a level: base minus power log(side of the level / side of the lowest). The side of H x "
             "W is sqrt(H W).",
             "A lambda made in a loop sees the last value of the loop variable. Bind the value.",
             "With power 2, what is the log-SNR of each level after averaging it to the lowest size? What does power "
             "1 give?",
             equation="lambda_r(t) = base(t) - power log(d_r / d_lowest), d = sqrt(H W)",
             latex=r"\lambda_r(t) = \lambda_\text{base}(t) - \text{power} \cdot \log \frac{d_r}{d_\text{lowest}}, "
                   r"\qquad d = \sqrt{H W}",
             level=2),
    Exercise("7.3", "The joint loss", "nested_unet.nested_loss", 5, 8, 40,
             "Matryoshka Diffusion, eq. 3 and section 3.3",
             "Take the levels x, one t for all levels, and a noise and a schedule for each level. Return the "
             "weighted sum of the levels' losses (weights None: all 1). If rows is given, run and count only the "
             "first rows[r] examples of level r.",
             "Diffuse each level with its own noise. Cut z, x, eps and logsnr to the level's rows. Call the model "
             "once.",
             "What would the inner level learn if its noise were the average of the outer level's noise?",
             equation="L = sum over levels r of w_r L_r, L_r = the loss of level r at z_r = alpha_r x_r + sigma_r "
                      "eps_r",
             latex=r"L = \sum_r w_r L_r, \qquad L_r = \mathrm{loss}\bigl(\hat v_r, z_r, x_r, \epsilon_r\bigr) \text{ "
                   r"at } z_r = \alpha_r x_r + \sigma_r \epsilon_r",
             level=3),
    Exercise("7.4", "One network in another", "nested_unet.denoise", 6, 13, 60, "Matryoshka Diffusion 3.2, figure 3",
             "Take network, z and logsnr (lists, highest level first), condition (B, E) and perhaps text and f. "
             "Return ([v, ...] highest first, the last map of this level before its output layer). The outer network "
             "descends. in_adapter turns its coarsest map into f of the level below. out_adapter turns the last map "
             "of that level into what is added to the coarsest map. Then the outer network ascends and gives its "
             "output. Each level embeds its own log-SNR and adds the condition. In a mixed batch the level below has "
             "more rows: the first ones are ours, the others get f = 0 and send nothing back.",
             "The innermost network is not a NestedUNet; it has features(z, emb, text, f) and output(h). .outer has "
             "descend(z, emb, f=f) and ascend(h, skips, emb). .outer is None if the inner level is the only one.",
             "Both adapters start at zero. What does a freshly grown nested model predict at its lowest level? Which "
             "level's loss gives each adapter its first gradient?",
             equation="h, skips = descend(z_0), (v_1, ..., g) = denoise(inner, z_1, ..., f = in_adapter(h)), last = "
                      "ascend(h + out_adapter(g), skips), v_0 = output(last)",
             latex=r"(h, \mathrm{skips}) = \mathrm{descend}(z_0), \quad (v_{1\dots}, g) = "
                   r"\mathrm{denoise}(\mathrm{inner}, z_{1\dots}, f = A_\text{in}(h)), \quad v_0 = "
                   r"\mathrm{output}\bigl(\mathrm{ascend}(h + A_\text{out}(g), \mathrm{skips})\bigr)",
             level=3),
    # ---------------------------------------------------------------------------------- 8 cascade and distillation
    Exercise("8.1", "Conditioning augmentation", "cascade.augment", 5, 6, 40, "Cascaded Diffusion 3.1 and 3.2",
             "Take low_res (B, 3, h, w), s (B,), noise, the low-res schedule and draws (3, B) ~ U(0, 1). Return (the "
             "image that the model sees, the log-SNR that the model is told). Blur an example where draws[1] < "
             "aug_blur; its sigma moves linearly with draws[2] from one end of blur_range to the other. Then add "
             "noise of level s where draws[0] < aug_noise; where no noise is added, the level is +inf.",
             "blur_augment and gaussian_augment do the work; torch.where chooses for each example.",
             "Why is the noise added before up-sampling, and not after?",
             equation="z = alpha_s blur(low_res) + sigma_s noise",
             latex=r"z = \alpha_s\,\mathrm{blur}(x_\text{low}) + \sigma_s\,\epsilon",
             level=2),
    Exercise("8.2", "What a stage hands the next", "cascade.hand_over", 3, 6, 25, "Cascaded Diffusion 3.2, 3.3",
             "Take low_res, handoff (truncated, renoised or clean), s (a float in [0, 1], the same for all images), "
             "the schedule, which wants a tensor, and noise. Return (low_res for "
             "the next stage, its log-SNR (B,)). truncated: low_res already is z_s. renoised: add noise of level s. "
             "clean, or s = 0: low_res as it is, level +inf. Raise ValueError for any other word.",
             "The log-SNR that you report must be the log-SNR of the image.",
             "Truncated saves the last steps of the first stage. What does renoised save?",
             equation="truncated: (low_res, lambda(s)); renoised: (alpha_s low_res + sigma_s noise, lambda(s)); clean "
                      "or s = 0: (low_res, +inf)",
             latex=r"\text{truncated: } (x, \lambda_s); \quad \text{renoised: } (\alpha_s x + \sigma_s \epsilon, "
                   r"\lambda_s); \quad \text{clean, or } s = 0\text{: } (x, +\infty)",
             level=2),
    Exercise("8.3", "The target of one step", "distill.step_target", 3, 4, 30, "Salimans & Ho 2022",
             "Take z_t and z_s, shaped like images, and logsnr_t and logsnr_s (B,). Return the x with which ONE DDIM "
             "step leads from z_t to z_s. logsnr_s may be +inf: then alpha_s = 1 and sigma_s = 0, and x must be "
             "finite.",
             "Write the DDIM step with that x and solve for x, with r = sigma_s / sigma_t.",
             "What is the target where sigma_s = 0? What if both steps of the teacher had the same x_hat?",
             equation="z_s = alpha_s x + (sigma_s / sigma_t) (z_t - alpha_t x), solved for x",
             latex=r"z_s = \alpha_s x + \frac{\sigma_s}{\sigma_t} (z_t - \alpha_t x) \quad\text{solved for } x",
             level=2),
    Exercise("8.4", "Two steps in one", "distill.two_step_target", 5, 8, 45, "Salimans & Ho 2022, algorithm 2",
             "Take the teacher predict(z, logsnr) -> [v, ...], schedules and z as lists of levels, and t (B,) in "
             "{1..steps}/steps. The teacher walks by DDIM from t over t - 1/(2 steps) to t - 1/steps. Return [v, "
             "...], the student's targets at t.",
             "times = t, the middle, the end, never below 0. Then step_target, and v_from_x at t.",
             "Why is the teacher not clipped here, though the sampler is?",
             equation="z_t -> z_(t - 1/(2N)) -> z_(t - 1/N) by the teacher; one DDIM step of the student with x = "
                      "step_target leads from z_t to the same z_(t - 1/N)",
             latex=r"z_t \xrightarrow{\text{teacher}} z_{t - \frac{1}{2N}} \xrightarrow{\text{teacher}} z_{t - "
                   r"\frac1N}, \qquad z_t \xrightarrow{\text{student, one step}} z_{t - \frac1N}",
             level=3),
]


# In a copy of all chapters these come first. `check` finds the same by watching which functions an exam runs.
NEEDS = {
    "1.3": ("1.1",), "1.4": ("1.1", "1.3"),
    "2.1": ("1.2",), "2.2": ("1.2",), "2.3": ("1.2",), "2.4": ("1.2",), "2.5": ("1.2", "2.1", "2.2", "2.3", "2.6"),
    "3.3": ("3.1",), "3.4": ("3.1", "3.3"), "3.5": ("1.2",),
    "4.4": ("4.2", "4.3", "5.1"),
    "5.3": ("4.2", "4.3", "5.1", "5.2"),
    "6.1": ("1.2", "2.1"), "6.2": ("1.2",),
    "7.2": ("1.1", "1.3"), "7.3": ("1.1", "1.2", "2.1", "2.2", "2.3", "2.5"),
    "7.4": ("4.1", "4.2", "4.3", "4.4", "5.1"),
    "8.1": ("1.1", "1.2", "1.3", "2.1"), "8.2": ("1.1", "1.2", "1.3", "2.1"), "8.3": ("1.2",),
    "8.4": ("1.1", "1.2", "2.1", "6.1", "8.3"),
}


def numbered(number):
    """Return the exercise of this number."""
    return next(exercise for exercise in EXERCISES if exercise.number == number)


def chosen(chapters=None, folder=None):
    """Return the exercises of these chapters. Without: those that the folder's EXERCISES.md names, else all."""
    named = None
    if chapters is None and folder and os.path.exists(os.path.join(folder, "EXERCISES.md")):
        text = read(os.path.join(folder, "EXERCISES.md"))
        named = {line.split()[1] for line in text.splitlines() if line.startswith("### ") and len(line.split()) > 1}
    return [e for e in EXERCISES if (chapters is None or e.chapter in chapters) and (not named or e.number in named)]


def in_order(exercises):
    """Return the exercises in an order of work: each after those of them that it needs, else as they are."""
    left, ordered = list(exercises), []
    while left:
        numbers = {e.number for e in left}
        ordered.append(next(e for e in left if not numbers & {*e.needs}))
        left.remove(ordered[-1])
    return ordered
