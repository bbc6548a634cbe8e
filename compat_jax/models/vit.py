"""Vision transformers with pre-norm, class token and learned positions.

Module names follow timm's state dicts (`blocks_0` for `blocks.0`), so that its weights are imported
by name.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from compat_jax.errors import UserError
from compat_jax.models.layers import Conv, linear_init

_truncated = nn.initializers.truncated_normal(0.02)


def _dense(features, dtype, name):
    return nn.Dense(features, dtype=dtype, kernel_init=_truncated, name=name)


def _norm(x, dtype, name):
    # In float32 and with the two-pass variance, as in PyTorch: the one-pass form loses precision.
    norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)
    return norm(x.astype(jnp.float32)).astype(dtype)


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
        wide = np.promote_types(query.dtype, np.float32)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide)
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


class Block(nn.Module):
    """Residual attention and residual MLP, each after a norm.

    Attributes:
      heads: number of attention heads.
      dtype: dtype of the computation; parameters are float32.
    """

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map float[batch, tokens, width] to the same shape."""
        x = x + Attention(self.heads, self.dtype, name="attn")(_norm(x, self.dtype, "norm1"))
        mlp = Mlp(4 * x.shape[-1], self.dtype, name="mlp")
        return x + mlp(_norm(x, self.dtype, "norm2"))


class VisionTransformer(nn.Module):
    """Vision transformer without its classifier, from images to the normalised class token.

    Attributes:
      width: width of a token, which is the number of features.
      depth: number of blocks.
      heads: number of attention heads; divides `width`.
      patch: side of a patch in pixels.
      image_size: side of a picture in pixels, a multiple of `patch`.
      dtype: dtype of the computation; parameters are float32.

    Source: Dosovitskiy et al. 2021, with timm's layer-norm epsilon of 1e-6.
    """

    width: int
    depth: int
    heads: int
    patch: int = 16
    image_size: int = 224
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map float[batch, image_size, image_size, 3] to float[batch, width]."""
        del train  # no layer behaves differently in training
        batch, height, width, _ = images.shape
        if (height, width) != (self.image_size, self.image_size):
            raise UserError(
                f"the ViT was made for pictures of {self.image_size}x{self.image_size} pixels, got "
                f"{height}x{width}: resize them, or set its image_size (and use weights that fit)",
                "image_size",
            )
        x = PatchEmbed(self.width, self.patch, self.dtype, name="patch_embed")(images)
        cls = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.width))
        positions = self.param("pos_embed", _truncated, (1, x.shape[1] + 1, self.width))
        cls = jnp.broadcast_to(cls.astype(self.dtype), (batch, 1, self.width))
        x = jnp.concatenate([cls, x], axis=1) + positions.astype(self.dtype)
        for index in range(self.depth):
            x = Block(self.heads, self.dtype, name=f"blocks_{index}")(x)
        return _norm(x[:, 0], self.dtype, "norm")


def _vit(width, heads, *, patch, image_size, dtype):
    if patch < 1 or image_size < 1 or image_size % patch:
        raise UserError(
            f"a ViT cuts its pictures into whole patches: image_size={image_size} is no multiple "
            f"of patch={patch}",
            "image_size",
        )
    shape = {"width": width, "depth": 12, "heads": heads, "patch": patch, "image_size": image_size}
    return VisionTransformer(**shape, dtype=dtype)


def vit_s16(
    dtype: DTypeLike = jnp.float32, patch: int = 16, image_size: int = 224
) -> VisionTransformer:
    """Build ViT-S/16, of 384 features.

    Args:
      dtype: dtype of the computation; parameters are float32.
      patch: side of a patch in pixels, for ViT-S/`patch`.
      image_size: side of a picture in pixels, a multiple of `patch`.

    Raises:
      UserError: `image_size` is no multiple of `patch`.
    """
    return _vit(384, 6, patch=patch, image_size=image_size, dtype=dtype)


def vit_ti16(
    dtype: DTypeLike = jnp.float32, patch: int = 16, image_size: int = 224
) -> VisionTransformer:
    """Build ViT-Ti/16, of 192 features.

    Args:
      dtype: dtype of the computation; parameters are float32.
      patch: side of a patch in pixels, for ViT-Ti/`patch`.
      image_size: side of a picture in pixels, a multiple of `patch`.

    Raises:
      UserError: `image_size` is no multiple of `patch`.
    """
    return _vit(192, 3, patch=patch, image_size=image_size, dtype=dtype)
