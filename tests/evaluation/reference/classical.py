"""What scikit-image and scipy say of fixed pictures and features; their numbers stand in tests/evaluation.

``pip install --target PEERS scikit-image==0.26.0`` brings scipy 1.17.1; then
``PYTHONPATH=PEERS python tests/evaluation/reference/classical.py``.
"""

import numpy as np


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """An original of 48 x 40 and a worse copy, height width channels, in [0, 1], without random numbers."""
    y, x, c = np.meshgrid(np.arange(48), np.arange(40), np.arange(3), indexing="ij")
    original = 0.5 + 0.4 * np.sin(0.3 * x + 0.5 * c) * np.cos(0.2 * y - 0.7 * c)
    worse = np.clip(0.9 * original + 0.08 * np.sin(1.7 * x * (c + 1)) * np.cos(1.3 * y) + 0.03, 0, 1)
    return original, worse


def features() -> tuple[np.ndarray, np.ndarray]:
    """60 and 50 rows of 6 numbers, without random ones."""
    i, j = np.meshgrid(np.arange(60), np.arange(6), indexing="ij")
    real = np.sin(1.3 * i * (j + 1) + j) + 0.1 * np.cos(2.1 * i)
    i, j = i[:50], j[:50]
    return real, 1.2 * np.cos(0.7 * i * (j + 2)) + 0.05 * j + 0.2 * np.sin(3.3 * i)


def main() -> None:
    """Print the numbers."""
    from scipy.linalg import sqrtm
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    original, worse = pictures()
    print("psnr", repr(float(peak_signal_noise_ratio(original, worse, data_range=1))))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    print("ssim", repr(float(structural_similarity(original, worse, channel_axis=2, **options))))
    real, generated = features()
    s1, s2 = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    shift = real.mean(axis=0) - generated.mean(axis=0)
    print("fid", repr(float(shift @ shift + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real))))


if __name__ == "__main__":
    main()
