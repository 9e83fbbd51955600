"""The schema of `config.fine_tuning`: how launch.fine_tune scores a task."""

import dataclasses
from typing import Literal

from flamingo_jax.ranges import Count, Positive


@dataclasses.dataclass(frozen=True)
class FineTuningConfig:
    """How a model that was fine-tuned to a task is scored: zero-shot, with the prompt that it
    was trained with (paper 3.2). The best cell of a grid is the one of the highest score.
    """

    metric: Literal["vqa_accuracy", "exact_match", "cider", "accuracy", "roc_auc"] = "vqa_accuracy"
    """vqa_accuracy: VQAv2, VizWiz, TextVQA. exact_match: of generated answers, MSRVTTQA. cider:
    CIDEr-D of captions, COCO, VATEX, YouCook2. accuracy: of the most likely class. roc_auc: of
    the likelihood of the second of two classes, HatefulMemes.
    """
    validation_split: str = "validation"
    """The split whose score chooses the cell: a held-out part of the training set, or the
    official validation set (paper B.2.2).
    """
    test_split: str = "test"
    """The split that the best cell is scored on once; "" for none, where its answers are not
    public.
    """
    limit: Count = 0
    """Validation records at most, drawn by config.seed, the same for all cells; 0 for all. The
    test split is always scored whole.
    """
    caption_prompt: str = ""
    """Captions, or classes without a question: the text between visual and answer. Empty, as
    training pairs have none; "Output:" where a dataset's captions begin with it.
    """
    classes: tuple[str, ...] = ()
    """accuracy, roc_auc: names of the classes; () for all answers of the split."""
    max_tokens: Positive = 24
    """Tokens of a generated answer at most. The paper does not say; its captions are shorter."""
    beam_size: Positive = 3
    """Beams (paper B.1.5: 3); 1 is greedy, faster for large grids."""
    batch_size: Positive = 64
    """Prompts in a batch at most, which limits memory only."""
