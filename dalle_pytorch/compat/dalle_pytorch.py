"""The public models: ours, and callable the way DALLE-pytorch's users call them.

Two surfaces keep working, that of the first README (version 0.0.22: ``return_recon_loss``, ``mask``) and that of 1.6.6.
Their names are translated here and nowhere else; each class also takes one of our configs as its first argument.

What differs from DALLE-pytorch, because it is a defect there:
- pictures come back in the range they went in, [0, 1], not normalised;
- ``kl_div_loss_weight`` is the paper's beta and does not depend on the batch size;
- ``filter_thres`` drops a share of the image vocabulary only;
- no call changes its inputs; evaluation mode adds no Gumbel noise; the key/value cache is always on;
- prompts longer than ``text_seq_len`` are refused, not cut;
- images that are no floats in [0, 1] (bytes, 0 to 255) are refused, not converted.

What differs by design:
- ``num_image_tokens`` is the number of image tokens, ``codebook_size`` that of codes;
- ``attn_types`` has no "sparse" (1.6.6 cannot run it) and no "mlp";
- without ``return_loss`` a DALLE gives (text logits, image logits), not one tensor over both vocabularies;
- the text loss ends at the first pad, since later pads are certain;
- patterns default to the paper's definitions (``attn_semantics="dalle_pytorch"`` brings the others back);
- CLIP does not read id 0 unless ``text_mask`` says so, its scale starts at 1 / 0.07, its heads are dim / heads wide.

``OpenAIDiscreteVAE`` and ``VQGanVAE`` are in pretrained_vaes.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.captions import draw_texts
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.sampling import SamplingConfig, guide
from dalle_pytorch.generation.strategies import generate_image_tokens
from dalle_pytorch.models import clip as _clip
from dalle_pytorch.models import dalle as _dalle
from dalle_pytorch.models import discrete_vae as _discrete_vae
from dalle_pytorch.models.checks import check_ids
from dalle_pytorch.models.clip import CLIPConfig
from dalle_pytorch.models.dalle import DALLEConfig, DALLELogits
from dalle_pytorch.models.discrete_vae import DiscreteVAEConfig
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.patterns import PATTERNS
from dalle_pytorch.models.transformer import ForeignConfig
from dalle_pytorch.text import TextTokenizer

NOT_HERE = {
    "sparse": "DeepSpeed's block-sparse attention, which DALLE-pytorch 1.6.6 itself cannot run",
    "mlp": "a gMLP in place of attention",
}
"""Its attn_types that are not computed here."""


class DiscreteVAE(_discrete_vae.DiscreteVAE):
    """The DiscreteVAE, from a config or from DALLE-pytorch's keywords.

    Args:
        config: ours; the keywords must then be left alone. A number is the image_size.
        image_size: side of the square picture in pixels.
        num_tokens: codebook size.
        codebook_dim: width of a code.
        num_layers: halvings of the resolution.
        num_resnet_blocks: residual blocks at the bottleneck.
        hidden_dim: channels of the convolutions.
        channels: picture channels.
        smooth_l1_loss: smooth L1 in place of the squared error.
        temperature: Gumbel tau of a call that does not give ``temp``.
        straight_through: hard codes forward.
        reinmax: second-order gradient; needs straight_through.
        kl_div_loss_weight: the paper's beta.
        normalization: (means, stds), each at least ``channels`` long, or None for none.
    """

    def __init__(
        self,
        config: DiscreteVAEConfig | int | None = None,
        *,
        image_size: int = 256,
        num_tokens: int = 512,
        codebook_dim: int = 512,
        num_layers: int = 3,
        num_resnet_blocks: int = 0,
        hidden_dim: int = 64,
        channels: int = 3,
        smooth_l1_loss: bool = False,
        temperature: float = 0.9,
        straight_through: bool = False,
        reinmax: bool = False,
        kl_div_loss_weight: float = 0.0,
        normalization: tuple[Sequence[float], Sequence[float]] | None = ((0.5,) * 4, (0.5,) * 4),
    ) -> None:
        if isinstance(config, int):  # DALLE-pytorch's first positional argument
            image_size, config = config, None
        if config is None:
            mean, std = normalization or ((0.0,), (1.0,))
            config = DiscreteVAEConfig(
                image_size=image_size,
                num_layers=num_layers,
                codebook_size=num_tokens,
                codebook_dim=codebook_dim,
                hidden_dim=hidden_dim,
                num_resnet_blocks=num_resnet_blocks,
                channels=channels,
                likelihood="smooth_l1" if smooth_l1_loss else "mse",
                straight_through=straight_through,
                reinmax=reinmax,
                mean=list(mean)[:channels],
                std=list(std)[:channels],
                gumbel_tau=temperature,
                kl_weight=kl_div_loss_weight,
            )
        super().__init__(config)

    @property
    def num_tokens(self) -> int:
        """Codebook size."""
        return self.config.codebook_size

    @property
    def num_layers(self) -> int:
        """Halvings of the resolution."""
        return self.config.num_layers

    @property
    def temperature(self) -> float:
        """Gumbel tau of a call that does not give ``temp``."""
        return self.config.gumbel_tau

    @property
    def kl_div_loss_weight(self) -> float:
        """The paper's beta."""
        return self.config.kl_weight

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of every module; weights under DALLE-pytorch's names are refused with the way to read them.

        Raises:
            UserError: they are DALLE-pytorch's.
        """
        refuse_foreign(state_dict, "encoder.0.0.weight")
        return super().load_state_dict(state_dict, *args, **kwargs)

    def norm(self, images: Tensor) -> Tensor:
        """Pictures as the encoder reads them, [b, c, H, W]."""
        return (images - self.mean) / self.std

    def get_codebook_indices(self, images: Tensor) -> Tensor:
        """Image tokens [b, n] of pictures [b, c, H, W] in [0, 1]."""
        return self.encode(images)

    def forward(
        self,
        img: Tensor,
        return_loss: bool = False,
        return_recons: bool = False,
        return_logits: bool = False,
        temp: float | None = None,
        return_recon_loss: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Reconstruct, or one of DALLE-pytorch's other results.

        Args:
            img: pictures [b, c, H, W].
            return_loss: the whole loss.
            return_recons: with return_loss, (loss, reconstructions).
            return_logits: code logits [b, num_tokens, h, w].
            temp: Gumbel tau; None = ``temperature``.
            return_recon_loss: the reconstruction term alone (version 0.0.22).

        Returns:
            Reconstructions [b, c, H, W] in [0, 1] unless a flag asks otherwise; in evaluation mode from hard codes.
        """
        if return_logits:
            return self.encode_logits(img)
        tau = self.temperature if temp is None else temp
        if return_loss or return_recon_loss:
            result = self.loss(img, gumbel_tau=tau, kl_weight=self.config.kl_weight)
            loss = result.loss if return_loss else result.reconstruction
            return (loss, result.reconstructions) if return_recons else loss
        if not self.training:
            return self.decode(self.encode(img))
        return self.to_pixels(self.relaxed(img, tau)[1])


class CLIP(_clip.CLIP):
    """The CLIP, from a config or from DALLE-pytorch's keywords.

    Args:
        config: ours; the keywords must then be left alone.
        dim_text: width of the text tower.
        dim_image: width of the image tower.
        dim_latent: width of the features.
        num_text_tokens: text vocabulary, 0 = padding.
        text_enc_depth: blocks of the text tower.
        text_seq_len: longest text.
        text_heads: heads of the text tower.
        num_visual_tokens: accepted and without effect, as in DALLE-pytorch.
        visual_enc_depth: blocks of the image tower.
        visual_heads: heads of the image tower.
        visual_image_size: side of the square picture.
        visual_patch_size: side of a patch.
        channels: picture channels.
    """

    def __init__(
        self,
        config: CLIPConfig | None = None,
        *,
        dim_text: int = 512,
        dim_image: int = 512,
        dim_latent: int = 512,
        num_text_tokens: int = 10_000,
        text_enc_depth: int = 6,
        text_seq_len: int = 256,
        text_heads: int = 8,
        num_visual_tokens: int = 512,
        visual_enc_depth: int = 6,
        visual_heads: int = 8,
        visual_image_size: int = 256,
        visual_patch_size: int = 32,
        channels: int = 3,
    ) -> None:
        super().__init__(
            config
            or CLIPConfig(
                dim_text=dim_text,
                dim_image=dim_image,
                dim_latent=dim_latent,
                text_vocab_size=num_text_tokens,
                text_len=text_seq_len,
                text_enc_depth=text_enc_depth,
                text_heads=text_heads,
                visual_enc_depth=visual_enc_depth,
                visual_heads=visual_heads,
                image_size=visual_image_size,
                patch_size=visual_patch_size,
                channels=channels,
            )
        )

    def forward(
        self, text: Tensor, image: Tensor, text_mask: Tensor | None = None, return_loss: bool = False
    ) -> Tensor:
        """Scaled similarity of each pair [b], or the contrastive loss.

        Args:
            text: text tokens [b, t].
            image: pictures [b, c, H, W] in [0, 1].
            text_mask: True = read [b, t]; None = all but the padding.
            return_loss: the loss in place of the similarities.
        """
        if return_loss:
            return self.loss(text, image, text_mask).loss
        return self.logit_scale * (self.encode_text(text, text_mask) * self.encode_image(image)).sum(dim=-1)


class DALLE(_dalle.DALLE):
    """The DALLE, from a config or from DALLE-pytorch's keywords.

    Args:
        config: ours; the keywords below ``vae`` must then be left alone.
        vae: image tokenizer.
        dim: model width.
        depth: blocks.
        num_text_tokens: text vocabulary, 0 = padding.
        text_seq_len: text positions.
        heads: attention heads.
        dim_head: width of a head.
        reversible: reversible layers; activations are recomputed in the backward pass by checkpointing, which keeps one
            tensor a block and is exact.
        attn_dropout: on the outputs of attention.
        ff_dropout: inside the feed-forward.
        sparse_attn: accepted and without effect, as in DALLE-pytorch; patterns are chosen with attn_types.
        attn_types: pattern or patterns, cycled over the depth; None = full.
        attn_semantics: "paper" or "dalle_pytorch".
        conv_kernel: side of the convolutional pattern; None = 11 (paper) or 5 (dalle_pytorch).
        loss_img_weight: image loss over text loss.
        stable: scores kept small before the softmax.
        sandwich_norm: a second norm after each sublayer.
        shift_tokens: feed sublayers channels of neighbouring tokens.
        rotary_emb: rotary in place of learned positions.
        shared_attn_ids: layers with the same id share attention weights.
        shared_ff_ids: layers with the same id share feed-forward weights.
        share_input_output_emb: input embeddings as output heads.
        optimize_for_inference: accepted and without effect: every pattern is always cached.

    Raises:
        ValueError: no vae, or a pattern that does not exist ("sparse" could not run in DALLE-pytorch either).
    """

    _laid_out: tuple[object, Decoder] | None = None

    def __init__(
        self,
        config: DALLEConfig | None = None,
        *,
        vae: nn.Module,
        dim: int = 512,
        depth: int = 6,
        num_text_tokens: int = 10_000,
        text_seq_len: int = 256,
        heads: int = 8,
        dim_head: int = 64,
        reversible: bool = False,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        sparse_attn: bool = False,
        attn_types: Sequence[str] | str | None = None,
        attn_semantics: str = "paper",
        conv_kernel: int | None = None,
        loss_img_weight: float = 7.0,
        stable: bool = False,
        sandwich_norm: bool = False,
        shift_tokens: bool = True,
        rotary_emb: bool = True,
        shared_attn_ids: Sequence[int] | None = None,
        shared_ff_ids: Sequence[int] | None = None,
        share_input_output_emb: bool = False,
        optimize_for_inference: bool = False,
    ) -> None:
        if config is None:
            patterns = [attn_types] if isinstance(attn_types, str) else list(attn_types or ["full"])
            if left := [pattern for pattern in patterns if pattern in NOT_HERE]:
                raise UserError(f"attn_types has {left[0]}, {NOT_HERE[left[0]]}; there are {', '.join(PATTERNS)}")
            config = DALLEConfig(
                dim=dim,
                depth=depth,
                heads=heads,
                head_dim=dim_head,
                attn_dropout=attn_dropout,
                ff_dropout=ff_dropout,
                sandwich_norm=sandwich_norm,
                stable=stable,
                shared_attn_ids=None if shared_attn_ids is None else list(shared_attn_ids),
                shared_ff_ids=None if shared_ff_ids is None else list(shared_ff_ids),
                checkpoint_activations=reversible,
                text_vocab_size=num_text_tokens,
                text_len=text_seq_len,
                attn_types=patterns,
                conv_kernel=conv_kernel or (11 if attn_semantics == "paper" else 5),
                positions="rotary" if rotary_emb else "learned",
                shift_tokens=shift_tokens,
                loss_img_weight=loss_img_weight,
                tie_embeddings=share_input_output_emb,
                foreign=ForeignConfig(reversible=reversible, attn_semantics=attn_semantics),
            )
        super().__init__(config, vae)

    @property
    def text_seq_len(self) -> int:
        """Text positions."""
        return self.config.text_len

    @property
    def image_seq_len(self) -> int:
        """Image tokens of an image; here ``num_image_tokens`` says it, the codebook's size in DALLE-pytorch."""
        return self.num_image_tokens

    @property
    def total_seq_len(self) -> int:
        """Text positions and image tokens."""
        return self.text_seq_len + self.image_seq_len

    @property
    def num_text_tokens(self) -> int:
        """Text ids, those that fill short captions included."""
        return self.text_emb.num_embeddings

    @property
    def total_tokens(self) -> int:
        """Text ids and image ids."""
        return self.num_text_tokens + self.codebook_size

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of every module; weights under DALLE-pytorch's names are refused with the way to read them.

        Raises:
            UserError: they are DALLE-pytorch's.
        """
        refuse_foreign(state_dict, "to_logits.1.weight")
        return super().load_state_dict(state_dict, *args, **kwargs)

    def forward(
        self,
        text: Tensor,
        image: Tensor | None = None,
        mask: Tensor | bool | None = None,
        return_loss: bool = False,
        null_cond_prob: float = 0.0,
    ) -> Tensor | DALLELogits:
        """Loss or logits of captioned pictures; the inputs are not changed.

        Args:
            text: text tokens [b, t], at most text_seq_len of them, 0 = padding.
            image: pictures [b, c, H, W] or image tokens [b, n]; None = logits of the first image token.
            mask: True = text to read [b, t] (version 0.0.22); the rest counts as padding. A bool in this place is
                ``return_loss``, which stands third in 1.6.6.
            return_loss: the weighted loss; otherwise the logits of text and image.
            null_cond_prob: share of captions replaced by the empty one in this call.

        Raises:
            ValueError: return_loss without an image, or shapes that do not fit.
        """
        if isinstance(mask, bool):
            return_loss, mask = mask, None
        text = apply_mask(check_text(text), mask)
        if null_cond_prob:
            dropped = torch.rand(len(text), 1, device=text.device) < null_cond_prob
            text = torch.where(dropped, 0, text)
        if image is None:
            if return_loss:
                raise UserError("return_loss=True needs an image to predict")
            image_tokens = text.new_empty(len(text), 0)
        else:
            image_tokens = self.vae.encode(image) if image.ndim == 4 else image
        if return_loss:
            return self.loss(text, image_tokens).loss
        return self.logits(text, image_tokens)

    @torch.no_grad()
    def generate_images(
        self,
        text: Tensor | str | Sequence[str],
        *,
        mask: Tensor | None = None,
        clip: _clip.CLIP | None = None,
        filter_thres: float = 0.5,
        temperature: float = 1.0,
        img: Tensor | None = None,
        num_init_img_tokens: int | None = None,
        cond_scale: float = 1.0,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One picture a caption, with its score where a CLIP is given.

        The first call lays the weights out for sampling. In evaluation mode the next ones find them so, until a weight
        changes.

        Args:
            text: text tokens [b, t], at most text_seq_len of them; or prompts, which the model's tokenizer reads.
            mask: True = text to read [b, t].
            clip: scores the pictures.
            filter_thres: share of the image vocabulary that is never drawn.
            temperature: divides the logits.
            img: pictures [b, c, H, W] whose first tokens are kept.
            num_init_img_tokens: how many of them; None = 7/16 of the picture, OpenAI's 14 of 32 rows.
            cond_scale: guidance.
            use_cache: accepted and without effect: the cache is exact and always on.
            generator: source of randomness; None = torch's global one.
            precision: arithmetic, see ``Generator``; DALLE-pytorch has fp32 only.
            compiled: translate a step with ``torch.compile``, see ``Generator``.

        Returns:
            Pictures [b, c, H, W] in [0, 1], or (pictures, scores [b]).

        Raises:
            ValueError: settings out of range, ids or shapes that do not fit, or prompts without a tokenizer.
        """
        text = apply_mask(check_text(self.tokenized(text)), mask)
        if not len(text):
            raise UserError("text holds no captions")
        check_ids(text, self.config.text_vocab_size, "text")
        if img is not None and len(img) != len(text):
            raise UserError(f"{len(img)} images given as img for {len(text)} captions: give one for each")
        given = None
        if img is not None:
            keep = int(0.4375 * self.num_image_tokens) if num_init_img_tokens is None else num_init_img_tokens
            if not 0 <= keep < self.num_image_tokens:
                raise UserError(f"num_init_img_tokens must lie in 0 to {self.num_image_tokens - 1}, got {keep}")
            given = self.vae.encode(img)[:, :keep]
        sampling = SamplingConfig(
            temperature=temperature,
            top_k=top_k_of_filter_thres(filter_thres, self.codebook_size),
            cfg_scale=cond_scale,
        )
        source = "cpu" if generator is None else generator.device
        uniforms = torch.rand(len(text), self.num_image_tokens, generator=generator, device=source)
        tokens = generate_image_tokens(self.laid_out(precision, compiled), text, uniforms, sampling, given_tokens=given)
        images = self.vae.decode(tokens)
        if clip is None:
            return images
        with eval_mode(clip):
            features = clip.encode_text(text, mask), clip.encode_image(images)
        return images, clip.logit_scale * F.cosine_similarity(*features)

    def laid_out(self, precision: str, compiled: bool) -> Decoder:
        """This model for sampling; kept in evaluation mode as long as its weights and arguments are the same."""
        weights = [*self.transformer.parameters(), *self.image_head.parameters()]
        numbers = [part.float() for weight in weights for part in (weight.sum(), weight.square().sum())]
        state = precision, compiled, str(weights[0].device), torch.stack(numbers).tolist()
        if self._laid_out is not None and self._laid_out[0] == state and not self.training:
            return self._laid_out[1]
        self._laid_out = None  # its memory is free before the next one takes some
        decoder = Decoder(self, precision=precision, compiled=compiled)
        self._laid_out = None if self.training else (state, decoder)
        return decoder

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are without what is laid out."""
        return {**super().__getstate__(), "_laid_out": None}

    def tokenized(self, text: Tensor | str | Sequence[str]) -> Tensor:
        """Text tokens of prompts; tokens as they are.

        Raises:
            UserError: prompts, and the model carries no tokenizer.
        """
        if isinstance(text, Tensor):
            return text
        if self.text_tokenizer is None:
            raise UserError("this dalle carries no tokenizer, so it reads no prompts: give text tokens [b, t]")
        return self.text_tokenizer.tokenize(text, self.config.text_len).to(self.image_emb.weight.device)

    @torch.no_grad()
    def forward_with_cond_scale(
        self, text: Tensor, image: Tensor | None = None, *, cond_scale: float = 1.0
    ) -> DALLELogits:
        """Logits of captioned pictures under guidance.

        Args:
            text: text tokens [b, t].
            image: pictures [b, c, H, W] or image tokens [b, n]; None = logits of the first image token.
            cond_scale: guidance; 1 = off.
        """
        cond = self(text, image)
        if cond_scale == 1:
            return cond
        uncond = self(torch.zeros_like(text), image)
        return DALLELogits(*(guide(with_, without, cond_scale) for with_, without in zip(cond, uncond, strict=True)))

    def generate_texts(
        self,
        tokenizer: TextTokenizer | None = None,
        text: str | None = None,
        *,
        filter_thres: float = 0.5,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, list[str]]:
        """A caption that the model finds likely, from the start or as a prompt goes on.

        Args:
            tokenizer: turns text into tokens and back; None = the model's own.
            text: how the caption begins.
            filter_thres: share of the text vocabulary that is never drawn.
            temperature: divides the logits.
            generator: source of randomness; None = torch's global one.

        Returns:
            Text tokens [1, t], 0 = padding, and the caption in a list.

        Raises:
            ValueError: no tokenizer, or settings out of range.
        """
        tokenizer = tokenizer or self.text_tokenizer
        if tokenizer is None:
            raise UserError("generate_texts needs a tokenizer: this dalle carries none")
        device = self.image_emb.weight.device
        start = torch.tensor([tokenizer.encode(text or "")], dtype=torch.long, device=device).view(1, -1)
        source = "cpu" if generator is None else generator.device
        uniforms = torch.rand(1, self.config.text_len, generator=generator, device=source).to(device)
        sampling = SamplingConfig(
            temperature=temperature, top_k=top_k_of_filter_thres(filter_thres, self.config.text_vocab_size)
        )
        tokens = draw_texts(self, start, uniforms, sampling)
        return tokens, [tokenizer.decode([token for token in tokens[0].tolist() if token])]


def check_text(text: Tensor) -> Tensor:
    """The text tokens, once they are seen to be whole numbers in rows.

    Raises:
        UserError: of another type or shape; names it.
    """
    if text.is_floating_point() or text.is_complex() or text.ndim != 2:
        raise UserError(f"text tokens must be whole numbers [b, t], got {text.dtype} of shape {tuple(text.shape)}")
    return text


def refuse_foreign(state: Mapping[str, Any], name: str) -> None:
    """Refuse the weights of DALLE-pytorch, which other layers hold than ours.

    Raises:
        UserError: ``name``, which only they have, is among them.
    """
    if name in state:
        raise UserError(
            'these are weights of DALLE-pytorch, whose layers have other names: dalle_pytorch.load("dalle.pt") reads '
            "the file that its scripts write, a vae.pt too"
        )


def apply_mask(text: Tensor, mask: Tensor | None) -> Tensor:
    """Text tokens [b, t] with every position outside the mask turned into padding; a copy.

    Raises:
        ValueError: shapes differ.
    """
    if mask is None:
        return text
    if mask.shape != text.shape:
        raise UserError(f"mask of shape {tuple(mask.shape)} given for text of shape {tuple(text.shape)}")
    return torch.where(mask, text, 0)


def top_k_of_filter_thres(filter_thres: float, codebook_size: int) -> int:
    """DALLE-pytorch's ``filter_thres`` as a top_k: the share of tokens to drop, here of the image vocabulary.

    (DALLE-pytorch takes the share of text and image vocabulary together, so that its default drops nothing.)

    Raises:
        ValueError: filter_thres is not in [0, 1].
    """
    if not 0 <= filter_thres <= 1:
        raise UserError(f"filter_thres is the share of tokens to drop, in [0, 1]; got {filter_thres}")
    return max(int(round((1 - filter_thres) * codebook_size, 6)), 1)  # rounded: 1 - 0.9 is a little less than 0.1
