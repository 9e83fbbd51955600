"""The Python interface of a trained Flamingo: `load` an export, then `Model.generate`,
`score`, `features`, or call it for logits.

A prompt is a list of texts, `Image`s and `Video`s in any order. A list of such lists is a
batch, for which methods return a list. Texts may mark the places of images by `<image>`; the
images are then given in that order, in the list or as `images=`.
"""

import dataclasses
import math
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, overload

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flamingo_jax.checkpointing.export import export_model
from flamingo_jax.checkpointing.model_card import LOAD_FLAMINGO, ModelCard, render
from flamingo_jax.configuring import to_json
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.inference.attention_maps import AttentionMaps, attention_maps
from flamingo_jax.inference.completion import Completion
from flamingo_jax.inference.decoding import DecodingConfig, check_seed, stop_strings
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.loading import LoadedFlamingo, load_flamingo
from flamingo_jax.inference.prompts import (
    Prompt,
    PromptPart,
    SpecialToken,
    TokenisedPrompt,
    answered_batch,
    as_batch,
    tokenise,
    with_images,
)
from flamingo_jax.inference.streaming import TextStream
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.weights import make_dense
from flamingo_jax.processing.tokenizer import Tokenizer, tokenizer_file
from flamingo_jax.processing.visuals import Image, ImageSource, Visual, VisualSource
from flamingo_jax.pytrees import to_flat

PAPER_BEAM_SIZE = 3
"""The beam size of the paper's open-ended tasks."""

OnePrompt = str | VisualSource | Visual | SpecialToken | Sequence[Any]
"""A part, or a list of parts: texts, images, videos, END_OF_CHUNK."""
Batch = Sequence[list[Any] | tuple[Any, ...]]
"""Prompts, each a list of parts."""
Images = Sequence[Any]
"""The images of a prompt's `<image>` tags, in order: images, videos or what `Image` takes. For
a batch, one list for all prompts or one for each.
"""


@dataclasses.dataclass(frozen=True)
class CandidateScores:
    """The log-likelihoods of candidate continuations of a prompt.

    log_likelihoods: for each candidate the sum of the log-probabilities of its tokens and,
      unless `close` was False, of the <EOC> after it; not divided by its length (paper:
      close-ended tasks).
    """

    candidates: tuple[str, ...]
    log_likelihoods: tuple[float, ...]

    @property
    def best(self) -> str:
        """Returns the most likely candidate, the first of equals."""
        return self.candidates[int(np.argmax(self.log_likelihoods))]

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Returns each candidate's probability, given that one of the candidates follows."""
        # The maximum is subtracted against underflow of exp.
        most = max(self.log_likelihoods)
        shares = [math.exp(value - most) for value in self.log_likelihoods]
        return tuple(share / sum(shares) for share in shares)


class Model:
    """A Flamingo with its tokenizer, for prompts of texts, images and videos.

    Images and videos are preprocessed as in the model's training. Repeated ones are encoded
    once, within a cache of 512 MiB.

    Args:
      flamingo: the NNX module. Its parameters are read here: after training it further, make a
        new Model.
      tokenizer: of its language model.
      digest: of the weights, if they come from an export.

    Raises: UserError where the tokenizer has another vocabulary than the language model.
    """

    def __init__(self, flamingo: Flamingo, tokenizer: Tokenizer, *, digest: str = ""):
        self.flamingo, self.tokenizer, self.digest = flamingo, tokenizer, digest
        self.config: FlamingoConfig = flamingo.config
        vocabulary = self.config.language_model.vocab_size
        if tokenizer.vocab_size != vocabulary:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the language model"
                f" {vocabulary}: give the one that it was trained with, loaded with that"
                " vocab_size"
            )
        self._engine = Engine(LoadedFlamingo(flamingo, tokenizer, self.config, digest))

    @overload
    def generate(
        self,
        prompt: Batch,
        *,
        images: Images | None = ...,
        max_tokens: int = ...,
        beam_size: int | None = ...,
        temperature: float = ...,
        top_p: float = ...,
        length_penalty: float = ...,
        stop: str | Sequence[str] = ...,
        n_best: int = ...,
        seed: int = ...,
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompt: OnePrompt,
        *,
        images: Images | None = ...,
        max_tokens: int = ...,
        beam_size: int | None = ...,
        temperature: float = ...,
        top_p: float = ...,
        length_penalty: float = ...,
        stop: str | Sequence[str] = ...,
        n_best: int = ...,
        seed: int = ...,
    ) -> Completion: ...

    def generate(
        self,
        prompt: OnePrompt | Batch,
        *,
        images: Images | None = None,
        max_tokens: int = 32,
        beam_size: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        length_penalty: float = 0.0,
        stop: str | Sequence[str] = (),
        n_best: int = 1,
        seed: int = 0,
    ) -> Completion | list[Completion]:
        """Generates the continuation of a prompt, or of each prompt of a batch, up to its
        first <EOC>.

        Args:
          prompt: a list of texts, images and videos, or a list of such lists (a batch).
          images: the images of the `<image>` tags in the prompts' texts, in order: images,
            videos or what `Image` takes.
          max_tokens: the largest number of tokens to generate.
          beam_size: hypotheses of beam search; by default 3 (paper: open-ended tasks), or 1
            if a temperature is given. 1 is greedy decoding, or sampling.
          temperature, top_p: of nucleus sampling (Holtzman et al. 2020); temperature 0 does
            not sample.
          length_penalty: of beam search (Wu et al. 2016); 0 for none, as in the paper.
          stop: texts that end the answer where it contains one, also across tokens; the answer
            is cut before it. Beam search searches to the <EOC> and cuts what it has found: the
            score is then still of the whole hypothesis.
          n_best: how many of its answers beam search returns, at most `beam_size`: the best is
            the completion, the others its `alternatives`.
          seed: of sampling. The result for a prompt also depends on its index in the batch,
            but not on the other prompts.

        Returns: a `Completion`, or one for each prompt.

        Raises: UserError for a part of an unknown type, images and tags that differ in number,
          a prompt with too many tokens or images, or an option out of range.
        """
        beams = (1 if temperature > 0 else PAPER_BEAM_SIZE) if beam_size is None else beam_size
        decoding = DecodingConfig(
            max_tokens, beams, temperature, top_p, length_penalty, stop_strings(stop), n_best
        )
        check_seed(seed)
        prompts, several = self._prompts(prompt, images)
        completions = self._engine.generate(prompts, decoding, seed=seed)
        return completions if several else completions[0]

    def stream(
        self,
        prompt: OnePrompt,
        *,
        images: Images | None = None,
        max_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
    ) -> TextStream:
        """Generates the continuation of a prompt token by token, greedily or by sampling: the
        same text as `generate` with `beam_size=1`.

        Several threads may have streams at once: they share the device, token by token, in one
        further thread, and up to 16 share a batch. The texts do not depend on each other.

            for token in model.stream([fj.Image("a.png"), "Output:"]):
                print(token.text, end="", flush=True)

        Args: see `generate`.

        Returns: an iterator over `StreamedToken`s; `cancel()` ends it early, and `completion` is
          the whole answer, after its end.

        Raises: UserError as `generate`, at once and not from the iterator.
        """
        decoding = DecodingConfig(max_tokens, 1, temperature, top_p, stop=stop_strings(stop))
        check_seed(seed)
        prompts, several = self._prompts(prompt, images)
        if several:
            raise UserError(
                "a stream is of one prompt, but a list of prompts was given: call stream once for"
                " each"
            )
        return self._engine.stream(prompts[0], decoding, seed=seed)

    @overload
    def score(
        self,
        prompt: Batch,
        candidates: Sequence[str] | Sequence[Sequence[str]],
        *,
        images: Images | None = ...,
        close: bool = ...,
    ) -> list[CandidateScores]: ...

    @overload
    def score(
        self,
        prompt: OnePrompt,
        candidates: Sequence[str],
        *,
        images: Images | None = ...,
        close: bool = ...,
    ) -> CandidateScores: ...

    def score(
        self,
        prompt: OnePrompt | Batch,
        candidates: Sequence[str] | Sequence[Sequence[str]],
        *,
        images: Images | None = None,
        close: bool = True,
    ) -> CandidateScores | list[CandidateScores]:
        """Computes the log-likelihood of each candidate as the continuation of a prompt
        (paper: close-ended tasks).

        Args:
          prompt: a list of texts, images and videos, or a list of such lists (a batch).
          candidates: texts, including their leading space; for a batch, one such list for all
            prompts or one for each.
          images: the images of the `<image>` tags in the prompts' texts, in order: images,
            videos or what `Image` takes.
          close: also score the <EOC> after each candidate, so that a candidate which is the
            beginning of another one is not favoured.

        Returns: `CandidateScores`, or one for each prompt.

        Raises: UserError as `generate`, and for a candidate without tokens.
        """
        prompts, several = self._prompts(prompt, images)
        texts: list[list[Any]] = [list(candidates)] * len(prompts)
        if candidates and all(isinstance(some, (list, tuple)) for some in candidates):
            texts = [list(some) for some in candidates]
        for text in (text for some in texts for text in some):
            if not isinstance(text, str):
                raise UserError(
                    f"a candidate is a {type(text).__name__}, but must be a text: give a list of"
                    " texts, or for a batch one such list for each prompt"
                )
        if not all(texts):
            raise UserError("there are no candidates to score: give one or more texts")
        found = self._engine.log_likelihoods(prompts, texts, close=close)
        scores = [
            CandidateScores(tuple(some), tuple(values.tolist()))
            for some, values in zip(texts, found, strict=True)
        ]
        return scores if several else scores[0]

    def features(self, images: VisualSource | Visual | ImageSource | Sequence[Any]) -> np.ndarray:
        """Computes the vision encoder's features of images and videos.

        Args:
          images: one, or a sequence of them: `Image`, `Video`, or what `Image` takes.

        Returns: float32 [M, C], the mean over the encoder's grid and the frames, normalised to
          length 1, so that products are cosine similarities, as for RICES (paper 3.1).

        Raises: UserError for anything that is no image.
        """
        if isinstance(images, (str, bytes, os.PathLike)) or not isinstance(images, Sequence):
            images = [images]
        return self._engine.features([self._visual(image) for image in images])

    def attention_maps(
        self, prompt: OnePrompt, answer: str | Sequence[int], *, images: Images | None = None
    ) -> AttentionMaps:
        """Shows what the model looks at as it predicts each token of an answer.

        Args:
          prompt, images: see `generate`; one prompt.
          answer: the text after it, with its leading space, or the ids of `Completion.tokens`.

        Returns: `AttentionMaps`: for each token of the answer the visual that phi names, the
          attention over it as a heat map, its probability and the likeliest alternatives.

        Raises: UserError as `generate`, for a batch, and for an answer without tokens.
        """
        prompts, several = self._prompts(prompt, images)
        if several:
            raise UserError(
                f"attention maps are of one prompt, but a batch of {len(prompts)} was given:"
                " give them one by one"
            )
        return attention_maps(self._engine, prompts[0], answer)

    def __call__(self, prompt: OnePrompt | Batch, images: Images | None = None) -> jax.Array:
        """Computes the next-token logits at every token of a batch of prompts.

        Args:
          prompt: a list of prompts, each a list of texts, images and videos; a single prompt
            is a batch of one.
          images: the images of the `<image>` tags in the prompts' texts, in order over the
            batch.

        Returns: float32 [B, L, V + extra]: [b, t] are the logits of the token after the t-th
          of prompt b, as tokenised by `tokenise`. L is the length of the longest prompt, V the
          language model's vocabulary; <EOC> is the first extra token. 0 past a prompt's end.

        Raises: UserError as `generate`.
        """
        return self._engine.logits(self._prompts(prompt, images)[0])

    def tokenise(
        self, prompt: OnePrompt | Batch, images: Images | None = None
    ) -> list[TokenisedPrompt]:
        """Tokenises prompts: <BOS> first, an <EOC> before every image that follows a text, and
        the tokens of `<image>` for each image (paper 3.1).

        Returns: for each prompt of the batch `tokens` int32 [n], `media_index` int32 [n] (the
          index of the visual that a token attends to, or -1), and `visuals`.

        Raises: UserError as `generate`.
        """
        return [tokenise(one, self.tokenizer) for one in self._prompts(prompt, images)[0]]

    def batch(
        self, prompt: OnePrompt | Batch, answers: Sequence[str], images: Images | None = None
    ) -> dict[str, np.ndarray]:
        """Makes a training batch of prompts and their answers.

        Only the answers and the <EOC> after them have a loss, so that a row's loss is minus
        the log-likelihood that `score` gives its answer.

        Args:
          prompt, images: see `__call__`.
          answers: a text for each prompt, including its leading space.

        Returns: a batch for `tasks.flamingo.FlamingoTask`: tokens, positions, segments,
          media_index int32 [B, L], loss_mask bool [B, L] and, if there are images, visuals
          int32 [B, N], images uint8 [B * N, T, S, S, 3] and frame_mask bool [B * N, T].

        Raises: UserError as `generate`, and where prompts and answers differ in number.
        """
        prompts = self.tokenise(prompt, images)
        if len(prompts) != len(answers):
            raise UserError(
                f"there are {len(prompts)} prompts and {len(answers)} answers: give one for each"
            )
        return answered_batch(
            prompts,
            [[*self.tokenizer.encode(answer), self.tokenizer.eoc] for answer in answers],
            frames=self.config.resampler.frames,
            image_size=self.config.vision.image_size,
            pad_token=self.tokenizer.pad,
        )

    def save(self, folder: str | pathlib.Path) -> None:
        """Exports the model to a folder that `load` reads: safetensors, config and tokenizer.

        Args:
          folder: must not exist; it is created atomically.

        Raises: UserError where it exists, or cannot be written.
        """
        # int8 weights as the floats that they stand for: exports hold floats alone.
        model = nnx.merge(*nnx.split(self.flamingo))
        make_dense(model)
        parameters = to_flat(nnx.split(model)[1])
        with tempfile.TemporaryDirectory() as temporary:
            self.tokenizer.save(temporary)
            export_model(
                folder,
                kind="flamingo",
                config=to_json(self.config),
                parameters=parameters,
                tokenizer_file=tokenizer_file(temporary),
                card=_card(parameters),
            )

    def _visual(self, image: Any) -> Visual:
        """Preprocesses an image or video as in the model's training."""
        if isinstance(image, Visual):
            return image
        source = image if isinstance(image, VisualSource) else Image(image)
        return source.visual(self.config.vision, self.config.resampler.frames)

    def _prompts(self, prompt: Any, images: Images | None) -> tuple[list[Prompt], bool]:
        """Returns the prompts with their images preprocessed, and whether they are a batch."""
        batch, several = as_batch(prompt)
        if images is not None:
            batch = with_images(batch, images)
        return [[self._part(part) for part in parts] for parts in batch], several

    def _part(self, part: Any) -> PromptPart:
        """Checks a part of a prompt, and preprocesses it if it is an image or video."""
        if isinstance(part, str):
            try:
                part.encode()
            except UnicodeError as error:
                raise UserError(f"the text {part!r} is no Unicode ({error}): mend it") from error
        if isinstance(part, (str, SpecialToken)):
            return part
        if isinstance(part, (VisualSource, Visual)):
            return self._visual(part)
        raise UserError(
            f"a part of a prompt is a {type(part).__name__}, but must be a text, fj.Image or"
            " fj.Video: put images, arrays and bytes into one of these"
        )


def load(
    folder: str | pathlib.Path,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    frozen_dtype: str | None = None,
    parts: Mapping[str, str | pathlib.Path] | None = None,
) -> Model:
    """Loads a Flamingo exported by `launch.export`.

    Args:
      folder: the export. Nothing else is read, except the frozen parts that an export of
        `launch.export --trained_only` names.
      mesh: the devices, as `flamingo_jax.make_mesh` makes it; None for the default device. Each
        parameter is read straight into its shards, and all methods of the model run on the
        mesh, with the results of one device: rows over `data` and `fsdp`, heads over `model`.
        With fewer key-value heads than `model` has devices, their part of the decoding cache is
        whole on each of these. Where several processes share the mesh, each loads what its
        devices need; all of them make the same calls and get the same results.
      dtype: compute dtype; by default float32 on CPU and bfloat16 on accelerators. Parameters
        keep their stored dtypes.
      frozen_dtype: "float32", "bfloat16" or "int8" for language model and vision encoder, which
        are cast or quantised as they are read; by default their stored dtypes. int8 takes half
        of bfloat16's memory; `python -m launch.benchmark int8` says what it changes.
      parts: the folders of such parts, where they are elsewhere now than in training, as
        {"language_model": FOLDER, "vision_encoder": FOLDER}. Their digests must be the same.

    Raises: UserError where the folder is no complete export of a Flamingo, a part is missing or
      is another one, or the mesh does not fit the model or its weights the memory of the
      devices.
    """
    loaded = load_flamingo(folder, dtype, frozen_dtype=frozen_dtype, mesh=mesh, parts=parts)
    return Model(loaded.model, loaded.tokenizer, digest=loaded.digest)


def _card(parameters: Mapping[str, jax.Array]) -> str:
    """Writes the model card of a model that was saved from Python."""
    counts: dict[str, int] = {}
    for name, value in parameters.items():
        part = name.split("/")[0].replace("_", " ")
        counts[part] = counts.get(part, 0) + value.size
    summary = "A Flamingo, saved with `Model.save`; what it was trained on is not recorded."
    loading = LOAD_FLAMINGO.format(parts="", flags="")
    return render(ModelCard("Flamingo", summary, counts, loading=loading))
