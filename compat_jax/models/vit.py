"""Vision transformers with pre-norm, class token and learned positions, DINOv2's among them.

Module names follow timm's state dicts (`blocks_0` for `blocks.0`), so that its weights are imported
by name.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from compat_jax.errors import UserError
from compat_jax.models.dense import TokenDense, attention_scores
from compat_jax.models.layers import Conv, layer_norm, linear_init
from compat_jax.models.rematerialize import block

_truncated = nn.initializers.truncated_normal(0.02)


def _dense(features, dtype, name):
    return TokenDense(features, dtype, kernel_init=_truncated, name=name)


class PatchEmbed(nn.Module):
    """Embed the patches of pictures as a sequence, row by row.

    Attributes:
      features: width of a token.
      patch: side of a patch in pixels.
      dtype: dtype of the computation; parameters are float32.

    Source: `PatchEmbed` of timm.
    """

    features: int
    patch: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map float[batch, h, w, 3] to float[batch, h * w / patch**2, features]."""
        project = Conv(
            self.features,
            self.patch,
            self.patch,
            use_bias=True,
            dtype=self.dtype,
            kernel_init=linear_init,
            name="proj",
        )
        x = project(images)
        return x.reshape(x.shape[0], -1, self.features)


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values.

    Attributes:
      heads: number of heads; divides the width of a token.
      dtype: dtype of the computation; parameters are float32.

    Source: Vaswani et al. 2017; the fused layout is timm's.
    """

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map float[batch, tokens, width] to the same shape."""
        batch, tokens, width = x.shape
        qkv = _dense(3 * width, self.dtype, "qkv")(x)
        query, key, value = jnp.moveaxis(
            qkv.reshape(batch, tokens, 3, self.heads, width // self.heads), 2, 0
        )
        scores = attention_scores(query, key)
        weights = nn.softmax(scores / math.sqrt(width // self.heads)).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return _dense(width, self.dtype, "proj")(mixed.reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers around an exact (not tanh) GELU.

    Attributes:
      hidden: width between the layers.
      dtype: dtype of the computation; parameters are float32.
    """

    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map float[batch, tokens, width] to the same shape."""
        hidden = nn.gelu(_dense(self.hidden, self.dtype, "fc1")(x), approximate=False)
        return _dense(x.shape[-1], self.dtype, "fc2")(hidden)


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch.

    Attributes:
      initial: value of the factors at first.
      dtype: dtype of the computation; parameters are float32.

    Source: Touvron et al., "Going deeper with image transformers", ICCV 2021.
    """

    initial: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map float[..., width] to the same shape."""
        gamma = self.param("gamma", nn.initializers.constant(self.initial), (x.shape[-1],))
        return x * gamma.astype(self.dtype)


class Block(nn.Module):
    """Residual attention and residual MLP, each after a norm.

    Attributes:
      heads: number of attention heads.
      dtype: dtype of the computation; parameters are float32.
      layer_scale: first value of the factors on both branches; None for branches without.
    """

    heads: int
    dtype: DTypeLike = jnp.float32
    layer_scale: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map float[batch, tokens, width] to the same shape."""
        attention = Attention(self.heads, self.dtype, name="attn")
        x = x + self._scaled(attention(layer_norm(x, self.dtype, "norm1")), "ls1")
        mlp = Mlp(4 * x.shape[-1], self.dtype, name="mlp")
        return x + self._scaled(mlp(layer_norm(x, self.dtype, "norm2")), "ls2")

    def _scaled(self, branch, name):
        if self.layer_scale is None:
            return branch
        return LayerScale(self.layer_scale, self.dtype, name=name)(branch)


class VisionTransformer(nn.Module):
    """Vision transformer without its classifier, from images to the normalised class token.

    Attributes:
      width: width of a token, which is the number of features.
      depth: number of blocks.
      heads: number of attention heads; divides `width`.
      patch: side of a patch in pixels.
      image_size: side of a picture in pixels, a multiple of `patch`.
      dtype: dtype of the computation; parameters are float32.
      registers: tokens that only give the attention room, between class token and patches; with any,
        the class token has no position.
      layer_scale: first value of the factors on the residual branches; None for branches without.

    Source: Dosovitskiy et al. 2021, with timm's layer-norm epsilon of 1e-6; registers from Darcet et
    al., "Vision transformers need registers", ICLR 2024, laid out as in timm.
    """

    width: int
    depth: int
    heads: int
    patch: int = 16
    image_size: int = 224
    dtype: DTypeLike = jnp.float32
    registers: int = 0
    layer_scale: float | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map float[batch, image_size, image_size, 3] to float[batch, width]."""
        del train  # no layer behaves differently in training
        _, height, width, _ = images.shape
        if (height, width) != (self.image_size, self.image_size):
            raise UserError(
                f"the ViT was made for pictures of {self.image_size}x{self.image_size} pixels, got "
                f"{height}x{width}: resize them, or set its image_size (and use weights that fit)",
                "image_size",
            )
        x = PatchEmbed(self.width, self.patch, self.dtype, name="patch_embed")(images)
        x = self._with_tokens(x)
        for index in range(self.depth):
            kind = block(Block)
            x = kind(self.heads, self.dtype, self.layer_scale, name=f"blocks_{index}")(x)
        return layer_norm(x[:, 0], self.dtype, "norm")

    def _with_tokens(self, patches):
        """Put the class token and the registers before the patches, and add the positions."""

        def token(name, count):
            rows = self.param(name, nn.initializers.normal(1e-6), (1, count, self.width))
            return jnp.broadcast_to(rows.astype(self.dtype), (len(patches), count, self.width))

        cls = token("cls_token", 1)
        count = patches.shape[1] + (0 if self.registers else 1)
        positions = self.param("pos_embed", _truncated, (1, count, self.width)).astype(self.dtype)
        if not self.registers:
            return jnp.concatenate([cls, patches], axis=1) + positions
        registers = token("reg_token", self.registers)
        return jnp.concatenate([cls, registers, patches + positions], axis=1)


def vit(
    width: int,
    heads: int,
    depth: int,
    dtype: DTypeLike = jnp.float32,
    *,
    patch: int = 16,
    image_size: int = 224,
) -> VisionTransformer:
    """Build a ViT; the registered ones bind its width, heads and depth.

    Args:
      width: number of features.
      heads: number of attention heads; divides `width`.
      depth: number of blocks.
      dtype: dtype of the computation; parameters are float32.
      patch: side of a patch in pixels.
      image_size: side of a picture in pixels, a multiple of `patch`.

    Raises:
      UserError: `image_size` is no multiple of `patch`.
    """
    _check_patches(image_size, patch)
    return VisionTransformer(width, depth, heads, patch=patch, image_size=image_size, dtype=dtype)


def dinov2(
    width: int,
    heads: int,
    depth: int,
    dtype: DTypeLike = jnp.float32,
    *,
    registers: int = 0,
    image_size: int = 224,
) -> VisionTransformer:
    """Build a ViT of DINOv2, with patches of 14 pixels; the registered ones bind width, heads, depth.

    Args:
      width, heads, depth, dtype: see `vit`.
      registers: 0, or 4 for the variant with register tokens.
      image_size: side of a picture in pixels, a multiple of 14; the published weights have 518.

    Raises:
      UserError: `image_size` is no multiple of 14, or another number of registers.

    Source: Oquab et al., "DINOv2: learning robust visual features without supervision", 2024.
    """
    if registers not in (0, 4):
        raise UserError(f"DINOv2 has 0 or 4 registers, got registers={registers}", "registers")
    _check_patches(image_size, 14)
    return VisionTransformer(
        width,
        depth,
        heads,
        patch=14,
        image_size=image_size,
        registers=registers,
        layer_scale=1e-5,
        dtype=dtype,
    )


def _check_patches(image_size, patch):
    if patch < 1 or image_size < 1 or image_size % patch:
        raise UserError(
            f"a ViT cuts its pictures into whole patches: image_size={image_size} is no multiple "
            f"of patch={patch}",
            "image_size",
        )


# By name: what is left of the signature are the arguments of the backbone.
VITS = {
    "vit_ti16": functools.partial(vit, 192, 3, 12),
    "vit_s16": functools.partial(vit, 384, 6, 12),
    "vit_b16": functools.partial(vit, 768, 12, 12),
    "vit_l16": functools.partial(vit, 1024, 16, 24),
    "dinov2_s14": functools.partial(dinov2, 384, 6, 12),
    "dinov2_b14": functools.partial(dinov2, 768, 12, 12),
    "dinov2_l14": functools.partial(dinov2, 1024, 16, 24),
}
