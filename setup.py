"""flamingo_jax: train, resume, export and evaluate Flamingo models (Alayrac et al. 2022) in
JAX.
"""

import setuptools

setuptools.setup(
    name="flamingo_jax",
    version="0.1.0",
    description="Visual language models after Flamingo, trained and evaluated in JAX.",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=setuptools.find_packages(
        include=[
            f"{name}{part}"
            for name in ("flamingo_jax", "configs", "launch", "data_pipelines")
            for part in ("", ".*")
        ]
    ),
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8",
        "av>=15",
        "beautifulsoup4>=4.12",
        "flax>=0.12",
        "grain>=0.2.18",
        # tensorflow-datasets imports it but does not declare it.
        "importlib_resources>=6",
        "jax>=0.10.2",
        # Its libxml2, 2.14, reads any page in linear time.
        "lxml>=6",
        "matplotlib>=3.8",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "pillow>=11",
        "rich>=13",
        "safetensors>=0.5",
        "scipy>=1.11",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.10",
        "tensorstore>=0.1.70",
        "tokenizers>=0.20",
        "webencodings>=0.6",
    ],
    extras_require={
        # Workdirs, checkpoints and exports in gs:// and s3://.
        "bucket": ["gcsfs>=2025.2", "s3fs>=2025.2"],
        "bucket-test": ["boto3>=1.35", "moto[server]>=5"],
        "parquet": ["pyarrow>=16"],
        "wandb": ["wandb>=0.31"],
        "trackio": ["trackio>=0.43"],
        # The page to try a model on, and its test in a headless Chromium of the system's.
        "playground": ["gradio>=6.31"],
        "playground-test": ["selenium>=4.30"],
        "test": [
            "kubernetes-validate>=1.30",
            "mypy>=1.15",
            "pyarrow>=16",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pyyaml>=6",
            "ruff>=0.11",
        ],
        "gpu": ["jax[cuda12]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        # The compiler alone, for `launch.plan --topology`: it needs no TPU.
        "plan": ["jax[tpu]>=0.10.2"],
        # METEOR of captions: its Java program.
        "meteor": ["pycocoevalcap>=1.2"],
        # The owners' scorers that `make test-scale` compares with.
        "score-test": ["nltk>=3.9", "pycocoevalcap>=1.2", "scikit-learn>=1.5"],
        "interop-test": ["torch>=2.4", "transformers>=4.50"],
    },
)
