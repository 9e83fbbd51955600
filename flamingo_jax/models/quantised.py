"""Which weights of a language model or vision encoder are kept as int8 where they are frozen:
every matrix, embedding table and convolution; norms, biases, gains and position tables are
not, since they are thousandths of the memory.
"""

from flax import nnx

from flamingo_jax.models.attention import FullAttention, SelfAttention
from flamingo_jax.models.int8 import Int8Filters, Int8Table, Int8Weight
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.layers import FeedForward
from flamingo_jax.models.nfnet import SqueezeExcite, WSConv
from flamingo_jax.models.vision import VisionEncoder
from flamingo_jax.models.vit import ViT
from flamingo_jax.models.weights import LoRAWeight, dense
from flamingo_jax.pytrees import STACK

MATRICES: dict[type[nnx.Module], dict[str, int]] = {
    SelfAttention: {"query": 1, "key": 1, "value": 1, "position": 1, "out": 2},
    FullAttention: {"query": 1, "key": 1, "value": 1, "out": 2},
    FeedForward: {"gate": 1, "up": 1, "down": 1},
    SqueezeExcite: {"down": 1, "up": 1},
    ViT: {"patch_embedding": 1},
    LanguageModel: {"head": 1},
}
"""{module: {attribute: how many leading axes of one layer's matrix are inputs}}."""


def quantise_part(part: LanguageModel | VisionEncoder) -> None:
    """Replaces the weights of a frozen part by int8 with scales, in place; also of an abstract
    model, within `nnx.eval_shape`. Low-rank updates stay as they are, over an int8 base.

    Embedding and head are among them: with the 49,152 to 151,936 tokens of open models they
    are a fifth to a quarter of a small model, and a scale per token keeps what a lookup or a
    logit loses as small as what a matrix loses.
    """
    for path, module in list(nnx.iter_modules(part)):
        stacked = path.count(STACK)
        for attribute, inputs in MATRICES.get(type(module), {}).items():
            weight = getattr(module, attribute, None)
            if isinstance(weight, LoRAWeight):
                weight.base = Int8Weight(dense(weight.base), inputs, stacked=stacked)
            elif weight is not None:
                setattr(module, attribute, Int8Weight(weight[...], inputs, stacked=stacked))
        if isinstance(module, LanguageModel):
            module.embedding = Int8Table(module.embedding[...])
        elif isinstance(module, WSConv):
            module.weight = Int8Filters(module.weight[...])
