"""Every option of a run, declared once: frozen dataclasses that configs fill in and the library
reads.

A number's range is part of its declared type (see `flamingo_jax.ranges`).
`configs/*.py` turn an `Experiment` into an ml_collections ConfigDict (see
`flamingo_jax.configuring`), the command line overrides single fields, and the result is checked
against these types again before any work starts.
"""

import dataclasses
from typing import Literal

from flamingo_jax.evaluation.evaluator_config import EvaluatorConfig
from flamingo_jax.models.language_model_config import AttentionConfig as AttentionConfig
from flamingo_jax.models.language_model_config import FeedForwardConfig as FeedForwardConfig
from flamingo_jax.models.language_model_config import LanguageModelConfig as LanguageModelConfig
from flamingo_jax.models.language_model_config import LoRAConfig as LoRAConfig
from flamingo_jax.models.language_model_config import NormConfig as NormConfig
from flamingo_jax.models.language_model_config import PositionsConfig as PositionsConfig
from flamingo_jax.models.language_model_config import RotaryScaling as RotaryScaling
from flamingo_jax.ranges import (
    AboveZero,
    AxisSize,
    BelowOne,
    Count,
    Finite,
    Fraction,
    NotNegative,
    Positive,
    Seed,
    Several,
    Shrinking,
)

CAPTION_PROMPT = "Output:"
"""What stands between a visual and its caption in evaluation (paper B.1.5)."""
QUESTION_PROMPT = "Question: {question} Answer:"
"""What is asked of a visual, in training and in evaluation alike (paper B.1.5); the answer
follows after a space.
"""


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Vision Transformer (Dosovitskiy et al. 2021) as CLIP and SigLIP have it.

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
    """A token before the patches, its position part of it (CLIP); the features are the patches'
    alone.
    """
    patch_bias: bool = False
    """Biases in the map from patches (SigLIP)."""
    first_norm: bool = True
    """A norm before the first layer (CLIP)."""
    last_norm: bool = False
    """A norm after the last layer.

    CLIP has one for its pooled vector, which grid features are commonly taken without; SigLIP's
    are behind it.
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
    """How an image becomes a square. pad: its aspect kept, the rest filled with the mean colour
    (paper 3.2), so that nothing is lost. crop: its shorter side fills the square, what sticks
    out on both sides is cut (CLIP). stretch: both sides fill it (SigLIP). A published encoder's
    folder
    says which it was trained with, and that is its default: frozen features mean most on images
    like those; padding a photo for CLIP changes its pixels by a sixth of their range on
    average. What crop cuts is never seen: text at an image's edge wants pad or stretch.
    """
    stochastic_depth: BelowOne = 0.0
    """NFNet: the most that a block is left out in training."""
    vit: ViTConfig | None = None
    """A Vision Transformer in the NFNet's place; its `image_size` says how many positions are
    stored.
    """


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """BERT-form text encoder of the contrastive stage (ALIGN uses BERT-Large; Flamingo does not
    say).
    """

    vocab_size: Positive = 32_000
    """Pieces of the tokenizer."""
    layers: Positive = 24
    """Transformer layers."""
    width: Positive = 1024
    """Of the residual stream."""
    heads: Positive = 16
    """Of attention."""
    max_length: Several = 64
    """Tokens of a text at most; longer ones are cut."""


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """Vision encoder beside text encoder (paper B.1.3)."""

    vision: VisionConfig = VisionConfig(image_size=288)
    text: TextEncoderConfig = TextEncoderConfig()
    joint_width: Positive = 1376
    """Of the space that images and texts share (paper: 1376)."""
    initial_temperature: AboveZero = 1.0
    """Similarities are divided by this at the start; its inverse is learned.

    ALIGN starts at 1.0.
    """
    label_smoothing: BelowOne = 0.1
    """Share of a pair's target that all pairs of the batch have alike (ALIGN: 0.1)."""
    merge_duplicates: bool = False
    """Pairs of a batch with the very same caption share the target instead of being each
    other's negatives: for worlds with few captions.
    """


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """How visual features become visual tokens: see `models.resamplers`."""

    kind: Literal["perceiver", "mlp", "transformer"] = "perceiver"
    """perceiver: latents read the features (paper A.1.1). The ablation's others: transformer,
    features and latents in one sequence; mlp, cell by cell, then a map from cells to tokens.
    """
    layers: Positive = 6
    """Its layers."""
    width: Positive = 1536
    """Of latents and visual tokens within the resampler."""
    heads: Positive = 16
    """Of attention."""
    head_width: Positive = 128
    """128 (paper v1) with a map from 3072 gives the published 194 M; 96 (v2) gives 174.8 M."""
    latents: Positive = 64
    """Visual tokens that leave it, however many frames come in (paper: 64)."""
    frames: Positive = 8
    """Number of learned time embeddings; other lengths are interpolated linearly."""
    feed_forward: Positive = 6144
    """Hidden units of a layer's feed-forward half."""
    position_grid: Count = 0
    """Rows and columns of a grid with learned embeddings, interpolated to other sizes; 0 for
    none. The paper found no gain: a deep CNN's features carry position. A shallow one's do not,
    and without them a small model cannot tell which of two things is on the left.
    """


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
    """How the frozen language model comes to see: see `models.conditioning`."""

    kind: Literal["gated_xattn_dense", "vanilla_xattn", "grafting"] = "gated_xattn_dense"
    """gated_xattn_dense: blocks of cross-attention and a feed-forward before layers of the
    language model (paper 2.2). The ablation's others (3.3): vanilla_xattn, cross-attention alone
    between a layer's self-attention and its feed-forward; grafting, such blocks and decoder
    layers in turn, trained from scratch behind the last layer.
    """
    gating: Literal["tanh", "none"] = "tanh"
    """tanh: what is added is multiplied by the tanh of a learned scalar."""
    xattn_every: Positive = 1
    """Blocks belong to language model layers xattn_first, xattn_first + xattn_every, ... (paper
    B.1.1). Not for grafting.
    """
    xattn_first: Count = 0
    """The first layer with a block: 0 in the paper, xattn_every - 1 in OpenFlamingo."""
    grafted_layers: Positive = 12
    """grafting: how many pairs of a block and a decoder layer; the paper does not say, these
    make its 3.3 B.
    """
    heads: Positive = 16
    """Of cross-attention."""
    head_width: Positive = 128
    """Width of a head's queries, keys and values."""
    feed_forward: Positive = 8192
    """Hidden units of a gated block's feed-forward half."""
    gate_init: Finite = 0.0
    """The gates' parameters at the start. 0 (paper): training begins with the language model's
    own outputs, and while a gate is near 0 the noise of its gradient turns its sign again and
    again, so that nothing behind it learns. Runs of some hundred steps want open gates, as 1,
    with a small `out_scale`: then the first blocks learn to write what the language model's
    first layers can read.
    """
    out_scale: NotNegative = 1.0
    """What blocks write starts at this many times its usual size; their gates make it 0 in the
    paper's start.
    """
    attend_to_media: Literal["last", "all_previous"] = "last"
    """Which visuals a text token sees: the last one before it (paper) or all before it
    (ablation).
    """
    text_window: Count = 0
    """In the cross-attention a token sees, beside its visual, so many text tokens of its segment,
    itself the last of them; 0 for none (paper). Local text beside the image is what CASA (arXiv
    2512.19535) adds to cross-attention; its windows begin anew at every image.
    """


@dataclasses.dataclass(frozen=True)
class FlamingoConfig:
    """Frozen encoder, resampler, conditioning and frozen language model."""

    vision: VisionConfig = VisionConfig()
    language_model: LanguageModelConfig = LanguageModelConfig()
    resampler: ResamplerConfig = ResamplerConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    extra_tokens: Positive = 1
    """Trained additions to the frozen vocabulary; the first is <EOC>."""


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One dataset on disk and how its rows are formed."""

    kind: Literal["pages", "pairs", "videos", "text", "questions"] = "pairs"
    """questions: images or clips with a prompt and an answer, of which the answer alone is
    learned; in the language modelling stage they are read as texts, without their images.
    """
    path: str = ""
    """Folder of a prepared TFDS dataset (`data_dir/name/version`), opened with
    `tfds.builder_from_directory`.
    """
    split: str = "train"
    """The split of the dataset that is read."""
    batch_size: Positive = 8
    """Rows in a global batch (pairs in the contrastive stage)."""
    max_length: Several = 256
    """Tokens in a row, L."""
    visuals: Positive = 5
    """Visuals a row has room for, N (paper: the first 5 of a page)."""
    frames: Positive = 1
    """Frames of a visual, T: 1 for images, 8 for clips."""
    weight: NotNegative = 1.0
    """lambda of the training objective (paper 2.4)."""
    microbatches: Positive = 1
    """Equal parts of a batch that go through the model one after the other, so that a large
    batch fits in memory; the gradient is the same. In the contrastive stage parts are encoded,
    and once more for the gradient; similarities are over the whole batch. A held-out dataset
    has its own number.
    """
    p_next: Fraction = 0.0
    """Probability, once per page, that text looks at the next visual rather than the previous
    one (pages only; paper 0.5).
    """
    leading_space: Fraction = 0.5
    """Probability that paired text starts with a space (paper A.3.3)."""
    prompt: str = QUESTION_PROMPT
    """Questions: what stands between the visual and the answer, with the record's question at
    {question}; for instructions, "{question}" alone.
    """
    pack: bool = True
    """Several short examples share a row, and questions about the same visual that follow one
    another share that too.
    """
    flip: bool = False
    """Random left-right flips; off where text speaks of left and right."""
    colour: Fraction = 0.0
    """Strength of colour augmentation, 0 for none.

    Drawn with the row; applied on the device, in training alone.
    """


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as the paper has it (B.1.2); betas and eps are not published."""

    learning_rate: NotNegative = 1e-4
    """The highest one, after warm-up."""
    warmup_steps: Count = 5_000
    """Updates over which the rate rises linearly from 0 (paper: 5,000)."""
    schedule: Literal["constant", "linear", "cosine", "stepwise"] = "constant"
    """After warm-up.

    The paper's Flamingo stays constant; its contrastive stage falls linearly to 0; fine-tuning
    falls by factors of 10 (B.2.2).
    """
    end_learning_rate: NotNegative = 0.0
    """linear, cosine: the learning rate at the last step."""
    boundaries: tuple[Positive, ...] = ()
    """stepwise: the steps after which the learning rate is multiplied by `boundary_factor`."""
    boundary_factor: Shrinking = 0.1
    """stepwise: what the rate is multiplied by at each boundary."""
    beta1: BelowOne = 0.9
    """Decay of the gradient's running mean."""
    beta2: BelowOne = 0.999
    """Decay of the squared gradient's running mean."""
    eps: AboveZero = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.1
    """Decoupled, times the learning rate (paper: 0.1)."""
    weight_decay_exclude: tuple[str, ...] = ("resampler/.*",)
    """Regular expressions over parameter names that get no weight decay (paper: the resampler).
    """
    weight_decay_on_vectors: bool = False
    """Weight decay also on norm scales, biases and gates (see
    `training.optimizer.make_optimizer`).
    """
    clip_norm: NotNegative = 1.0
    """Largest global norm of the gradient; 0 for no clipping.

    With `adaptive_clip`, of all but the vision encoder's.
    """
    learning_rate_scales: dict[str, NotNegative] = dataclasses.field(default_factory=dict)
    """Part of the model -> its learning rate as a multiple of `learning_rate`: the paper has
    {"language_model": 0.1} where that is trained further with the rest.
    """
    adaptive_clip: NotNegative = 0.0
    """Adaptive gradient clipping of the vision encoder (NFNet); 0 for none, the paper's
    contrastive stage has 1e-2.
    """


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 on one axis means all that are left."""

    data: AxisSize = -1
    """Replicas, each with rows of its own."""
    fsdp: AxisSize = 1
    """Devices that share trained parameters and moments, and rows."""
    model: AxisSize = 1
    """Devices that split heads, hidden units and the vocabulary (Megatron)."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long and how a stage trains, and what it writes meanwhile."""

    steps: Positive = 500_000
    """Steps of the whole run."""
    log_every: Positive = 20
    """Steps from one line of metrics to the next."""
    evaluate_every: Positive = 1_000
    """Steps from one measurement of held-out losses to the next."""
    evaluate_batches: Positive = 8
    """Batches of each held-out dataset that are measured."""
    save_every: Positive = 1_000
    """Steps between checkpoints; SIGTERM and the last step save besides."""
    keep_last: Positive = 3
    """The newest checkpoints that stay."""
    keep_every: Count = 0
    """Checkpoints at multiples of this stay for ever; 0 for none."""
    max_not_finite: Count = 10
    """Steps in a row that may be skipped because they are not finite; one more stops the run.
    """
    loss: Literal["sequence_sum", "token_mean"] = "sequence_sum"
    """Sum over a sequence's tokens, mean over sequences (the paper's equation), or mean over
    tokens.
    """
    round_robin: bool = False
    """One step of the optimizer for each dataset, one after the other (the paper's ablation),
    rather than one of the sum of their gradients (paper 2.4).
    """
    remat: Literal["none", "products", "layers"] = "none"
    """What is computed again for the gradient rather than kept: nothing; all but the products
    with weights; whole layers.
    """
    frames_at_once: Count = 0
    """Frames that each device encodes at a time, 0 for all of a batch's: the encoder's memory.
    Where the encoder is trained, each time's are encoded again for the gradient.
    """
    unfreeze_vision_encoder: bool = False
    """The vision encoder is trained too, as in fine-tuning (paper 3.2); "random" is then a
    start like any other. Nothing of it is random in
    training: `stochastic_depth` is the contrastive stage's."""
    unfreeze_language_model: bool = False
    """The language model is trained too (the paper's ablation of freezing); "random" is then a
    start like any other.
    """
    lora: LoRAConfig = LoRAConfig()
    """The frozen language model is trained by low-rank updates of its matrices, which
    launch.export adds to them. In the language modelling stage these alone train, and
    language_model_from names what they update.
    """
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What activations and frozen weights are computed in; trained parameters, losses and sums
    of gradients stay float32.
    """
    use_visuals: bool = True
    """False trains the same model on the same text with every image taken away: the baseline
    that shows what looking is worth.
    """
    required_loss: dict[str, AboveZero] = dataclasses.field(default_factory=dict)
    """Held-out dataset -> the most that its loss per token may be when training ends. Above it
    the run is saved as ever, but ends with an error: for a stage that others stand on, as
    binding in context stands on a language model that does it in text.
    """
    readers: Count = 0
    """Threads of each process that read, decode and resize, all datasets sharing them; 0 for
    one a core, since decoding is computing. Fewer leave cores to other programs of the machine;
    more hide storage that is slow to answer. Batches are the same with any number.
    """
    cache_features: bool = False
    """The frozen encoder's outputs for every image are made once, before the first step, and
    kept beside each dataset, so that no step
    runs the encoder: for several epochs over small data, without augmentation. An image takes
    cells x channels values of `compute_dtype`.
    """


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training run."""

    name: str = ""
    """The run's name, for people."""
    task: Literal["contrastive", "language_modelling", "flamingo"] = "flamingo"
    """What is trained: the vision encoder beside a text encoder, the language model, or a
    Flamingo between the two.
    """
    seed: Seed = 0
    """Of initial parameters, of the order of data and of every draw."""
    contrastive: ContrastiveConfig | None = None
    language_model: LanguageModelConfig | None = None
    flamingo: FlamingoConfig | None = None
    """The model of the task; the other two are None."""
    tokenizer: str = ""
    """SentencePiece model file or tokenizer.json, or the folder that holds one."""
    data: dict[str, DatasetConfig] = dataclasses.field(default_factory=dict)
    held_out: dict[str, DatasetConfig] = dataclasses.field(default_factory=dict)
    """Datasets whose losses are measured, with their images and without them, every
    config.training.evaluate_every steps.
    """
    evaluators: dict[str, EvaluatorConfig] = dataclasses.field(default_factory=dict)
    """What else is measured, by name: metrics.jsonl has <name>/<metric>."""
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    training: TrainingConfig = TrainingConfig()
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics are shown besides `metrics.jsonl` (see `training.trackers`)."""
    tracker_project: str = "flamingo_jax"
    """The project that wandb and trackio file the run under."""
    vision_encoder_from: str = ""
    """Folder that the vision encoder comes from: an export of the contrastive stage or of
    launch.convert, or a CLIP or SigLIP as published.
    """
    language_model_from: str = ""
    """Folder that the frozen language model comes from: an export of its stage or of
    launch.convert, or a model of a family in `interop/families` as published.
    """
    flamingo_from: str = ""
    """Exported folder (Flamingo stage) to go on from, as fine-tuning does: frozen parts and the
    start of trained ones all come from it, in place of the other two.
    """
