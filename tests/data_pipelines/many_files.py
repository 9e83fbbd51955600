"""Reads 150,000 pairs in 1,200 shards, and their kept features in 1,500 parts, whole: `python
-m tests.data_pipelines.many_files FOLDER`.

To be run where few files may be open and that cannot be raised; prints what it met as JSON.
"""

import json
import os
import pathlib
import sys

import numpy as np

from data_pipelines import feature_cache, shard_files
from data_pipelines.batches import make_iterator
from data_pipelines.build import writer
from data_pipelines.build.source import SplitRecord
from data_pipelines.records import UNREADABLE, open_records
from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.storage import open_files_allowed, raise_open_files
from tests.data_pipelines.faults import noise
from tests.data_pipelines.test_feature_cache import Quarters, quarters
from tests.data_pipelines.test_features import Given
from tests.data_pipelines.toy_data import MEAN, SIZE, make_tokenizer

RECORDS, SHARDS, IMAGES = 150_000, 1_200, 200


def main(folder: pathlib.Path) -> dict[str, int]:
    raise_open_files()
    writer.RECORDS_PER_SHARD = RECORDS // SHARDS
    images = [noise(number) for number in range(IMAGES)]
    examples = tuple(
        SplitRecord("train", {"id": str(i), "image": images[i % IMAGES], "captions": ["red star"]})
        for i in range(RECORDS)
    )
    writer.write_dataset(folder / "pairs", Given("pairs", examples))
    data = folder / "pairs" / "1.0.0"
    records = open_records(data, "train", "pairs")
    order = np.random.default_rng(0).permutation(RECORDS).tolist()
    ids = np.full(RECORDS, -1)
    for place in order:
        record = records[place]
        if UNREADABLE not in record:
            ids[place] = int(record["id"])

    found = feature_cache.load_or_encode(
        records, "image", Quarters(), data, "train", image_size=SIZE, mean=MEAN
    )
    expected = [encoder_of(image) for image in images]
    wrong = sum(
        not np.allclose(found.read(place, 0), expected[ids[place] % IMAGES], rtol=1e-6)
        for place in order
    )

    dataset = DatasetConfig("pairs", str(data), batch_size=8, max_length=64, visuals=4)
    it = make_iterator(
        dataset,
        tokenizer=make_tokenizer(),
        task="flamingo",
        image_size=SIZE,
        mean=MEAN,
        encoder=Quarters(),
        cache_bytes=0,
    )
    for _ in range(200):
        next(it)
    failed = len(it.summary()["failed"])
    it.close()
    return {
        "shards": len(list(data.glob("*.array_record*"))),
        "records": len(set(ids.tolist()) - {-1}),
        "features": RECORDS - wrong,
        "parts": len(list(data.glob("features_*/?????.npy"))),
        "failed": failed,
        "allowed": open_files_allowed(),
        "open": len(os.listdir("/proc/self/fd")),
        "readers": len(shard_files.READERS),
        "files": len(feature_cache.FILES),
    }


def encoder_of(image: bytes) -> np.ndarray:
    from flamingo_jax.processing.images import decode

    return quarters(decode(image, SIZE))


if __name__ == "__main__":
    print(json.dumps(main(pathlib.Path(sys.argv[1]))))
