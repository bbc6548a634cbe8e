"""Vision transformers: pre-norm, class token, learned positions.

Module names follow timm's state dicts (`blocks_0` stands for `blocks.0`), so that its weights
import by name.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from compat_jax.errors import UserError
from compat_jax.models.layers import Conv, linear_init

_truncated = nn.initializers.truncated_normal(0.02)


def _dense(features, dtype, name):
    return nn.Dense(features, dtype=dtype, kernel_init=_truncated, name=name)


def _norm(x, dtype, name):
    # In float32, and by the two-pass variance, as PyTorch: the one-pass form loses digits.
    norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)
    return norm(x.astype(jnp.float32)).astype(dtype)


class PatchEmbed(nn.Module):
    """Pictures to a sequence of patch embeddings, row by row.

    Source: `PatchEmbed` of timm.
    """

    features: int
    patch: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """float[batch, h, w, 3] -> float[batch, h * w / patch**2, features]."""
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

    Source: Vaswani et al. 2017; the fused layout is timm's.
    """

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[batch, tokens, width] -> the same shape."""
        batch, tokens, width = x.shape
        qkv = _dense(3 * width, self.dtype, "qkv")(x)
        query, key, value = jnp.moveaxis(
            qkv.reshape(batch, tokens, 3, self.heads, width // self.heads), 2, 0
        )
        wide = np.promote_types(self.dtype, np.float32)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide)
        weights = nn.softmax(scores / math.sqrt(width // self.heads)).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return _dense(width, self.dtype, "proj")(mixed.reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers around an exact (not tanh) GELU."""

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[batch, tokens, width] -> the same shape."""
        hidden = nn.gelu(_dense(self.hidden, self.dtype, "fc1")(x), approximate=False)
        return _dense(x.shape[-1], self.dtype, "fc2")(hidden)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a shortcut."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[batch, tokens, width] -> the same shape."""
        x = x + Attention(self.heads, self.dtype, name="attn")(_norm(x, self.dtype, "norm1"))
        mlp = Mlp(4 * x.shape[-1], self.dtype, name="mlp")
        return x + mlp(_norm(x, self.dtype, "norm2"))


class VisionTransformer(nn.Module):
    """A vision transformer without its classifier: images to the normalised class token.

    Attributes:
      width: of a token.
      depth: blocks.
      heads: of attention; divides `width`.
      patch: side of a patch in pixels.
      image_size: side of a picture in pixels, a multiple of `patch`.
      dtype: of the computation; parameters are float32.

    Source: Dosovitskiy et al. 2021, with timm's layer-norm epsilon of 1e-6.
    """

    width: int
    depth: int
    heads: int
    patch: int = 16
    image_size: int = 224
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """float[batch, image_size, image_size, 3] -> float[batch, width]."""
        del train  # No layer behaves differently in training.
        batch, height, width, _ = images.shape
        if (height, width) != (self.image_size, self.image_size):
            raise UserError(
                f"the ViT was made for pictures of {self.image_size}x{self.image_size} pixels, got "
                f"{height}x{width}: set its image_size argument, and fitting weights, or resize"
            )
        x = PatchEmbed(self.width, self.patch, self.dtype, name="patch_embed")(images)
        cls = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.width))
        positions = self.param("pos_embed", _truncated, (1, x.shape[1] + 1, self.width))
        cls = jnp.broadcast_to(cls.astype(self.dtype), (batch, 1, self.width))
        x = jnp.concatenate([cls, x], axis=1) + positions.astype(self.dtype)
        for index in range(self.depth):
            x = Block(self.heads, self.dtype, name=f"blocks_{index}")(x)
        return _norm(x[:, 0], self.dtype, "norm")


def _vit(width, heads, patch, image_size, dtype):
    if patch < 1 or image_size < 1 or image_size % patch:
        raise UserError(
            f"a ViT cuts its pictures into whole patches: image_size={image_size} is no multiple "
            f"of patch={patch}"
        )
    return VisionTransformer(width, 12, heads, patch, image_size, dtype)


def vit_s16(
    dtype: jnp.dtype = jnp.float32, patch: int = 16, image_size: int = 224
) -> VisionTransformer:
    """ViT-S/16, or S/`patch`; 384 features."""
    return _vit(384, 6, patch, image_size, dtype)


def vit_ti16(
    dtype: jnp.dtype = jnp.float32, patch: int = 16, image_size: int = 224
) -> VisionTransformer:
    """ViT-Ti/16, or Ti/`patch`; 192 features."""
    return _vit(192, 3, patch, image_size, dtype)
