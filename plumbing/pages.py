"""What the pages of the lecture share: counts of a network, and figures of images, of feature maps, of a nest."""
import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from plumbing.pictures import pyplot, save_figure, show_image


def millions(*modules):
    """Count the parameters of modules, in millions."""
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def gflops(function, *inputs):
    """Count the FLOPs of function(*inputs) in units of 10^9, a multiply-add as two. Device "meta" does for it."""
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops() / 1e9


def draw_panels(path, rows, titles=(), names=(), caption="", size=(1.25, 1.45), dpi=120, **options):
    """Draw rows of images (3, H, W) in [-1, 1]. titles: of the columns; names: of the rows; size: inches of a panel."""
    figure, axes = pyplot().subplots(len(rows), len(rows[0]), squeeze=False,
                                     figsize=(size[0] * len(rows[0]), size[1] * len(rows)))
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            show_image(axes[i, j], image, titles[j] if titles and i == 0 else "", **options)
        axes[i, 0].set_ylabel(names[i] if names else "", fontsize=9)
    if caption:
        figure.suptitle(caption, fontsize=10)
    save_figure(figure, path, dpi)


def draw_features(path, network, image):
    """Draw an image and the feature map after each level of a U-Net, down and up, as the RMS over its channels."""
    maps = []
    for level in (*network.down, *network.up):                            # after its last pair (block, attention)
        level[-1][1].register_forward_hook(lambda module, args, output: maps.append(output[0]))
    with torch.no_grad():
        network(image[None], torch.zeros(1), {})
    figure, axes = pyplot().subplots(1, 1 + len(maps), figsize=(2 * (1 + len(maps)), 2.3))
    show_image(axes[0], image, "image")
    for i, (axis, features) in enumerate(zip(axes[1:], maps)):
        axis.imshow(features.square().mean(0).sqrt().numpy(), cmap="magma")
        axis.set(xticks=[], yticks=[])
        way, (channels, height, width) = "down" if i < len(network.down) else "up", features.shape
        axis.set_title(f"{way} {height}x{width}x{channels}", fontsize=9)
    save_figure(figure, path, dpi=110)


def draw_nest(path, levels, title):
    """Draw the maps of a nest of U-Nets as boxes, one colour a level: down, inwards, and up again. Highest first."""
    plt, boxes = pyplot(), [(level, i, "down") for level in levels for i in range(len(level.widths))]
    boxes += [(level, i, "up") for level, i, _ in reversed(boxes)]
    figure, axis = plt.subplots(figsize=(11, 4))
    for x, (level, i, way) in enumerate(boxes):
        color, side = f"C{levels.index(level)}", level.first_map[0] >> i
        blocks = len(level.down[i] if way == "down" else level.up[-1 - i])
        height = 0.25 * math.log2(side)
        axis.add_patch(plt.Rectangle((x, -height / 2), 0.8, height, color=color, alpha=0.6))
        axis.text(x + 0.4, 0, f"{side}²\n{level.widths[i]}\n×{blocks}", ha="center", va="center", fontsize=8)
        if i == 0:                                                        # z goes in here, or v comes out
            (start, end), name = ((-2.0, -height / 2), "z") if way == "down" else ((-height / 2, -2.0), "v")
            axis.annotate("", (x + 0.4, end), (x + 0.4, start), arrowprops=dict(arrowstyle="->", color=color))
            axis.text(x + 0.4, -2.2, f"{name}, {level.size[0]} px", ha="center", fontsize=8, color=color)
        if x and boxes[x - 1][0] is not level:
            axis.plot([x - 0.1] * 2, [-1.5, 1.5], ":", color="grey")
            axis.text(x - 0.1, 1.6, "adapter\nfrom 0", ha="center", fontsize=8, color="grey")
    axis.set(xlim=(-0.4, len(boxes)), ylim=(-2.4, 2.2))
    axis.axis("off")
    axis.set_title(f"{title}: side of the maps, width, number of blocks; a level's skips stay inside it", fontsize=10)
    save_figure(figure, path)
