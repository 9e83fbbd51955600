"""Training, kept features, evaluation and prompts all see an image as the encoder's config
says.
"""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines import iterators
from data_pipelines.batches import make_held_out, make_iterator
from data_pipelines.records import RecordCache
from flamingo_jax.experiment import DatasetConfig, Experiment, FlamingoConfig, VisionConfig
from flamingo_jax.processing import images
from flamingo_jax.processing.visuals import read_visual
from tests.inference.tiny_models import make_tokenizer

SIZE, MEAN = 16, (0.0, 0.0, 1.0)
TOKENIZER = make_tokenizer()


def wide() -> bytes:
    """Red, green and blue beside each other."""
    pixels = np.zeros((20, 60, 3), np.uint8)
    for third in range(3):
        pixels[:, 20 * third : 20 * (third + 1), third] = 255
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_all_that_reads_an_image_makes_the_same_square(fit: images.Fit) -> None:
    expected = images.load(wide(), SIZE, MEAN, fit)
    colours = {"pad": [0, 0, 255], "crop": [0, 255, 0], "stretch": [255, 0, 0]}
    np.testing.assert_array_equal(expected[0, 1], colours[fit])

    records = [{"id": b"a", "image": wide(), "captions": [b"a red star"]}]
    dataset = DatasetConfig("pairs", batch_size=1, max_length=16, visuals=1)
    options = dict(
        tokenizer=TOKENIZER,
        task="flamingo",
        image_size=SIZE,
        mean=MEAN,
        image_fit=fit,
        source=records,
    )
    iterator = make_iterator(dataset, **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(next(iterator)["images"][0, 0], expected)
    iterator.close()
    (fixed,) = make_held_out(dataset, batches=1, **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(fixed["images"][0, 0], expected)
    read = RecordCache(records, "pairs", SIZE, fit, cache_bytes=0)[0].read(0, 0)
    np.testing.assert_array_equal(images.pad(read, SIZE, MEAN), expected)

    vision = VisionConfig(variant="tiny", image_size=SIZE, mean=MEAN, image_fit=fit)
    visual = read_visual([wide()], vision, "a")
    np.testing.assert_array_equal(visual.frames[0], expected)
    experiment = Experiment(flamingo=FlamingoConfig(vision=vision))
    given = iterators._options(
        experiment, TOKENIZER, None, dataclasses.replace(iterators.WHOLE_BATCH), None
    )
    assert given["image_fit"] == fit
