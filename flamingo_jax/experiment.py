"""The config schema: every option of a run, as frozen dataclasses with documented fields.

`configs/*.py` build an `Experiment` and convert it to an ml_collections ConfigDict (see
`flamingo_jax.configuring`), the command line overrides single fields, and the result is
checked against these types before any work starts. The range of a number is part of its type
(see `flamingo_jax.ranges`). `--help` prints the first sentence below each field.
"""

import dataclasses
from typing import Literal

from flamingo_jax.evaluation.evaluator_config import EvaluatorConfig
from flamingo_jax.fine_tuning.config import FineTuningConfig
from flamingo_jax.models.language_model_config import AttentionConfig as AttentionConfig
from flamingo_jax.models.language_model_config import FeedForwardConfig as FeedForwardConfig
from flamingo_jax.models.language_model_config import LanguageModelConfig as LanguageModelConfig
from flamingo_jax.models.language_model_config import LoRAConfig as LoRAConfig
from flamingo_jax.models.language_model_config import NormConfig as NormConfig
from flamingo_jax.models.language_model_config import PositionsConfig as PositionsConfig
from flamingo_jax.models.language_model_config import RotaryScaling as RotaryScaling
from flamingo_jax.ranges import (
    AboveZero,
    AtLeastTwo,
    AxisSize,
    BelowOne,
    Count,
    Finite,
    Fraction,
    NotNegative,
    Positive,
    PositiveFraction,
    Seed,
)

CAPTION_PROMPT = "Output:"
"""The text between a visual and its caption in evaluation (paper B.1.5)."""
QUESTION_PROMPT = "Question: {question} Answer:"
"""The text between a visual and the answer to a question about it, in training and evaluation
(paper B.1.5); the answer follows after a space.
"""


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Vision Transformer (Dosovitskiy et al. 2021) as in CLIP and SigLIP.

    The defaults are CLIP's ViT-L/14, the ablation's encoder (paper 3.3).
    """

    patch_size: Positive = 14
    """Side of a patch in pixels."""
    layers: Positive = 24
    """Transformer layers."""
    width: Positive = 1024
    """Of the residual stream."""
    heads: Positive = 16
    """Of attention."""
    feed_forward: Positive = 4096
    """Hidden units of a layer's feed-forward half."""
    activation: Literal["quick_gelu", "exact_gelu", "gelu"] = "quick_gelu"
    """quick_gelu: OpenAI's CLIP; exact_gelu: most others; gelu, the tanh form: SigLIP."""
    class_token: bool = True
    """A class token before the patches, with its position embedding included (CLIP); the
    features are those of the patches.
    """
    patch_bias: bool = False
    """A bias in the patch embedding (SigLIP)."""
    first_norm: bool = True
    """A norm before the first layer (CLIP)."""
    last_norm: bool = False
    """A norm after the last layer.

    CLIP has one for its pooled vector only; grid features are commonly taken before it.
    SigLIP's are taken after it.
    """
    norm_eps: AboveZero = 1e-5
    """Added to the variance within norms."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: a NormaliserFree ResNet (Brock et al. 2021), or a Vision Transformer
    where `vit` is given.
    """

    variant: str = "F6"
    """Of the NFNet: F0..F7, or `tiny` for laptops."""
    image_size: Positive = 320
    """Side of the square input in pixels: 288 for contrastive training, 320 for Flamingo, 480
    for fine-tuning (paper 3.2, B.1.3).
    """
    mean: tuple[Finite, ...] = (0.485, 0.456, 0.406)
    """Channel means of pixels scaled to 0..1; also the colour that pads an image to a square.
    """
    std: tuple[AboveZero, ...] = (0.229, 0.224, 0.225)
    """Channel deviations of pixels scaled to 0..1, by which they are divided."""
    image_fit: Literal["pad", "crop", "stretch"] = "pad"
    """How an image is made square. pad: resized with its aspect ratio kept, the rest filled
    with the mean colour (paper 3.2), so that nothing is lost. crop: the shorter side fills the
    square, the longer one is cut at both ends (CLIP). stretch: resized to the square (SigLIP).
    The folder of a published encoder says which it was trained with, and that is the default
    then: frozen features are best on such images; padding a photo for CLIP changes its pixels
    by a sixth of their range on average. Text at an image's edge needs pad or stretch: crop
    removes it.
    """
    stochastic_depth: BelowOne = 0.0
    """NFNet: the largest drop rate of a residual branch in training, that of the last block."""
    vit: ViTConfig | None = None
    """A Vision Transformer instead of the NFNet; `image_size` then determines the number of
    position embeddings.
    """


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """The BERT text encoder of the contrastive stage (ALIGN uses BERT-Large; Flamingo gives no
    sizes).
    """

    vocab_size: Positive = 32_000
    """Pieces of the tokenizer."""
    layers: Positive = 24
    """Transformer layers."""
    width: Positive = 1024
    """Of the residual stream."""
    heads: Positive = 16
    """Of attention."""
    max_length: AtLeastTwo = 64
    """Tokens of a text at most; longer ones are cut."""


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """The contrastive model: a vision encoder and a text encoder (paper B.1.3)."""

    vision: VisionConfig = VisionConfig(image_size=288)
    text: TextEncoderConfig = TextEncoderConfig()
    joint_width: Positive = 1376
    """Width of the embedding space that images and texts share (paper: 1376)."""
    initial_temperature: AboveZero = 1.0
    """The initial temperature, by which similarities are divided; its inverse is learned.

    ALIGN starts at 1.0.
    """
    label_smoothing: BelowOne = 0.1
    """Share of a pair's target that is spread evenly over the batch (ALIGN: 0.1)."""
    merge_duplicates: bool = False
    """Pairs of a batch with equal captions are positives of each other instead of negatives:
    for data with few distinct captions.
    """


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """The resampler from the encoder's features to visual tokens: see `models.resamplers`."""

    kind: Literal["perceiver", "mlp", "transformer"] = "perceiver"
    """perceiver: latents cross-attend to the features (paper A.1.1). For the paper's ablation:
    transformer, over features and latents in one sequence; mlp, on each grid cell, then a
    linear map from cells to tokens.
    """
    layers: Positive = 6
    """Its layers."""
    width: Positive = 1536
    """Width of latents and visual tokens within the resampler."""
    heads: Positive = 16
    """Attention heads."""
    head_width: Positive = 128
    """Width of a head. 128 (paper v1) with a map from 3072 gives the published 194 M
    parameters, 96 (v2) gives 174.8 M.
    """
    latents: Positive = 64
    """Visual tokens per image or video, whatever its number of frames (paper: 64)."""
    frames: Positive = 8
    """Number of learned time embeddings; other lengths are interpolated linearly."""
    feed_forward: Positive = 6144
    """Hidden units of a layer's feed-forward half."""
    position_grid: Count = 0
    """Rows and columns of the grid of learned position embeddings, interpolated to other
    sizes; 0 for none. The paper found no gain: a deep CNN's features encode position. A
    shallow one's do not, and without the embeddings a small model cannot tell which of two
    things is on the left.
    """


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
    """The cross-attention that conditions the language model on visuals: see
    `models.conditioning`.
    """

    kind: Literal["gated_xattn_dense", "vanilla_xattn", "grafting"] = "gated_xattn_dense"
    """gated_xattn_dense: blocks of cross-attention and feed-forward before layers of the
    language model (paper 2.2). For the paper's ablation (3.3): vanilla_xattn, cross-attention
    alone between a layer's self-attention and its feed-forward; grafting, such blocks
    alternating with new decoder layers, after the language model's last layer.
    """
    gating: Literal["tanh", "none"] = "tanh"
    """tanh: a block's output is multiplied by the tanh of a learned scalar."""
    xattn_every: Positive = 1
    """Blocks are at the language model's layers xattn_first, xattn_first + xattn_every, ...
    (paper B.1.1); not used by grafting.
    """
    xattn_first: Count = 0
    """The first layer with a block: 0 in the paper, xattn_every - 1 in OpenFlamingo."""
    grafted_layers: Positive = 12
    """grafting: the number of pairs of a block and a decoder layer. The paper does not say; 12
    give its 3.3 B parameters.
    """
    heads: Positive = 16
    """Heads of the cross-attention."""
    head_width: Positive = 128
    """Width of a head's queries, keys and values."""
    feed_forward: Positive = 8192
    """Hidden units of a block's feed-forward half."""
    gate_init: Finite = 0.0
    """Initial value of the gates, before the tanh. With 0 (paper) training starts from the
    language model's own outputs; but while a gate is near 0, gradient noise flips its sign
    again and again, and the block behind it does not learn. For runs of a few hundred steps
    use open gates, such as 1, with a small `out_scale`: the first blocks then soon learn to
    write what the language model's first layers can use.
    """
    out_scale: NotNegative = 1.0
    """Factor on the initial weights of a block's output maps; irrelevant at first if gates
    start at 0.
    """
    attend_to_media: Literal["last", "all_previous"] = "last"
    """The visuals that a text token attends to: the last one before it (paper) or all before
    it (ablation).
    """
    text_window: Count = 0
    """In the cross-attention a token also attends to this many text tokens of its segment,
    itself the last of them; 0 for none (paper). CASA (arXiv 2512.19535) adds such a local text
    window to cross-attention; its windows begin anew at every image.
    """


@dataclasses.dataclass(frozen=True)
class FlamingoConfig:
    """A Flamingo: vision encoder, resampler, cross-attention and language model."""

    vision: VisionConfig = VisionConfig()
    language_model: LanguageModelConfig = LanguageModelConfig()
    resampler: ResamplerConfig = ResamplerConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    extra_tokens: Positive = 1
    """Trained tokens added to the frozen vocabulary; the first is <EOC>."""


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """A dataset on disk, and how batches are made of it."""

    kind: Literal["pages", "pairs", "videos", "text", "questions"] = "pairs"
    """What a record is. pages: text with interleaved images. pairs, videos: an image or a clip
    with a caption. text: plain text. questions: an image or a clip with a prompt and an
    answer, where only the answer has a loss; in the language modelling stage they are read as
    text, without images.
    """
    path: str = ""
    """Folder of a prepared TFDS dataset (`data_dir/name/version`), opened with
    `tfds.builder_from_directory`.
    """
    split: str = "train"
    """The split of the dataset that is read."""
    batch_size: Positive = 8
    """Rows in a global batch (pairs in the contrastive stage)."""
    max_length: AtLeastTwo = 256
    """Tokens in a row, L."""
    visuals: Positive = 5
    """Visuals in a row at most, N (paper: the first 5 of a page)."""
    frames: Positive = 1
    """Frames of a visual, T: 1 for images, 8 for clips."""
    weight: NotNegative = 1.0
    """Weight of the dataset's loss, lambda of the training objective (paper 2.4)."""
    microbatches: Positive = 1
    """Equal parts of a batch that go through the model one after the other, so that a large
    batch fits in memory; the gradient is the same. In the contrastive stage each part is
    encoded and recomputed in the backward pass, and similarities are over the whole batch. A
    held-out dataset has its own number.
    """
    p_next: Fraction = 0.0
    """Probability, drawn once per page, that text attends to the next visual rather than the
    previous one (pages only; paper 0.5).
    """
    leading_space: Fraction = 0.5
    """Probability that paired text starts with a space (paper A.3.3)."""
    prompt: str = QUESTION_PROMPT
    """Questions: the text between the visual and the answer, with {question} for the record's
    question; for instructions, "{question}" alone.
    """
    pack: bool = True
    """Several short examples are packed into a row; adjacent questions about the same visual
    also share that.
    """
    flip: bool = False
    """Random left-right flips; off for text that mentions left and right."""
    colour: Fraction = 0.0
    """Strength of colour augmentation, 0 for none.

    Drawn on the host with the row, applied on the device, in training only.
    """


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in the paper (B.1.2), which does not give betas and eps."""

    learning_rate: NotNegative = 1e-4
    """The peak learning rate, after warmup."""
    warmup_steps: Count = 5_000
    """Steps over which the learning rate rises linearly from 0 (paper: 5,000)."""
    schedule: Literal["constant", "linear", "cosine", "stepwise"] = "constant"
    """The learning rate after warmup.

    In the paper Flamingo's is constant, the contrastive stage's decays linearly to 0, and
    fine-tuning's decays by factors of 10 (B.2.2).
    """
    end_learning_rate: NotNegative = 0.0
    """linear, cosine: the learning rate at the last step."""
    boundaries: tuple[Positive, ...] = ()
    """stepwise: the steps after which the learning rate is multiplied by `boundary_factor`."""
    boundary_factor: PositiveFraction = 0.1
    """stepwise: the factor on the learning rate at each boundary."""
    beta1: BelowOne = 0.9
    """Decay of the gradient's running mean."""
    beta2: BelowOne = 0.999
    """Decay of the squared gradient's running mean."""
    eps: AboveZero = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay, multiplied by the learning rate (paper: 0.1)."""
    weight_decay_exclude: tuple[str, ...] = ("resampler/.*",)
    """Regular expressions of parameter names without weight decay (paper: the resampler)."""
    weight_decay_on_vectors: bool = False
    """Weight decay also on norm scales, biases and gates (see
    `training.optimizer.make_optimizer`).
    """
    clip_norm: NotNegative = 1.0
    """Largest global norm of the gradient; 0 for no clipping.

    With `adaptive_clip` it does not include the vision encoder.
    """
    learning_rate_scales: dict[str, NotNegative] = dataclasses.field(default_factory=dict)
    """Factors on the learning rate of parts of the model, by name: {"language_model": 0.1} in
    the paper's runs that also train the language model.
    """
    adaptive_clip: NotNegative = 0.0
    """Limit of adaptive gradient clipping of the vision encoder (NFNet); 0 for none. 1e-2 in
    the paper's contrastive stage.
    """


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each mesh axis; -1 for one of them means all that remain."""

    data: AxisSize = -1
    """Data parallelism: replicas, each with its own rows."""
    fsdp: AxisSize = 1
    """Fully sharded data parallelism: rows, trained parameters and moments are sharded."""
    model: AxisSize = 1
    """Tensor parallelism (Megatron): heads, hidden units and the vocabulary are sharded."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The length of a run, its logging and checkpoints, and how the update is computed."""

    steps: Positive = 500_000
    """Steps of the whole run."""
    log_every: Positive = 20
    """Steps between lines of metrics."""
    evaluate_every: Positive = 1_000
    """Steps between measurements of held-out losses."""
    evaluate_batches: Positive = 8
    """Batches of each held-out dataset that are measured."""
    save_every: Positive = 1_000
    """Steps between checkpoints; a run also saves at SIGTERM and at its last step."""
    keep_last: Positive = 3
    """How many of the newest checkpoints are kept."""
    keep_every: Count = 0
    """Checkpoints at multiples of this stay for ever; 0 for none."""
    max_not_finite: Count = 10
    """Steps in a row that may be skipped because they are not finite; one more ends the run."""
    loss: Literal["sequence_sum", "token_mean"] = "sequence_sum"
    """Sum over a sequence's tokens, mean over sequences (the paper's equation), or mean over
    tokens.
    """
    round_robin: bool = False
    """One optimizer step for each dataset in turn (the paper's ablation) instead of one for
    the sum of their gradients (paper 2.4).
    """
    remat: Literal["none", "products", "layers"] = "none"
    """What the backward pass recomputes to save memory. none: nothing. products: all but
    products with weights. layers: whole layers.
    """
    frames_at_once: Count = 0
    """Frames that each device encodes at a time, to limit the encoder's memory; 0 for all of a
    batch. If the encoder is trained, each round is recomputed in the backward pass.
    """
    unfreeze_vision_encoder: bool = False
    """The vision encoder is trained too, as in fine-tuning (paper 3.2). It may then start from
    "random". `stochastic_depth` has no effect: only the contrastive stage uses it.
    """
    unfreeze_language_model: bool = False
    """The language model is trained too (the paper's ablation of freezing). It may then start
    from "random".
    """
    lora: LoRAConfig = LoRAConfig()
    """Low-rank updates by which the frozen language model is trained; launch.export merges
    them. In the language modelling stage only they are trained, and language_model_from names
    the model that they update.
    """
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of activations and, by default, frozen weights; trained parameters, losses and
    sums of gradients are float32.
    """
    frozen_dtype: Literal["compute_dtype", "float32", "bfloat16", "int8"] = "compute_dtype"
    """Dtype in which the frozen language model and vision encoder are kept. int8 takes half of
    bfloat16's memory: every matrix, embedding and convolution has integers with a float32 scale
    for each output channel (see `models.quantised`), and the rest is of `compute_dtype`. They
    are quantised as they are read; launch.export writes them as they are in their folders.
    """
    use_visuals: bool = True
    """False trains the same model on the same text without any image, as a baseline."""
    required_loss: dict[str, AboveZero] = dataclasses.field(default_factory=dict)
    """The largest loss per token of held-out datasets, by name, at the end of training. Above
    it the run is saved as usual, but ends with an error: for a stage that later ones depend
    on.
    """
    readers: Count = 0
    """Threads of each process that read, decode and resize for all datasets together; 0 for
    one per core. Fewer leave cores to other programs of the machine; more hide the latency of
    slow storage. Batches are the same with any number.
    """
    cache_features: bool = False
    """The frozen encoder's features of every image are computed once, before the first step,
    and stored beside each dataset, so that steps do not run the encoder: for several epochs
    over small data without augmentation. An image takes cells x channels values of
    `compute_dtype`.
    """


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training run."""

    name: str = ""
    """The run's display name."""
    task: Literal["contrastive", "language_modelling", "flamingo"] = "flamingo"
    """The stage. contrastive: trains the vision encoder with a text encoder.
    language_modelling: trains the language model. flamingo: trains the parts between the two.
    """
    seed: Seed = 0
    """The seed of initial parameters, data order and all other randomness."""
    contrastive: ContrastiveConfig | None = None
    language_model: LanguageModelConfig | None = None
    flamingo: FlamingoConfig | None = None
    """The model of the task; the other two are None."""
    tokenizer: str = ""
    """SentencePiece model file or tokenizer.json, or the folder that holds one."""
    data: dict[str, DatasetConfig] = dataclasses.field(default_factory=dict)
    held_out: dict[str, DatasetConfig] = dataclasses.field(default_factory=dict)
    """Datasets whose losses are measured, with and without their images, every
    config.training.evaluate_every steps.
    """
    evaluators: dict[str, EvaluatorConfig] = dataclasses.field(default_factory=dict)
    """Further evaluators by name; their metrics are logged as <name>/<metric>."""
    fine_tuning: FineTuningConfig = FineTuningConfig()
    """How launch.fine_tune scores the task."""
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    training: TrainingConfig = TrainingConfig()
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Trackers that get the metrics besides `metrics.jsonl` (see `training.trackers`)."""
    tracker_project: str = "flamingo_jax"
    """The run's project in wandb and trackio."""
    vision_encoder_from: str = ""
    """Folder of the vision encoder: an export of the contrastive stage or of launch.convert,
    or a published CLIP or SigLIP.
    """
    language_model_from: str = ""
    """Folder of the frozen language model: an export of its stage or of launch.convert, or a
    published model of a family in `interop/families`.
    """
    flamingo_from: str = ""
    """Folder of an exported Flamingo to continue from, as in fine-tuning: frozen parts and
    initial values of trained ones come from it, instead of from the other two folders.
    """
