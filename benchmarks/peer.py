"""The environment of ``--peer``, and empty modules in place of requirements of DALLE-pytorch 1.6.6 that are gone.

    python -m venv peer
    peer/bin/pip install "torch>=2.11,<2.14" einops ftfy regex tokenizers transformers webdataset pillow requests
    peer/bin/pip install --no-deps dalle-pytorch==1.6.6 axial-positional-embedding rotary-embedding-torch DALL-E
    peer/bin/pip install --no-deps min-dalle==0.4.11 emoji

Every ``--peer`` is its interpreter, ``peer/bin/python``. The third line is for ``sampling.py`` and ``training.py``, the
last one for ``min_dalle.py``, which does not need this module.

youtokentome, taming-transformers and pkg_resources cannot be had any more, torchvision and omegaconf are not needed to
build, train or sample its DALLE. ``build`` makes one.
"""

import sys
import types

STUBS = (
    "omegaconf taming taming.models taming.models.vqgan youtokentome pkg_resources torchvision torchvision.transforms "
    "torchvision.transforms.functional"
)
for name in STUBS.split():
    sys.modules[name] = types.ModuleType(name)
sys.modules["omegaconf"].OmegaConf = object
sys.modules["taming.models.vqgan"].VQModel = sys.modules["taming.models.vqgan"].GumbelVQ = object
sys.modules["pkg_resources"].get_distribution = lambda name: types.SimpleNamespace(version="1.6.6")
sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
sys.modules["torchvision.transforms"].functional = sys.modules["torchvision.transforms.functional"]

from dalle_pytorch import DALLE, DiscreteVAE  # noqa: E402  (after what it would import is there)


def build(sizes, **more):
    """Its DALLE, over a small VAE of the same grid and codebook."""
    vae = DiscreteVAE(
        image_size=8 * sizes["grid"], num_layers=3, num_tokens=sizes["codebook"], codebook_dim=64, hidden_dim=16
    )
    return DALLE(
        dim=sizes["dim"], vae=vae, num_text_tokens=sizes["vocabulary"], text_seq_len=sizes["text"],
        depth=sizes["depth"], heads=sizes["heads"], dim_head=sizes["head_dim"], **more,
    )  # fmt: skip
