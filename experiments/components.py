"""How good pictures can be with so many latents: what is left of them by the first k principal components of 16 x 16 blocks.

    python experiments/components.py TRAIN PICTURES

TRAIN and PICTURES are folders or glob patterns. An octave model with M latents and alpha 0.5 has 0.625 M numbers for each block of 16 x 16
pixels (768 samples), and 2.5 N in the layer before. Overlapping, nonlinear transforms can do better than blocks, but not by much.
"""

import sys

import numpy as np

from goconv_tf import data

SIDE = 16
COUNTS = (40, 80, 120, 160, 200, 240, 280)


def blocks(picture):
    """uint8 [h, w, 3] -> float64 [n, 768]."""
    height, width = (n // SIDE * SIDE for n in picture.shape[:2])
    cells = picture[:height, :width].reshape(height // SIDE, SIDE, width // SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4)
    return cells.reshape(-1, 3 * SIDE**2).astype(np.float64)


def main(train, pictures):
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(blocks(data.read_rgb(path)))[:40] for path in data.find_pictures([train])[::4]]
    chosen = np.concatenate(chosen)
    mean = chosen.mean(axis=0)
    vectors = np.linalg.eigh(np.cov(chosen.T))[1][:, ::-1]
    squares = [np.square((blocks(data.read_rgb(path)) - mean) @ vectors) for path in data.find_pictures([pictures])]
    print("| numbers a block | M | PSNR, dB |\n|---|---|---|")
    for count in COUNTS:
        left = [s[:, count:].sum() / s.size for s in squares]
        print(f"| {count} | {count / 0.625:.0f} | {np.mean(10 * np.log10(255**2 / np.array(left))):.2f} |")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    main(*sys.argv[1:])
